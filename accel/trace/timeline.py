"""When each resource works, and on what: the simulated time line of a report. Cycles.

For the ViTCoD-style machines the slices come from the engine's own records: a stage of the
MAC lines, a DRAM transfer, the decoding of one, the softmax of a unit's rows (the last of
its three passes). Closed forms (dense products, vector work, the other machines) say how long
a resource works and not when: their slices begin with the operation.

A slice lasts from its first to its last cycle of work and may pause in between: ``work`` is
exact, and sums to the report's counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ...workload import Workload
from ..hardware import Hardware
from ..report.report import OpCost, Report
from ..schedule import DEFAULT, Schedule
from ..simulate import simulate, warn_of_split
from ..simulators.registry import simulator_named
from ..simulators.simulator import without_parts
from ..vitcod.assign import DENSE_ROUND
from ..vitcod.cost import CHANNELS
from ..vitcod.pattern import SDDMM
from ..vitcod.program import INDEX, STORE, K, Q
from ..vitcod.simulate import operations
from ..vitcod.stepped import AttentionRun, named_stalls

DENSER, SPARSER, OPERATIONS = "denser lines", "sparser lines", "operations"


@dataclass(frozen=True)
class Slice:
    """One resource at work on one thing, cycles ``start`` up to ``end``.

    track   the resource
    work    in the unit of the track, see `Timeline.peak`
    notes   more to say about it
    marks   cycles by which equal parts of the work were done (tokens of a transfer); without
            them the work counts as spread evenly
    """

    track: str
    name: str
    start: int
    end: int
    work: int
    notes: Mapping[str, int | str] = field(default_factory=dict)
    marks: np.ndarray | None = field(default=None, compare=False, repr=False)

    def moved(self, cycles: int) -> Slice:
        """The same, so much later."""
        marks = None if self.marks is None else self.marks + cycles
        return replace(self, start=self.start + cycles, end=self.end + cycles, marks=marks)


@dataclass(frozen=True)
class Timeline:
    """A report and the slices behind it: of each track in order, without overlap."""

    report: Report
    slices: tuple[Slice, ...]

    @property
    def tracks(self) -> tuple[str, ...]:
        """The resources: operations, then units, then DRAM by tensor."""
        found = dict.fromkeys(piece.track for piece in self.slices)
        return tuple(sorted(found, key=lambda name: (_rank(name), name)))

    def peak(self, track: str) -> tuple[float, str]:
        """The most work of a cycle, and its unit."""
        hardware = self.report.hardware
        if track.startswith("DRAM "):
            return float(hardware.dram_bytes_per_cycle), "bytes"
        if track in (DENSER, SPARSER):
            return float(hardware.lines), "line-cycles"
        if track.startswith("decoder "):
            return float(hardware.decoder_macs), "MACs"
        return 1.0, "cycles"

    def work(self, track: str) -> int:
        """All work of a track."""
        return sum(piece.work for piece in self.slices if piece.track == track)

    def edges(self, bins: int = 64, attention_only: bool = False) -> np.ndarray:
        """Cycles that cut the operations into at most ``bins`` pieces each, int64 ascending."""
        cuts = [np.zeros(1, np.int64)]
        for start, op in operation_starts(self.report):
            if op.cycles and (op.kind == "attention" or not attention_only):
                count = min(bins, op.cycles)
                cuts.append(start + np.arange(count + 1) * op.cycles // count)
        return np.unique(np.concatenate(cuts))

    def work_between(self, track: str, edges: np.ndarray) -> np.ndarray:
        """Work of a track in each bin, float64 [bins]."""
        times, done = self._progress.get(track, (np.zeros(1), np.zeros(1)))
        return np.diff(np.interp(edges, times, done))

    @cached_property
    def _progress(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Track -> (cycles, work done by then), float64."""
        found: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
        for piece in self.slices:
            times, works = found.setdefault(piece.track, ([], []))
            marks = np.array([piece.end]) if piece.marks is None else piece.marks
            times.append(np.append(piece.start, np.maximum(marks, piece.start)))
            works.append(np.append(0.0, np.full(len(marks), piece.work / len(marks))))
        return {
            track: (np.concatenate(times).astype(np.float64), np.cumsum(np.concatenate(works)))
            for track, (times, works) in found.items()
        }


