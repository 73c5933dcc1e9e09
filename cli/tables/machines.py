"""Simulated machines as tables for a terminal of 80 columns. Returns renderables, prints nothing.

Percentages of lines and cycles are of attention alone unless a heading says "network".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...accel.report.energy import Area, Energy
from ...accel.report.report import LEVELS, OpCost, Report
from ...accel.report.silicon import codec_note, cut_words, equal_words, machines_words
from ...accel.report.speedups import speedups
from ...accel.schedule import DEFAULT
from ...accel.simulators.registry import SIMULATORS
from ...workload.masks import kept_by
from .layout import worded_table
from .resources import energy_table, line_table, movement_table, resource_table

PRODUCTS = ("sddmm", "spmm")
"""Phases that have a column of their own; the rest of a layer's cycles are waits and extras."""


def machine_line(report: Report, macs: str | None = None) -> str:
    """The machine in a few words. ``macs`` None: those of its lines and codec."""
    hardware = report.hardware
    return (
        f"'{hardware.name}': {macs or cut_words(hardware)}, "
        f"{hardware.clock_hz / 1e6:.0f} MHz, {hardware.dram_bytes_per_s / 1e9:.1f} GB/s, "
        f"batch {report.batch}{_used(report)}"
    )


def _shared_macs(reports: Mapping[str, Report]) -> str | None:
    """What machines that are cut up differently share."""
    same = len({report.hardware for report in reports.values()}) == 1
    return None if same else equal_words(reports)


def _used(report: Report) -> str:
    """What of the schedule and of the simulator's parameters is not at its default."""
    given = [report.schedule] + ([] if report.parameters is None else [report.parameters])
    usual = [DEFAULT, SIMULATORS[report.simulator].parameters]
    changed = [
        f", {item.name} {getattr(made, item.name)}"
        for made, before in zip(given, usual, strict=False)
        for item in fields(made)
        if getattr(made, item.name) != getattr(before, item.name)
    ]
    return "".join(changed)


def simulation_table(reports: Mapping[str, Report]) -> RenderableType:
    """Machine by machine: attention alone, then the whole network."""
    base, first = next(iter(reports.items()))
    if len(reports) == 1:
        return _single(first)
    headings = ("attention\ncycles", "attention\nfaster", "DRAM\nkB", "MACs\nin use")
    table = worded_table(
        f"Simulated on {machine_line(first, _shared_macs(reports))}",
        ["machine"],
        [*headings, "network\nms", "network\nfaster"],
    )
    factors = {(s.subject, s.part): s.factor for s in speedups(reports, base)}
    for name, report in reports.items():
        subject = f"{name}, batch {report.batch} (simulated)"
        faster = [factors.get((subject, part)) for part in ("attention", "end to end")]
        cells = ["-" if factor is None else f"{factor:.2f}x" for factor in faster]
        table.add_row(
            name,
            f"{report.attention_cycles:,}",
            cells[0],
            f"{report.dram_bytes() / 1e3:,.0f}" if report.dram_bytes() else "-",
            f"{report.utilization():.0%}" if report.macs else "-",
            f"{report.seconds * 1e3:.2f}",
            cells[1],
        )
    busiest = "; ".join(f"{name} {report.bottleneck()}" for name, report in reports.items())
    notes = [
        f"Faster: than {base} at batch {first.batch}, both simulated. DRAM and MACs in use: "
        f"attention alone. Network: every operation of the batch, {_fusion_words(first)}.",
        f"Busiest in attention: {busiest}.",
        f"MACs at work: {machines_words(reports)}",
        *codec_note(reports),
    ]
    notes += _global_notes(reports)
    return Group(table, *map(Text, [*notes, *_unknown_note(first)]))


def _fusion_words(report: Report) -> str:
    fused = (report.schedule or DEFAULT).vector_fusion == "fused"
    return "vector operations fused to products" if fused else "none fused"


