"""Results as tables for a terminal: what `cli` prints. Returns renderables, prints nothing."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...pipeline.result import CodecSummary, CodesignResult
from ...sparsify import Fidelity
from ...workload import AttentionMask
from ...workload.masks import kept_by
from .layout import titled
from .machines import simulation_table


def codesign_tables(result: CodesignResult) -> RenderableType:
    """The whole report: model, mask, fidelity, machines, this computer."""
    parts: list[RenderableType] = [
        Text(),
        _headline(result),
        Text(),
        fidelity_table(result.fidelity),
        Text(),
        simulation_table(result.reports),
    ]
    if result.measured:
        parts += [Text(), measured_table(result)]
    return Group(*parts, Text())


def _headline(result: CodesignResult) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    for label, text in _facts(result):
        grid.add_row(label, text)
    return grid


def _facts(result: CodesignResult) -> list[tuple[str, str]]:
    settings, first = result.settings, result.workload.attention[0]
    heads = [head for layer in result.polarized for head in layer]
    by_head = [float(x) for layer in result.mask.sparsity_by_head() for x in layer]
    learned = len(result.learned_from)
    facts = [
        (
            "model",
            f"{result.workload.name}: {len(result.workload.attention)} attention layers x "
            f"{first.heads} heads, {first.queries} tokens at {settings.image_size} px",
        ),
        (
            "photos",
            f"learned from {settings.learn_crops} crops of {learned}, {result.photos_note}",
        ),
        (
            "mask",
            f"{result.mask.sparsity:.1%} of the entries pruned (heads {min(by_head):.0%} to "
            f"{max(by_head):.0%}), {result.kept_mass:.1%} of the attention mass kept",
        ),
        (
            "polarized",
            f"{sum(h.num_global for h in heads) / len(heads):.1f} global keys a head "
            f"({kept_by(result.mask.global_threshold)}), "
            f"{sum(h.kept - h.sparser_kept for h in heads) / sum(h.kept for h in heads):.0%} "
            "of the kept entries in the dense blocks",
        ),
    ]
    if result.codec_summary is not None:
        facts.append(("codec", _codec_fact(result.codec_summary, settings.rotation)))
    if result.recovery_log is not None:
        log = result.recovery_log
        facts.append(
            (
                "recovery",
                f"{log.steps} steps of {settings.batch_size} crops, loss "
                f"{log.losses[0]:.3f} -> {log.losses[-1]:.3f}",
            )
        )
    return facts


def _codec_fact(summary: CodecSummary, rotated: bool) -> str:
    shape, plain = summary.shapes[0], summary.mean(rotated=False)
    text = (
        f"Q and K over {shape.heads} -> {shape.latent_heads} heads, {summary.parameters} "
        f"parameters; explained variance Q {plain.q:.2f}, K {plain.k:.2f}"
    )
    if rotated:
        agreeing = summary.mean(rotated=True)
        text += f", with heads rotated to agree Q {agreeing.q:.2f}, K {agreeing.k:.2f}"
    moved = summary.mean_errors()
    return (
        f"{text}; on judging crops, under the mask: error Q {moved.q:.2f}, K {moved.k:.2f}, "
        f"attention moved {moved.attention:.2f}"
    )


def fidelity_table(rows: Mapping[str, Fidelity]) -> Table:
    """Variant by variant, against the dense model's tokens."""
    table = titled("Fidelity to the dense model (1 = the same)")
    table.add_column("variant", no_wrap=True)
    saliency = any(row.saliency_iou is not None for row in rows.values())
    labelled = any(row.accuracy is not None for row in rows.values())
    for heading in ("patch\ncosine", "CLS\ncosine", "relative\nL2"):
        table.add_column(heading, justify="right")
    if saliency:
        table.add_column("saliency\nIoU", justify="right")
    if labelled:
        table.add_column("\ntop-1", justify="right")
    for name, row in rows.items():
        cells = [f"{row.patch_cosine:.3f}", _optional(row.cls_cosine), f"{row.relative_l2:.3f}"]
        cells += [_optional(row.saliency_iou)] if saliency else []
        cells += [_top1(row)] if labelled else []
        table.add_row(name, *cells)
    return table


def _top1(row: Fidelity) -> str:
    """Accuracy with its standard error."""
    if row.accuracy is None:
        return "-"
    error = (row.accuracy * (1 - row.accuracy) / row.images) ** 0.5
    return f"{row.accuracy:.3f} ± {error:.3f}"


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def mask_table(mask: AttentionMask) -> Table:
    """Sparsity of each layer and of its sparsest and densest head."""
    table = titled(f"Mask: {mask.sparsity:.1%} pruned")
    for heading in ("layer", "heads", "queries", "keys", "pruned", "least", "most"):
        table.add_column(heading, justify="right")
    for layer, (shape, heads) in enumerate(zip(mask.shapes, mask.sparsity_by_head(), strict=True)):
        shares = (heads.mean(), heads.min(), heads.max())
        table.add_row(str(layer), *map(str, shape), *(f"{share:.1%}" for share in shares))
    return table


def measured_table(result: CodesignResult) -> RenderableType:
    """Dense attention timed here, and what the simulated machine is against each row."""
    first = result.measured[0]
    table = titled(f"Dense attention measured on {first.device}, {first.dtype}")
    table.add_column("kernel", no_wrap=True)
    for heading in (
        "batch",
        "threads",
        "ms an\nimage",
        "fastest -\nslowest",
        "simulated\nis faster",
    ):
        table.add_column(heading, justify="right")
    simulated = result.reports["vitcod"].attention_seconds
    for row in result.measured:
        spread = (row.fastest_seconds_per_image * 1e3, row.slowest_seconds_per_image * 1e3)
        table.add_row(
            f"PyTorch {row.kernel}",
            str(row.batch),
            str(row.threads or "-"),
            f"{row.seconds_per_image * 1e3:.2f}",
            f"{spread[0]:.2f} - {spread[1]:.2f}",
            f"{row.seconds_per_image / simulated:.1f}x",
        )
    note = (
        f"Simulated: 'vitcod' at batch {result.reports['vitcod'].batch}, attention alone, "
        "against each measured row."
    )
    return Group(table, Text(note))
