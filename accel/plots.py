"""Pictures of reports: cycles by phase, bytes by tensor. PNG, whole or not at all.

matplotlib is imported when a picture is drawn. Each function takes reports, writes
``path`` and returns nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..files import written_whole
from .report import Report

PHASE_COLOURS = {
    "sddmm": "#2b6cb0",
    "spmm": "#63b3ed",
    "softmax": "#dd6b20",
    "load": "#718096",
    "decode": "#d53f8c",
    "store": "#a0aec0",
    "reconfigure": "#1a202c",
}
TENSOR_COLOURS = {
    "Q": "#2b6cb0",
    "K": "#63b3ed",
    "V": "#48bb78",
    "index": "#dd6b20",
    "codec weights": "#d53f8c",
    "output": "#a0aec0",
}
OTHER = "#ecc94b"


def plot_phases(reports: Mapping[str, Report], path: str | os.PathLike[str]) -> None:
    """Attention cycles of each machine, stacked by what they were spent on."""
    rows = {name: report.phases() for name, report in reports.items()}
    first = next(iter(reports.values()))
    title = f"{first.workload}: attention cycles, batch {first.batch}, {first.hardware.name}"
    _stacked(rows, PHASE_COLOURS, "thousand cycles", 1e3, title, path)


def plot_traffic(reports: Mapping[str, Report], path: str | os.PathLike[str]) -> None:
    """DRAM bytes of attention on each machine, stacked by tensor."""
    rows = {
        name: {row.tensor: row.total_bytes for row in report.traffic() if row.level == "dram"}
        for name, report in reports.items()
    }
    first = next(iter(reports.values()))
    title = f"{first.workload}: DRAM traffic of attention, batch {first.batch}"
    _stacked(rows, TENSOR_COLOURS, "kilobytes (1,000 B)", 1e3, title, path)


def _stacked(
    rows: Mapping[str, Mapping[str, int]],
    colours: Mapping[str, str],
    label: str,
    unit: float,
    title: str,
    path: str | os.PathLike[str],
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 1.5 + 0.5 * len(rows)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(rows))[::-1]
    left = [0.0] * len(rows)
    for part in dict.fromkeys(part for row in rows.values() for part in row):
        values = [row.get(part, 0) / unit for row in rows.values()]
        if any(values):
            axes.barh(places, values, left=left, height=0.62, label=part,
                      color=colours.get(part, OTHER))  # fmt: skip
            left = [a + b for a, b in zip(left, values, strict=True)]
    for place, total in zip(places, left, strict=True):
        axes.text(total + 0.01 * max(left), place, f"{total:,.0f}", va="center", fontsize=8)
    axes.set_yticks(places, list(rows))
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    with written_whole(path) as temporary:
        figure.savefig(temporary)