def _rank(track: str) -> int:
    order = (OPERATIONS, DENSER, SPARSER, "MAC lines", "softmax", "vector")
    if track in order:
        return order.index(track)
    return len(order) + track.startswith("DRAM ")


def operation_starts(report: Report) -> Iterator[tuple[int, OpCost]]:
    """(first cycle, operation), one after the other."""
    start = 0
    for op in report.ops:
        yield start, op
        start += op.cycles


def record(
    workload: Workload,
    hardware: Hardware,
    simulator: str = "vitcod",
    batch: int = 1,
    *,
    schedule: Schedule = DEFAULT,
    parameters: Any = None,
) -> Timeline:
    """Simulate, and keep when everything happened. Arguments, errors and the warning are those
    of `simulate`."""
    entry, used = simulator_named(simulator), {"schedule": schedule, "parameters": parameters}
    if not entry.stepped:
        report = simulate(workload, hardware, simulator, batch, **used)
        return Timeline(report, _slices((*at, None) for at in operation_starts(report)))
    empty = simulate(replace(workload, ops=()), hardware, simulator, batch, **used)
    left = without_parts(workload, entry.without)
    start, made = 0, []
    for op, run in operations(left, hardware, empty.schedule, batch):
        made.append((start, op, None if run is None else tuple(_stepped(run))))
        start += op.cycles
    costs = tuple(op for _, op, _ in made)
    report = entry.report(workload, hardware, batch, empty.schedule, parameters, costs)
    warn_of_split(workload, report)
    return Timeline(report, _slices(made))


def _slices(made: Iterable[tuple[int, OpCost, Iterable[Slice] | None]]) -> tuple[Slice, ...]:
    """Of operations (first cycle, cost, slices of its own or None): theirs, in turn."""
    slices: list[Slice] = []
    for start, op, inner in made:
        notes = {"kind": op.kind, "bottleneck": op.bottleneck, **op.phases}
        slices.append(Slice(OPERATIONS, op.name, start, start + op.cycles, op.cycles, notes))
        slices += (piece.moved(start) for piece in (_whole(op) if inner is None else inner))
    return tuple(_in_turn(slices))


def _in_turn(slices: Iterable[Slice]) -> Iterator[Slice]:
    """Slices of a track that share a cycle: the later one begins after the first."""
    ends: dict[str, int] = {}
    for piece in sorted(slices, key=lambda piece: (piece.start, piece.end)):
        start = max(piece.start, ends.get(piece.track, 0))
        end = ends[piece.track] = max(piece.end, start)
        yield (
            piece
            if (start, end) == (piece.start, piece.end)
            else replace(piece, start=start, end=end)
        )


def _whole(op: OpCost) -> Iterator[Slice]:
    """A closed form's resources: how long each works."""
    for name, cycles in op.busy.items():
        if name == "DRAM":
            moved: dict[str, int] = {}
            for row in op.traffic:
                if row.level == "dram":
                    moved[row.tensor] = moved.get(row.tensor, 0) + row.total_bytes
            for tensor, size in moved.items():
                if size:
                    yield Slice(f"DRAM {tensor}", f"{op.name}: {tensor}", 0, cycles, size)
        elif cycles:
            yield Slice(name, op.name, 0, cycles, cycles)


def _stepped(run: AttentionRun) -> Iterator[Slice]:
    """A stepped call: stages, transfers, decoding, softmax."""
    yield from _stages(run)
    yield from _softmax(run)
    yield from _transfers(run)


def _stages(run: AttentionRun) -> Iterator[Slice]:
    """One slice for each engine that has work in a stage, up to its last piece."""
    program, trace = run.program, run.trace
    pieces = program.pieces
    dense = pieces["round"] == DENSE_ROUND
    before = [_sums(np.where(mine, pieces["length"], 0)) for mine in (dense, ~dense)]
    names = _stage_names(run)
    for number, stage in enumerate(program.stages):
        plan, words = int(stage["plan"]), int(stage["words"])
        first, last = program.line_piece[plan, 0], program.line_piece[plan, -1]
        start = int(trace.stage_times[number, 0])
        waits = _three_longest(run, number)
        for column, (track, sums) in enumerate(zip((DENSER, SPARSER), before, strict=True)):
            operands = sums[last] - sums[first]
            if operands:
                end = int(trace.stage_engines[number, column])
                yield Slice(track, names[number], start, end, int(operands) * words, waits)


