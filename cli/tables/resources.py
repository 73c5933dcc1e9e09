"""Where the time, the bytes and the energy of one simulated machine go: tables for a terminal.

Percentages of lines and cycles are of attention alone unless a heading says "network".
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from ...accel.report.energy import Area, Energy
from ...accel.report.report import LEVELS, Report
from .layout import worded_table

BAR = 24
"""Characters of a full bar."""


def line_table(report: Report) -> RenderableType:
    """What the MAC lines do and wait for in attention."""
    stalls, lines = report.stalls(), report.hardware.lines
    if not stalls:
        return Text(f"{report.simulator} has closed forms: no stalls of its MAC lines are known.")
    whole = report.attention_cycles * lines
    rest = whole - sum(stalls.values())
    waits = {name: value for name, value in stalls.items() if name != "busy"}
    waits["the last stores of a layer"] = rest
    rows = [("at work", stalls.get("busy", 0))]
    longest = sorted(waits.items(), key=lambda item: -item[1])
    rows += [(f"waits for: {name}", value) for name, value in longest if value]
    table = worded_table(
        f"Where the time of the {lines} MAC lines goes (attention on {report.simulator})",
        ["a line ..."],
        ["of its time", ""],
    )
    table.columns[-1].justify = "left"
    for name, value in rows:
        share = f"{value / whole:.1%}" if value > whole / 2000 else "< 0.1%"
        table.add_row(name, share, "█" * round(BAR * value / whole))
    return Group(table, Text(_bottleneck(report, longest, whole)))


def _bottleneck(report: Report, longest: list[tuple[str, int]], whole: int) -> str:
    most = ", ".join(f"{name} {value / whole:.0%}" for name, value in longest[:3])
    return (
        f"Bottleneck of attention: {report.bottleneck()} of the cycles at work. "
        f"What the lines wait for longest: {most}."
    )


def resource_table(report: Report) -> RenderableType:
    """How long each resource works."""
    table = worded_table(
        f"Resources at work on {report.simulator}",
        ["share of the cycles"],
        ["attention", "network"],
    )
    parts = report.busy_shares(), report.busy_shares(attention_only=False)
    for name in sorted(filter(parts[1].get, parts[1]), key=lambda name: -parts[1][name]):
        table.add_row(name, *(f"{part[name]:.1%}" if name in part else "-" for part in parts))
    return Group(table, Text("Resources overlap: their shares do not sum to 100 %."))


def movement_table(report: Report, attention_only: bool = True) -> RenderableType:
    """Bytes by tensor and level, read and written."""
    part = "attention" if attention_only else "the whole network"
    headings = ("DRAM\nread", "DRAM\nwritten", "buffers\nread", "buffers\nwritten", "lines\ntake")
    table = worded_table(f"Data movement of {part} on {report.simulator}, kB", ["tensor"], headings)
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    for row in report.traffic(attention_only):
        rows.setdefault(row.tensor, {})[row.level] = (row.read_bytes, row.written_bytes)
    total = [0] * 5
    for tensor, levels in rows.items():
        figures = [size for level in LEVELS for size in levels.get(level, (0, 0))][:5]
        total = [a + b for a, b in zip(total, figures, strict=True)]
        if any(figures):
            table.add_row(tensor, *map(_kilobytes, figures))
    table.add_section()
    table.add_row("all", *map(_kilobytes, total))
    return table


def _kilobytes(size: int) -> str:
    return f"{size / 1e3:,.1f}" if size else "-"


def energy_table(spent: Energy, space: Area) -> RenderableType:
    """Microjoules by component, milliwatts, square millimetres: with their profile's name."""
    table = worded_table(
        f"Energy on {spent.simulator}, profile '{spent.profile}'",
        ["component"],
        ["attention\nuJ", "share", "network\nuJ", "share"],
    )
    parts = [spent.components_pj(only) for only in (True, False)]
    totals = [spent.total_pj(only) for only in (True, False)]
    for name in dict.fromkeys([*parts[0], *parts[1]]):
        table.add_row(name, *_energy_cells([part.get(name, 0.0) for part in parts], totals))
    table.add_section()
    table.add_row("all", *_energy_cells(totals, totals))
    power = " and ".join(f"{spent.mean_milliwatts(only):,.0f} mW" for only in (True, False))
    notes = [
        f"Mean power {power} (attention, network), DRAM included.",
        f"Area {space.words}.",
        f"Not in the energy: {'; '.join(spent.not_charged)}.",
        f"Not in the area: {'; '.join(space.not_charged)}.",
    ]
    return Group(table, *map(Text, notes))


def _energy_cells(values: list[float], totals: list[float]) -> list[str]:
    return [
        cell
        for value, total in zip(values, totals, strict=True)
        for cell in (f"{value / 1e6:,.2f}", f"{value / total:.0%}" if total else "-")
    ]
