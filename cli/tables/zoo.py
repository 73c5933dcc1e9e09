"""What networks cost and where their run time goes, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...models.costs.complexity import Complexity, LayerComplexity
from ...models.costs.dcn_traffic import DCNV4_CHANNELS, SamplingTraffic
from ...models.costs.run_profile import MEMORY_BOUND, RunProfile
from .layout import titled

if TYPE_CHECKING:
    from ...studies.runtime import RuntimeStudy

Size = tuple[int, int]


def costs_table(costs: Sequence[Complexity], sizes: Sequence[Size]) -> RenderableType:
    """A row a network, in units that fit a line; exact counts are in JSON and `cost_table`."""
    cached = ["cache\nMB"] if costs[0].cache_bytes is not None else []
    heads = ["px", "params\nM", "MACs\nG", "no att.\nG", "activ.\nM", "no\ncache\nGB"]
    table = _table("Cost of one image", ["model"], [*heads, *cached, "unlim.\ncache\nMB"])
    for cost, size in zip(costs, sizes, strict=True):
        total = cost.total
        cells = [
            cost.params / 1e6,
            cost.macs / 1e9,
            cost.macs_without_attention / 1e9,
            cost.activations / 1e6,
            total.bytes_no_cache / 1e9,
            *([(total.bytes_with_cache or 0) / 1e6] if cached else []),
            total.bytes_unlimited_cache / 1e6,
        ]
        table.add_row(cost.name, pixels(size), *map(_three_digits, cells))
    note = "MACs without (no att.) and with the products inside attention."
    return Group(table, Text(note), *_notes(costs))


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:#.3g}"


def cost_table(cost: Complexity, size: Size, layers: bool) -> RenderableType:
    """One network: by layer, or by kind of operation and to the unit, and in total."""
    cached = ["cache\n"] if cost.cache_bytes is not None else []
    caches = ["no\ncache\n", *cached, "unlim.\ncache\n"]
    if layers:
        names, heads = ["layer", "kind"], ["thousand\nMACs", "params", "activ."]
    else:
        names, heads = ["kind"], ["MACs", "params", "activations"]
    heads += [f"{cache}MB" for cache in caches]
    title = "by layer" if layers else "by kind of operation"
    table = _table(
        f"{cost.name} at {pixels(size)}, one image, {title}", names, [*heads, "MACs\na byte"]
    )
    for row in cost.layers if layers else cost.by_kind():
        table.add_row(row.name, *([row.kind] if layers else []), *_cells(row, layers))
    table.add_section()
    table.add_row("total", *([""] if layers else []), *_cells(cost.total, layers))
    share = f"{cost.macs_without_attention:,} of {cost.macs:,} MACs are not inside attention."
    return Group(table, Text(share), *_notes([cost]))


def _cells(row: LayerComplexity, layers: bool) -> list[str]:
    moved = [row.bytes_no_cache, row.bytes_with_cache, row.bytes_unlimited_cache]
    counts = (row.macs, row.params, row.activations)
    return [
        *(f"{n / 1e3:,.1f}" if layers else f"{n:,}" for n in counts),
        *(f"{n / 1e6:,.2f}" for n in moved if n is not None),
        f"{row.intensity:.2f}",
    ]


def _notes(costs: Sequence[Complexity]) -> list[Text]:
    cost = costs[0]
    notes = [f"{cost.element_bytes} bytes an element. Activations: convolutions and linear layers."]
    if cost.cache_bytes is not None:
        notes.append(f"Cache: {cost.cache_bytes:,} bytes.")
    notes += [f"{c.name}: not counted: {', '.join(c.unknown)}." for c in costs if c.unknown]
    return [Text(note) for note in notes]


def profile_table(profile: RunProfile) -> RenderableType:
    """Measured time by kind of operation, and the memory-bound share of it."""
    threads = f"{profile.threads} thread{'s' if profile.threads > 1 else ''}"
    table = _table(
        f"{profile.model} at {pixels(profile.image_size)} on this computer: batch "
        f"{profile.batch}, {threads}",
        ["kind of operation", "memory-bound"],
        ["ms a batch", "share"],
    )
    table.add_column("most of it", overflow="fold")
    for kind, seconds in profile.kinds.items():
        table.add_row(
            kind,
            "yes" if kind in MEMORY_BOUND else "",
            f"{seconds * 1e3:.2f}",
            f"{seconds / profile.profiled_seconds:.1%}",
            profile.largest(kind)[0],
        )
    note = (
        f"Memory-bound (reshape, add, copy, normalisation): {profile.memory_bound_share:.1%} of "
        f"the operations' time. A batch without the profiler: {profile.seconds * 1e3:.2f} ms, "
        f"median of {profile.repeats}."
    )
    return Group(table, Text(note))


def intensity_table(cost: Complexity, layers: bool) -> RenderableType:
    """MACs a byte: of every layer, or of the parts that `Complexity.by_module` groups."""
    cache = "an unlimited" if cost.cache_bytes is None else f"{cost.cache_bytes:,} bytes of"
    table = _table(
        "Arithmetic intensity", ["layer" if layers else "part"], ["MACs", "kB", "MACs/B"]
    )
    for row in (*(cost.layers if layers else cost.by_module(2)), cost.total):
        if row.bytes_unlimited_cache:
            moved = row.bytes_with_cache or row.bytes_unlimited_cache
            cells = (f"{row.macs:,}", f"{moved / 1e3:,.1f}", f"{row.intensity:.2f}")
            table.add_row(row.name, *cells)
    return Group(table, Text(f"With {cache} cache, {cost.element_bytes} bytes an element."))


def traffic_table(rows: Sequence[SamplingTraffic]) -> RenderableType:
    """DCNv3's threads against DCNv4's, elements accessed by every sampling operator."""
    table = _table(
        "Sampling operators: elements accessed, nothing kept between threads",
        ["operator"],
        ["DCNv3", "DCNv4", "saved", "unlimited", "FLOPs\nan element"],
    )
    for row in rows:
        saved = "-" if row.saved is None else f"{row.saved:.1%}"
        dcnv4 = "-" if row.dcnv4 is None else f"{row.dcnv4:,}"
        cells = (f"{row.dcnv3:,}", dcnv4, saved, f"{row.unlimited:,}")
        table.add_row(
            row.name.removesuffix(".sampling"), *cells, "{:.2f} .. {:.1f}".format(*row.intensities)
        )
    note = (
        f"A thread of DCNv3's kernel makes one channel, of DCNv4's {DCNV4_CHANNELS} with one "
        "reading of offsets and weights. Unlimited: with a cache without end. FLOPs an element: "
        "DCNv3's threads .. unlimited cache."
    )
    return Group(table, Text(note))


def runtime_table(study: RuntimeStudy) -> RenderableType:
    """Pearson's r of each count with each time, over all networks and each base's."""
    threads = f"{study.threads} thread{'s' if study.threads > 1 else ''}"
    table = _table(
        f"Pearson r with run time: {len(study.networks)} of {study.planned} networks",
        ["networks", "time"],
        ["flops", "params", "activations"],
    )
    for base in (None, *study.bases):
        count = sum(base in (None, network.base) for network in study.networks)
        for time, lines in study.fits(base).items():
            name = f"{base or 'all'} ({count})" if time == "measured" else ""
            table.add_row(name, time, *(f"{line.r:.3f}" for line in lines.values()))
    note = (
        f"Measured: this computer's processor, {threads}, batch {study.batch}, fastest of "
        f"{study.rounds} rounds. Simulated: '{study.simulator}' on '{study.hardware}', same batch."
    )
    return Group(table, Text(note))


def pixels(size: Size) -> str:
    """224 for a square, 192x256 otherwise."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def _table(title: str, names: Sequence[str], heads: Sequence[str]) -> Table:
    """Columns of names to the left, of numbers to the right."""
    table = titled(title, padding=0)
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name not in ("layer", "operator"))
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table
