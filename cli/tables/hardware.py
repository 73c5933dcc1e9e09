"""Named machines as a table for a terminal of 80 columns. Returns renderables, prints nothing."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.text import Text

from ...accel.hardware import Hardware
from ...accel.report.energy import Area
from ...accel.report.silicon import macs_words
from .layout import titled

FIGURES = (
    "lines\nMACs",
    "codec\nMACs",
    "banks",
    "SRAM\nKB",
    "DRAM\nGB/s",
    "area\nmm2",
    "esti-\nmated",
)
"""Banks: of Q, K and V. Estimated: of the area."""


def hardware_table(machines: Mapping[str, Hardware], areas: Mapping[str, Area]) -> RenderableType:
    """A row a machine, then its area by part."""
    profile = next(iter(areas.values())).profile
    table = titled(f"Presets of the simulated machine; area by profile '{profile}'")
    table.add_column("machine", no_wrap=True)
    for heading in FIGURES:
        table.add_column(heading, justify="right")
    for name, hardware in machines.items():
        banks = {hardware.q_banks, hardware.k_banks, hardware.v_banks}
        space = areas[name]
        table.add_row(
            name,
            f"{hardware.macs:,}",
            f"{hardware.codec_macs:,}",
            ", ".join(map(str, sorted(banks))),
            f"{hardware.sram_bytes / 1024:,.0f}",
            f"{hardware.dram_bytes_per_s / 1e9:.1f} {hardware.dram_model}",
            f"{space.total_mm2:.2f}",
            f"{space.estimated_mm2:.2f}",
        )
    notes = [
        f"{name}: {macs_words(machines[name])}; {space.words}." for name, space in areas.items()
    ]
    notes.append(f"Not in the area: {'; '.join(next(iter(areas.values())).not_charged)}.")
    return Group(Text(), table, *map(Text, notes), Text())
