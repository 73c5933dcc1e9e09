"""Pictures of reports: cycles, bytes, speed-ups, roofline, utilization. PNG, whole or not at all.

matplotlib is imported when a picture is drawn. Each function takes reports (or a time line),
writes ``path`` and returns nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ...figure import blank, save
from ..hardware import Hardware
from ..report.report import OpCost, Report
from ..report.speedups import speedups
from .timeline import DENSER, OPERATIONS, SPARSER, Timeline, operation_starts

PHASE_COLOURS = {
    "predict": "#805ad5",
    "sddmm": "#2b6cb0",
    "spmm": "#63b3ed",
    "recompute": "#b794f4",
    "softmax": "#dd6b20",
    "load": "#718096",
    "decode": "#d53f8c",
    "store": "#a0aec0",
    "reconfigure": "#1a202c",
    "pack": "#744210",
    "top-k": "#319795",
    "DRAM beyond MAC lines": "#4a5568",
    "softmax beyond MAC lines": "#f6ad55",
    "packing beyond MAC lines": "#d69e2e",
}
TENSOR_COLOURS = {
    "Q": "#2b6cb0",
    "K": "#63b3ed",
    "V": "#48bb78",
    "index": "#dd6b20",
    "codec weights": "#d53f8c",
    "output": "#a0aec0",
    "weights": "#805ad5",
    "activations": "#f6ad55",
}
OTHER = "#ecc94b"
OTHERS = (OTHER, "#1a365d", "#9ae6b4", "#702459", "#c6f6d5", "#e53e3e", "#bee3f8", "#22543d")
"""For parts that have no colour of their own, in the order in which they appear."""
PHASE_WORDS = {
    "predict": "prediction",
    "sddmm": "SDDMM (scores)",
    "spmm": "SpMM (values)",
    "load": "waiting for DRAM",
    "decode": "waiting for the decoder",
    "store": "storing",
}
MANY_SEAMS = 40
"""More boundaries of operations than this are not drawn."""

MACHINE_COLOURS = ("#4a5568", "#2b6cb0", "#dd6b20", "#38a169", "#d53f8c", "#805ad5", "#975a16")


def plot_phases(
    reports: Mapping[str, Report], path: str | os.PathLike[str], attention_only: bool = True
) -> None:
    """Cycles of each machine, stacked by what they were spent on."""
    rows = {name: report.phases(attention_only) for name, report in reports.items()}
    part = "attention" if attention_only else "network"
    first = next(iter(reports.values()))
    title = f"{first.workload}: {part} cycles, batch {first.batch}, {first.hardware.name}"
    _stacked(rows, PHASE_COLOURS, "thousand cycles", 1e3, title, path)


def plot_traffic(
    reports: Mapping[str, Report], path: str | os.PathLike[str], attention_only: bool = True
) -> None:
    """DRAM bytes of each machine, stacked by tensor."""
    part = "attention" if attention_only else "the network"
    rows: dict[str, dict[str, int]] = {}
    for name, report in reports.items():
        moved = report.traffic(attention_only)
        rows[name] = {row.tensor: row.total_bytes for row in moved if row.level == "dram"}
    first = next(iter(reports.values()))
    title = f"{first.workload}: DRAM traffic of {part}, batch {first.batch}"
    _stacked(rows, TENSOR_COLOURS, "kilobytes (1,000 B)", 1e3, title, path)


def plot_speedups(
    reports: Mapping[str, Report], against: str, path: str | os.PathLike[str]
) -> None:
    """Speed-ups over the machine ``against``: attention alone, and the whole network."""
    made = speedups(reports, against)
    figure, axes = _figure(1.6 + 0.62 * len(reports))
    names = list(reports)
    most = max((s.factor for s in made), default=1.0)
    subjects = [f"{name}, batch {reports[name].batch} (simulated)" for name in names]
    for part, colour, shift in (("attention", "#2b6cb0", 0.2), ("end to end", "#a0aec0", -0.2)):
        factors = {s.subject: s.factor for s in made if s.part == part}
        for row, subject in enumerate(subjects):
            factor, place = factors.get(subject, 0.0), len(names) - 1 - row + shift
            axes.barh(place, factor, height=0.36, color=colour, label=part if row == 0 else None)
            axes.text(factor + 0.01 * most, place, f"{factor:.2f}x", va="center", fontsize=8)
    axes.axvline(1.0, color="#1a202c", linewidth=0.8)
    axes.set_yticks(range(len(names))[::-1], names)
    axes.set_xlim(0, 1.12 * most)
    batch = reports[against].batch
    axes.set_xlabel(f"times faster than {against}, both simulated, batch {batch}")
    axes.set_title(f"{reports[against].workload}: speed-ups over {against}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    save(figure, path)


def plot_roofline(reports: Mapping[str, Report], path: str | os.PathLike[str]) -> None:
    """Attention's layers, attention and the network under the machine's two roofs.

    MACs a second over MACs a DRAM byte, the codec's own MACs apart: low and left waits for
    memory, low and right for something else on the chip. Where machines are cut up differently
    the roofs are those of the most lines, and the title says so.
    """
    first = next(iter(reports.values()))
    machines = {report.hardware for report in reports.values()}
    hardware = max(machines, key=lambda machine: machine.macs)
    figure, axes = _figure(4.6)
    points = []
    for colour, (name, report) in zip(_colours(len(reports)), reports.items(), strict=True):
        found = (_point([op], hardware) for op in report.attention)
        layers = [point for point in found if point is not None]
        points += layers
        for point in layers:
            axes.scatter(*point, s=9, color=colour, alpha=0.5)
        for marker, ops in (("o", report.attention), ("s", report.ops)):
            point = _point(ops, hardware)
            if point is not None:
                points.append(point)
                label = name if marker == "o" or not report.attention else None
                face = colour if marker == "o" else "none"
                axes.scatter(*point, s=60, marker=marker, facecolors=face, edgecolors=colour,
                             label=label, linewidths=1.2, zorder=3)  # fmt: skip
    _roofs(axes, hardware, [x for x, _ in points], [y for _, y in points])
    whose = hardware.name if len(machines) == 1 else f"the most lines ({hardware.lines})"
    title = f"{first.workload} under the roofs of {whose}, batch {first.batch}"
    axes.set_title(f"{title}\nsmall: a layer's attention, round: attention, square: network",
                   fontsize=10)  # fmt: skip
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save(figure, path)


def _point(ops: Iterable[OpCost], hardware: Hardware) -> tuple[float, float] | None:
    """(MACs a DRAM byte, 1e9 MACs a second); None where either is not known."""
    ops = tuple(ops)
    macs, moved = sum(op.line_macs for op in ops), sum(op.dram_bytes for op in ops)
    cycles = sum(op.cycles for op in ops)
    if not (macs and moved and cycles):
        return None
    return macs / moved, macs / hardware.seconds(cycles) / 1e9


def _roofs(axes: Any, hardware: Hardware, xs: list[float], ys: list[float]) -> None:
    peak = hardware.macs * hardware.clock_hz / 1e9
    ridge = peak * 1e9 / hardware.dram_bytes_per_s
    low, high = min([*xs, ridge]) / 2, max([*xs, ridge]) * 4
    axes.plot([low, ridge, high], [peak * low / ridge, peak, peak], color="#1a202c", linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(low, high)
    axes.set_ylim(min([*ys, peak * low / ridge]) / 1.5, peak * 1.7)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.text(high, peak * 1.08, f"{peak:g} billion MACs a second ", ha="right", fontsize=8)
    axes.annotate(f"{hardware.dram_bytes_per_s / 1e9:g} GB/s", (low, peak * low / ridge),
                  (10, 0), textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_xlabel("MACs a DRAM byte")
    axes.set_ylabel("billion MACs a second")


def plot_utilization(
    timeline: Timeline, path: str | os.PathLike[str], attention_only: bool = True
) -> None:
    """Share of each resource's peak over simulated time, in layers' own order.

    With ``attention_only`` the operations between the attention layers are cut out, where
    there are any.
    """
    report = timeline.report
    attention_only = attention_only and bool(report.attention_cycles)
    groups = _track_groups(timeline, attention_only)
    figure, rows = _figure(1.4 + 1.25 * len(groups), rows=len(groups))
    edges, seams, shares = _shares(timeline, attention_only)
    times = edges / report.hardware.clock_hz * 1e6
    for axes, (title, tracks) in zip(rows, groups.items(), strict=True):
        colours = [_track_colour(track) for track in tracks]
        steps = [np.append(shares[track], shares[track][-1]) * 100 for track in tracks]
        labels = [track.removeprefix("DRAM ").removeprefix("decoder ") for track in tracks]
        axes.stackplot(times, steps, step="post", colors=colours, labels=labels, linewidth=0)
        for seam in seams if len(seams) <= MANY_SEAMS else ():
            axes.axvline(seam / report.hardware.clock_hz * 1e6, color="#1a202c", linewidth=0.3)
        axes.set_ylim(0, 105)
        axes.set_xlim(0, times[-1])
        axes.set_ylabel(f"{title}\n% of peak", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        if len(tracks) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), frameon=False, fontsize=7)
    part = "attention layers, one after the other" if attention_only else "whole network"
    rows[-1].set_xlabel(f"microseconds ({part})", fontsize=8)
    rows[0].set_title(f"{report.workload} on {report.simulator}, batch {report.batch}", fontsize=10)
    save(figure, path)


def _track_groups(timeline: Timeline, attention_only: bool) -> dict[str, list[str]]:
    """Row of the picture -> its tracks; rows without work are left out."""
    *_, shares = _shares(timeline, attention_only)
    groups: dict[str, list[str]] = {}
    for track in timeline.tracks:
        if track != OPERATIONS and shares[track].any():
            row = "MAC lines" if track in (DENSER, SPARSER, "MAC lines") else track.split(" ")[0]
            groups.setdefault(row, []).append(track)
    return groups


def _track_colour(track: str) -> str:
    tensor = track.removeprefix("DRAM ").removeprefix("decoder ")
    own = {DENSER: "#2b6cb0", SPARSER: "#63b3ed", "MAC lines": "#4a5568", "softmax": "#dd6b20"}
    return own.get(track, TENSOR_COLOURS.get(tensor, OTHER))


def _shares(
    timeline: Timeline, attention_only: bool
) -> tuple[np.ndarray, list[int], dict[str, np.ndarray]]:
    """Edges in cycles from 0 (gaps cut out), where operations end, and each track's share of
    its peak in each bin."""
    report, spans = timeline.report, []
    for start, op in operation_starts(report):
        if op.cycles and (op.kind == "attention" or not attention_only):
            spans.append((start, op.cycles))
    bins = max(400 // len(spans), 1)
    edges, seams, at = [0], [], 0
    parts: dict[str, list[np.ndarray]] = {track: [] for track in timeline.tracks}
    for start, cycles in spans:
        count = min(bins, cycles)
        own = start + np.arange(count + 1) * cycles // count
        for track, found in parts.items():
            done = timeline.work_between(track, own)
            found.append(done / np.diff(own) / timeline.peak(track)[0])
        edges += (own[1:] - start + at).tolist()
        at += cycles
        seams.append(at)
    return np.array(edges), seams, {track: np.concatenate(part) for track, part in parts.items()}


def _stacked(
    rows: Mapping[str, Mapping[str, int]],
    colours: Mapping[str, str],
    label: str,
    unit: float,
    title: str,
    path: str | os.PathLike[str],
) -> None:
    figure, axes = _figure(1.5 + 0.5 * len(rows))
    places = range(len(rows))[::-1]
    left = [0.0] * len(rows)
    known = [part for part in colours if any(part in row for row in rows.values())]
    own = _with_others(colours, (part for row in rows.values() for part in row))
    for part in dict.fromkeys([*known, *own]):
        values = [row.get(part, 0) / unit for row in rows.values()]
        if any(values):
            axes.barh(places, values, left=left, height=0.62, label=PHASE_WORDS.get(part, part),
                      color=own[part])  # fmt: skip
            left = [a + b for a, b in zip(left, values, strict=True)]
    for place, total in zip(places, left, strict=True):
        axes.text(total + 0.01 * max(left), place, f"{total:,.0f}", va="center", fontsize=8)
    axes.set_yticks(places, list(rows))
    axes.set_xlim(0, 1.12 * max(left) or 1.0)
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save(figure, path)


def _with_others(colours: Mapping[str, str], parts: Iterable[str]) -> dict[str, str]:
    """A colour for each part, those without one of their own included."""
    unknown = [part for part in dict.fromkeys(parts) if part not in colours]
    spare = {part: OTHERS[index % len(OTHERS)] for index, part in enumerate(unknown)}
    return {**colours, **spare}


def _colours(count: int) -> list[str]:
    return [MACHINE_COLOURS[index % len(MACHINE_COLOURS)] for index in range(count)]


def _figure(height: float, rows: int = 1) -> tuple[Any, Any]:
    """A figure with one axes, or with an array of them on one time axis."""
    figure = blank(7.6, height)
    if rows > 1:
        return figure, figure.subplots(rows, 1, sharex=True)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
