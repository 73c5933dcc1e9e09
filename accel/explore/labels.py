"""Words, units and scales of an exploration's figures and axes, for tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FIGURES: dict[str, tuple[str, float, str]] = {
    "seconds": ("network\nms", 1e3, ".2f"),
    "attention_seconds": ("attention\nms", 1e3, ".4f"),
    "energy_pj": ("network\nmJ", 1e-9, ".2f"),
    "attention_energy_pj": ("attention\nmJ", 1e-9, ".3f"),
    "area_mm2": ("area\nmm2", 1.0, ".2f"),
    "cycles": ("network\ncycles", 1, ",.0f"),
    "attention_cycles": ("attention\ncycles", 1, ",.0f"),
    "dram_bytes": ("network\nMB", 1e-6, ".2f"),
    "attention_dram_bytes": ("attention\nMB", 1e-6, ".2f"),
    "sram_bytes": ("SRAM\nKB", 1 / 1024, ",.0f"),
    "macs": ("MACs\nM", 1e-6, ",.0f"),
    "utilization": ("MACs\nin use", 100, ".0f"),
}
"""Figure -> heading, factor, format."""


def heading(figure: str) -> str:
    """Of a figure: its words and unit."""
    return FIGURES[figure][0] if figure in FIGURES else figure


def figure_shown(figure: str, value: float) -> str:
    """A value of a figure in the unit of its heading."""
    _, factor, form = FIGURES.get(figure, (figure, 1, ".4g"))
    return format(value * factor, form)


def scale(figure: str) -> float:
    """What a figure is multiplied with for the unit of its heading."""
    return FIGURES[figure][1] if figure in FIGURES else 1.0


def axis_words(joined: Sequence[str]) -> str:
    """An axis in a line: "Q, K buffer KB", "DRAM GB/s", "lines"."""
    return axis_heading(joined).replace("\n", " ")


def shown(field: str, value: Any) -> str:
    """A value of an axis in the unit of its heading."""
    if isinstance(value, int) and field.endswith("_buffer_bytes"):
        return f"{value / 1024:.4g}"
    if isinstance(value, int) and field == "dram_bytes_per_s":
        return f"{value / 1e9:.4g}"
    if isinstance(value, int) and field == "clock_hz":
        return f"{value / 1e6:.4g}"
    return "none" if value is None else str(value)


def axis_heading(joined: Sequence[str]) -> str:
    """Of fields that change together, in two lines."""
    field = joined[0]
    if field == "dram_bytes_per_s":
        return "DRAM\nGB/s"
    if field == "clock_hz":
        return "clock\nMHz"
    if field.endswith(("_buffer_bytes", "_banks")):
        kind = "buffer KB" if field.endswith("_bytes") else "banks"
        short = [name.split("_")[0] for name in joined]
        return f"{', '.join(s.upper() if len(s) == 1 else s for s in short)}\n{kind}"
    return " + ".join(joined).replace("_", "\n", 1).replace("_", " ")