def _single(report: Report) -> RenderableType:
    """One machine in a few lines."""
    share = report.attention_cycles / report.cycles if report.cycles else 0.0
    bottleneck = f"network {report.bottleneck(False)} (share of the cycles at work)"
    rows = {
        "machine": f"{report.simulator} on {machine_line(report)}",
        "network": f"{report.workload}: {report.cycles:,} cycles, {report.seconds * 1e3:.3f} ms; "
        f"{report.utilization(False):.0%} of the MACs in use; none of its operations are fused",
    }
    if report.attention:
        rows["attention"] = (
            f"{report.attention_cycles:,} cycles, {report.attention_seconds * 1e3:.3f} ms "
            f"({share:.1%} of the network); {report.utilization():.0%} of the MACs in use; "
            f"{report.dram_bytes() / 1e3:,.0f} kB from and to DRAM"
        )
        bottleneck = f"attention {report.bottleneck()}, {bottleneck}"
    if report.global_thresholds:
        rows["polarized"] = _global_words(report)
    rows["bottleneck"] = bottleneck
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    for name, text in rows.items():
        grid.add_row(name, text)
    return Group(grid, *map(Text, _unknown_note(report)))


def _global_words(report: Report) -> str:
    """How many keys are global, and by which rule."""
    counts = [head.global_keys for op in report.attention for head in op.heads]
    rules = report.global_thresholds
    rule = kept_by(rules[0])
    if len(rules) > 1:
        rule = f"a threshold for each head, of {', '.join(sorted(map(str, rules)))}"
    return f"{sum(counts) / len(counts):.1f} global keys a head ({rule})"


def _global_notes(reports: Mapping[str, Report]) -> list[str]:
    """Of the machines that have any, those with the same together."""
    found: dict[str, list[str]] = {}
    for name, report in reports.items():
        if report.global_thresholds not in ((), ("none",)):
            found.setdefault(_global_words(report), []).append(name)
    return [f"Polarized, {', '.join(names)}: {words}." for words, names in found.items()]


def _unknown_note(report: Report) -> list[str]:
    names = ", ".join(report.unknown)
    return [f"Charged for their bytes alone: {names}."] if names else []


def layer_table(report: Report) -> RenderableType:
    """Attention, layer by layer."""
    table = worded_table(
        f"Attention by layer on {report.simulator}",
        ["layer"],
        ["cycles", "SDDMM", "SpMM", "waits,\nextras", "MACs\nin use", "DRAM\nkB", "busiest"],
    )
    for number, op in enumerate(report.attention):
        table.add_row(str(number), *_layer_cells(op, report.hardware.macs))
    return table


def _layer_cells(op: OpCost, macs: int) -> list[str]:
    products = [op.phases.get(name, 0) for name in PRODUCTS]
    share = op.busy[op.bottleneck] / op.cycles if op.busy and op.cycles else 0.0
    return [
        *(f"{cycles:,}" for cycles in (op.cycles, *products, op.cycles - sum(products))),
        f"{op.line_macs / (op.cycles * macs):.0%}" if op.cycles else "-",
        f"{op.dram_bytes / 1e3:,.0f}",
        f"{op.bottleneck} {share:.0%}",
    ]


def head_table(report: Report) -> RenderableType:
    """Attention, head by head, where the engine stepped it."""
    if not any(op.heads for op in report.attention):
        return Text(f"{report.simulator} has closed forms for whole layers: no table of heads.")
    headings = ("cycles", "SDDMM", "SpMM", "global\nkeys", "scores", "kept")
    table = worded_table(
        f"Attention by head on {report.simulator}", ["layer", "head"], [*headings, "lines wait for"]
    )
    for number, op in enumerate(report.attention):
        for head in op.heads:
            products = [head.phases.get(name, 0) for name in PRODUCTS]
            waits = {name: value for name, value in head.stalls.items() if name != "busy"}
            longest = max(waits, key=lambda name: waits[name], default="-")
            table.add_row(
                "" if head.head else str(number),
                str(head.head),
                *(f"{cycles:,}" for cycles in (head.cycles, *products)),
                str(head.global_keys),
                f"{head.scores:,}",
                f"{head.kept_scores / head.scores:.0%}" if head.scores else "-",
                SHORT.get(longest, longest),
            )
    table.columns[-1].justify = "left"
    note = "Scores: computed; kept: the share of them that the mask keeps."
    return Group(table, Text(note))