def _sums(lengths: np.ndarray) -> np.ndarray:
    """Of the first none, one, two, ... of them."""
    return np.concatenate([[0], np.cumsum(lengths)])


def _three_longest(run: AttentionRun, stage: int) -> dict[str, int]:
    """What the lines of a stage waited for longest, in line-cycles, both engines."""
    table = np.zeros((2, run.trace.stage_stalls.shape[1]), dtype=np.int64)
    table[run.program.stages["kind"][stage]] = run.trace.stage_stalls[stage]
    waits = {k: v for k, v in named_stalls(table).items() if k != "busy"}
    longest = sorted(waits, key=lambda name: -waits[name])[:3]
    return {f"line-cycles waiting for {name}": waits[name] for name in longest}


def _unit_names(run: AttentionRun) -> list[str]:
    tiles = len(run.mapping.query_tiles) > 1
    many = run.instances > 1
    return [
        f"head {head}"
        + (f", rows {rows.start}-{rows.stop - 1}" if tiles else "")
        + (f", window {instance}" if many else "")
        for instance, head, rows in run.units
    ]


def _stage_names(run: AttentionRun) -> list[str]:
    units = _unit_names(run)
    kinds = {SDDMM: "SDDMM"}
    return [
        f"{kinds.get(int(kind), 'SpMM')} {units[unit]}"
        for kind, unit in zip(run.program.stages["kind"], run.program.stages["unit"], strict=True)
    ]


def _softmax(run: AttentionRun) -> Iterator[Slice]:
    """The division pass, one slice a unit: rows go through it one after the other."""
    program, lanes = run.program, run.hardware.softmax_lanes
    took = -(-program.row_scores // lanes)
    done = run.trace.row_ready - run.hardware.softmax_latency_cycles
    for unit, name in enumerate(_unit_names(run)):
        rows = slice(*program.unit_row[unit : unit + 2])
        real = program.row_scores[rows] > 0
        if real.any():
            ends, busy = done[rows][real], took[rows][real]
            start, end = int((ends - busy).min()), int(ends.max())
            yield Slice("softmax", name, start, end, int(busy.sum()), {"rows": int(real.sum())})


def _transfers(run: AttentionRun) -> Iterator[Slice]:
    """Transfers of each channel, and the chunks of Q and K that the decoder makes. What is on
    chip from the beginning has no slice."""
    program, times, units = run.program, run.trace.transfer_times, _unit_names(run)
    stage_units = program.stages["unit"]
    for channel, tensor in CHANNELS.items():
        first, last = program.channel_first[channel : channel + 2]
        for number in range(first, last):
            transfer, (start, end) = program.transfers[number], times[number].tolist()
            size = int(transfer["bytes"])
            stored = channel == STORE
            unit = number - first if stored else stage_units[transfer["need"] % len(stage_units)]
            name = f"{tensor} {'of' if stored else 'for'} {units[int(unit)]}"
            marks = run.trace.landed_at[channel, _tokens(transfer)] if channel < INDEX else None
            if size:
                yield Slice(f"DRAM {tensor}", name, start, end, size, {"bytes": size}, marks)
            if run.mapping.decode_macs and channel in (Q, K):
                yield _decoding(run, channel, number, tensor, name)


def _decoding(run: AttentionRun, channel: int, number: int, tensor: str, name: str) -> Slice:
    """The tokens of one chunk in the decoder."""
    ends = run.trace.decoded_at[channel, _tokens(run.program.transfers[number])]
    one = -(-run.mapping.decode_macs // run.mapping.decoder_rate)
    start, work = max(int(ends[0]) - one, 0), len(ends) * run.mapping.decode_macs
    notes = {"tokens": len(ends)}
    return Slice(f"decoder {tensor}", name, start, int(ends[-1]), work, notes, ends)


def _tokens(transfer: np.void) -> slice:
    """Tokens of a transfer of Q, K or V, counted through its channel."""
    first = int(transfer["token"])
    return slice(first, first + int(transfer["tokens"]))
