"""The pictures of a co-design run, one PNG each, beside its report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..accel.trace.plots import (
    plot_phases,
    plot_roofline,
    plot_speedups,
    plot_traffic,
    plot_utilization,
)
from ..sparsify.plots import plot_fidelity, plot_head, plot_sparsity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..accel import Report, Timeline
    from ..sparsify import Fidelity
    from ..sparsify.reorder import Polarized
    from ..workload import AttentionMask


def draw(
    mask: AttentionMask,
    polarized: Polarized,
    fidelity: Mapping[str, Fidelity],
    judged: str,
    reports: Mapping[str, Report],
    coded: bool,
    folder: Path,
) -> list[Path]:
    """Draw every picture of a co-design run into ``folder``; returns their paths.

    judged  on what fidelity was judged, in words
    coded   whether Q and K go through a codec
    """
    paths = [
        folder / name
        for name in (
            "mask_head.png",
            "sparsity_by_head.png",
            "fidelity.png",
            "cycles_by_phase.png",
            "bytes_by_tensor.png",
            "speedups.png",
            "roofline.png",
        )
    ]
    layer, head = telling_head(polarized)
    plot_head(polarized[layer][head], f"layer {layer}, head {head}", paths[0])
    plot_sparsity(mask, polarized, paths[1])
    plot_fidelity(fidelity, paths[2], judged)
    plot_phases(reports, paths[3])
    shown = ("vitcod_no_codec", "vitcod") if coded else ("vitcod",)
    plot_traffic({name: reports[name] for name in shown}, paths[4])
    plot_speedups(reports, "systolic", paths[5])
    plot_roofline(reports, paths[6])
    return paths


MOVERS = ("sanger", "vitcod_no_codec", "vitcod")
"""The machines whose data movement the paper sets side by side."""


def draw_machines(
    reports: Mapping[str, Report], timelines: Mapping[str, Timeline], folder: Path
) -> list[Path]:
    """Draw machines side by side, speed-ups over the first one, and each time line; returns
    the paths. What only compares is left out for a single machine."""
    paths = [folder / name for name in ("cycles_by_phase.png", "roofline.png")]
    attention = any(report.attention for report in reports.values())
    plot_phases(reports, paths[0], attention)
    plot_roofline(reports, paths[1])
    movers = {name: reports[name] for name in MOVERS if name in reports}
    paths.append(folder / "data_movement.png")
    plot_traffic(movers if len(movers) > 1 else reports, paths[-1], attention)
    if len(reports) > 1:
        paths.append(folder / "speedups.png")
        plot_speedups(reports, next(iter(reports)), paths[-1])
    for name, timeline in timelines.items():
        paths.append(folder / f"utilization_{name}.png")
        plot_utilization(timeline, paths[-1])
    return paths


def telling_head(polarized: Polarized) -> tuple[int, int]:
    """The head whose number of global keys is nearest a tenth of its keys: both parts of
    a polarized mask can then be seen."""
    return min(
        ((layer, index) for layer, heads in enumerate(polarized) for index in range(len(heads))),
        key=lambda place: abs(
            polarized[place[0]][place[1]].num_global - 0.1 * polarized[place[0]][place[1]].keys
        ),
    )