SHORT = {
    "no work left in the stage": "more work",
    "index from DRAM": "index",
    "Q or K from DRAM": "Q, K (DRAM)",
    "V from DRAM": "V (DRAM)",
    "other lines (lockstep)": "lockstep",
    "room for output rows": "output rows",
    "new split of the lines": "new split",
}
"""Waits, in a column of few characters."""


def operation_table(report: Report) -> RenderableType:
    """The whole network: operations whose names differ in numbers alone are one row."""
    table = worded_table(
        f"Whole network on {report.simulator}",
        ["operation"],
        ["count", "cycles", "share", "DRAM\nkB", "busiest"],
    )
    groups: dict[tuple[str, str], list[OpCost]] = {}
    for op in report.ops:
        groups.setdefault((re.sub(r"\d+", "*", op.name), op.kind), []).append(op)
    for (name, _), ops in groups.items():
        cycles = sum(op.cycles for op in ops)
        busiest = max(ops, key=lambda op: op.cycles).bottleneck
        table.add_row(
            name if len(name) <= 36 else f"...{name[-33:]}",
            str(len(ops)),
            f"{cycles:,}",
            f"{cycles / report.cycles:.1%}" if report.cycles else "-",
            f"{sum(op.dram_bytes for op in ops) / 1e3:,.0f}",
            busiest,
        )
    return Group(table, *_fused_words(report))


def _fused_words(report: Report) -> list[Text]:
    """What operations that run inside the product before them would take apart from it."""
    fused = [op for op in report.ops if "fused_into" in op.details]
    if not fused:
        return []
    cycles = sum(int(op.details["apart_cycles"]) for op in fused)
    moved = sum(int(op.details["apart_dram_bytes"]) for op in fused)
    return [
        Text(
            f"{len(fused)} vector operations are fused with the product before them, whose DRAM "
            f"column holds their bytes. Apart they would take {cycles:,} cycles and "
            f"{moved / 1e3:,.0f} kB of their own."
        )
    ]


def machine_tables(report: Report, spent: Energy, space: Area, heads: bool) -> RenderableType:
    """Everything of one machine, attention first where the network has it."""
    parts: list[RenderableType] = []
    if report.attention:
        parts.append(layer_table(report))
        parts += [head_table(report)] if heads else []
        parts += [line_table(report), movement_table(report)]
    parts += [resource_table(report), movement_table(report, attention_only=False)]
    parts += [operation_table(report), energy_table(spent, space)]
    return Group(*(part for table in parts for part in (Text(), table)))


def comparison_tables(
    reports: Mapping[str, Report], energies: Mapping[str, Energy]
) -> RenderableType:
    """Machines side by side: speed, then bytes and energy."""
    spent = next(iter(energies.values()))
    table = worded_table(
        f"Attention's data movement and energy, profile '{spent.profile}'",
        ["machine"],
        ["DRAM\nkB", "buffers\nkB", "lines\nkB", "attention\nuJ", "network\nuJ"],
    )
    for name, report in reports.items():
        moved: dict[str, int] = dict.fromkeys(LEVELS, 0)
        for row in report.traffic():
            moved[row.level] += row.total_bytes
        parts = (True, False) if report.macs else ()
        joules = [energies[name].total_pj(only) / 1e6 for only in parts] or [0.0, 0.0]
        cells = [f"{size / 1e3:,.0f}" if size else "-" for size in moved.values()]
        table.add_row(name, *cells, *(f"{value:,.1f}" if value else "-" for value in joules))
    words = Table.grid(padding=(0, 2))
    words.add_column(no_wrap=True)
    words.add_column()
    for name in reports:
        words.add_row(name, SIMULATORS[name].words)
    notes = [
        f"Equal for all: {equal_words(reports)}, bandwidth and clock. Energy: of what is "
        "counted and has a figure in the profile; --json lists the rest as not_charged.",
    ]
    missing = {
        name: [line for line in energies[name].not_charged if "does not count" in line]
        for name in reports
    }
    notes += [f"{name} lacks: {'; '.join(lines)}." for name, lines in missing.items() if lines]
    return Group(simulation_table(reports), Text(), table, *map(Text, notes), Text(), words)
