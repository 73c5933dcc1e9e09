"""From the released script's figure to ours, cause by cause: every rung is a run.

The lower rungs are the script's own formulas (`simulators.released`) with one fault at a
time taken out; those above are the stepped machine (`simulators.vitcod`) by ViTCoD's own
schedule, with one ideal part at a time made real, until nothing but the user's hardware is
left; the last ones go from that schedule to the user's. Cycles of attention, one image. What
a rung shows depends on the rungs below it: a cause that another one hides adds nothing. The
order is a choice, the two ends are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from math import ceil, inf
from typing import Any

import numpy as np

from ..accel.explore.grid import Configuration, configured
from ..accel.hardware import Hardware, apart, presets
from ..accel.report.report import Report
from ..accel.schedule import DEFAULT, Schedule
from ..accel.simulate import simulate_silently
from ..workload import PUBLISHED_GLOBAL_THRESHOLD, Attention, Workload

SHARED = {
    "balanced": "long columns and rows are cut, the longest dealt first",
    "round_robin": "as before",
    "lockstep": "a column at a time over all lines",
}
"""What each policy of `assign` does to the whole columns and rows of the first stepped rung."""

AMPLE = 16
"""An ideal buffer is so many times the real one."""


@dataclass(frozen=True)
class Rung:
    """A run: ``cause`` is what is changed against the rung before it.

    model    "formulas" of the script, the "engine", or the "schedule" of the engine
    changed  the switches (formulas) or fields of `Hardware` and `Schedule` that were set
    """

    cause: str
    model: str
    changed: Mapping[str, Any]
    cycles: int


@dataclass(frozen=True)
class Ladder:
    """Rungs from the released script's figure to the machine's."""

    workload: str
    hardware: str
    rungs: tuple[Rung, ...]

    @property
    def differences(self) -> tuple[int, ...]:
        """Of each rung to the one before it, the first rung's own cycles first: their sum
        is the last rung's."""
        cycles = [0] + [rung.cycles for rung in self.rungs]
        return tuple(after - before for before, after in pairwise(cycles))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        rows = zip(self.rungs, self.differences, strict=True)
        return {
            "workload": self.workload,
            "hardware": self.hardware,
            "rungs": [asdict(rung) | {"difference": step} for rung, step in rows],
        }


@dataclass(frozen=True)
class Script:
    """The released formulas with their faults as switches; the defaults are the script.

    layers_overlap      loads of a layer hide behind the computing of any other
    whole_transfers     every token's transfer is rounded up to whole cycles
    gibibytes           76.8 GB/s is read as GiB
    free_bytes          index and output never cross the DRAM
    first_head          head 0 stands for all heads of its layer; else the slowest does
    square_array        lines x lines MACs; else lines x MACs a line
    decode_on_lines     a token takes a whole cycle of the lines to decode; else a decoder of
                        its own does it beside them
    lines_by_head       every head has its share of each line; else heads follow each other
    """

    layers_overlap: bool = True
    whole_transfers: bool = True
    gibibytes: bool = True
    free_bytes: bool = True
    first_head: bool = True
    square_array: bool = True
    decode_on_lines: bool = True
    lines_by_head: bool = True

    def cycles(self, workload: Workload, hardware: Hardware, moved: Mapping[str, int]) -> int:
        """Attention of the network. ``moved``: its bytes of index and output by op name."""
        layers = [self._layer(op, hardware, moved[op.name]) for op in workload.attention]
        if self.layers_overlap:
            return ceil(max(map(sum, zip(*layers, strict=True))))
        return ceil(sum(map(max, layers)))

    def _layer(self, op: Attention, hardware: Hardware, moved: int) -> tuple[float, float, float]:
        """(loading, lines, decoder): what runs beside each other."""
        computing, decoding = self._computing(op, hardware), self._decoding(op, hardware)
        loading = self._loading(op, hardware, 0 if self.free_bytes else moved)
        if self.decode_on_lines:
            return loading, computing + decoding, 0.0
        return loading, computing, decoding

    def _loading(self, op: Attention, hardware: Hardware, moved: int) -> float:
        giga = 2**30 if self.gibibytes else 10**9
        rate = hardware.dram_bytes_per_s / 1e9 * giga / hardware.clock_hz
        rounded = ceil if self.whole_transfers else float
        ratio = op.codec.ratio if op.codec else 1.0
        weights = (2 + (op.keys > _columns(op, 0)[0])) * rounded(op.heads * ratio * op.heads / rate)
        tokens = 2 * op.queries * rounded(op.heads * ratio * op.key_dim / rate)
        values = op.queries * rounded(op.heads * op.key_dim / rate)
        return tokens + values + weights + moved / rate

    def _decoding(self, op: Attention, hardware: Hardware) -> float:
        if self.decode_on_lines:
            ratio = op.codec.ratio if op.codec else 1.0
            lanes = int(self._macs(hardware) / op.heads)
            return 2 * op.queries * ceil(op.heads * ratio * op.key_dim / lanes)
        vectors = op.queries + op.keys
        return op.codec.macs(vectors, op.key_dim) / hardware.decoder_macs if op.codec else 0.0

    def _macs(self, hardware: Hardware) -> int:
        height = hardware.lines if self.square_array else hardware.macs_per_line
        return hardware.lines * height

    def _computing(self, op: Attention, hardware: Hardware) -> float:
        heads = range(1) if self.first_head else range(op.heads)
        shares = op.heads if self.lines_by_head else 1
        times = [self._head(op, head, hardware, shares) for head in heads]
        if self.lines_by_head:
            return max(times)
        return sum(times) * (op.heads if self.first_head else 1)

    def _head(self, op: Attention, head: int, hardware: Hardware, shares: int) -> float:
        """SDDMM and SpMM of a head on 1 / shares of every line."""
        columns, sparse = _columns(op, head)
        dense, dim, lines = columns * op.queries, op.key_dim, hardware.lines
        if not dense + sparse:
            return 0
        height = self._macs(hardware) // lines
        step = ceil(dim / (height / shares))
        denser = int(lines * (dense / (sparse + dense)))
        sparser = lines - denser
        scores = max(
            columns * _over(op.queries, denser) * step if columns else 0,
            _over(sparse, sparser) * step,
        )
        values = max(
            _over(dense * dim, int(denser * height / shares)),
            _over(sparse * dim, int(sparser * height / shares)),
        )
        return scores + values


def _over(work: int, lanes: int) -> float:
    """Whole cycles of ``work`` on ``lanes``; none for no work, as the script would crash."""
    if not work:
        return 0
    return ceil(work / lanes) if lanes else inf


def _columns(op: Attention, head: int) -> tuple[int, int]:
    """Columns that more than 50 queries keep, and the kept entries of the others."""
    if op.masks is None:
        raise ValueError(f"the script's rules need masks, {op.name} has none")
    kept = op.masks[head].dense().sum(axis=0)
    is_global = kept > PUBLISHED_GLOBAL_THRESHOLD
    return int(is_global.sum()), int(np.sum(kept[~is_global]))


FAULTS: tuple[tuple[str, dict[str, bool]], ...] = (
    ("each layer waits for its own loads", {"layers_overlap": False}),
    ("transfers rounded up once, not token by token", {"whole_transfers": False}),
    ("76.8 GB/s in decimal, not GiB", {"gibibytes": False}),
    ("index and output cross the DRAM too", {"free_bytes": False}),
    ("every head has its own mask, the slowest gates", {"first_head": False}),
    ("lines x MACs a line, not lines x lines", {"square_array": False}),
    ("a decoder of its own, by its MACs", {"decode_on_lines": False}),
    ("heads one after another on whole lines", {"lines_by_head": False}),
)
"""Switches of `Script`, in the order of the rungs."""


def _ideals(hardware: Hardware, policy: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    """(cause, the ideal values of its fields), in the order in which they are made real."""

    def words(buffer_bytes: int, row_bytes: int) -> int:
        return AMPLE * buffer_bytes // row_bytes + 1  # every word in a bank of its own

    word, row = hardware.word_bytes, hardware.macs_per_line * hardware.accumulator_bytes
    buffers = [item.name for item in fields(hardware) if item.name.endswith("_buffer_bytes")]
    return (
        (f"{policy}: {SHARED[policy]}", {"assignment": "round_robin"}),
        (
            "buffers are banked",
            {
                "q_banks": words(hardware.q_buffer_bytes, word),
                "k_banks": words(hardware.k_buffer_bytes, word),
                "v_banks": words(hardware.v_buffer_bytes, word),
                "output_banks": words(hardware.output_buffer_bytes, row),
            },
        ),
        (
            "buffers have their size: passes",
            {name: AMPLE * getattr(hardware, name) for name in buffers},
        ),
        (
            "the index port gives so many entries a cycle",
            {"index_entries_per_cycle": AMPLE * hardware.lines * hardware.macs_per_line},
        ),
        (
            "softmax takes time",
            {"softmax_lanes": 2**20, "softmax_latency_cycles": 0},
        ),
        ("the decoder has its MACs", {"decoder_macs": 2**20}),
        ("the DRAM answers after its latency", {"dram_latency_cycles": 0}),
        (
            "pipeline and reconfiguration take cycles",
            {"pipeline_cycles": 0, "reconfigure_cycles": 0},
        ),
        *_memory(hardware),
    )


def _memory(hardware: Hardware) -> tuple[tuple[str, dict[str, Any]], ...]:
    if hardware.dram_model == "flat":
        return ()
    return (("the DRAM has banks, rows and refresh", {"dram_model": "flat"}),)


def climb(
    workload: Workload,
    hardware: Hardware = presets["vitcod"],
    *,
    schedule: Schedule = DEFAULT,
) -> Ladder:
    """The ladder for ``workload``: masks needed, codec as it has it.

    The first rung is `simulate(workload, hardware, "released")`'s attention, the last one
    `simulate(workload, hardware)`'s. Raises ValueError where the released script would not
    run the masks, naming what it divides by.
    """
    start = Configuration(*apart(hardware, schedule))
    attention = replace(workload, ops=workload.attention)
    first = simulate_silently(attention, hardware, "released").attention_cycles
    rungs = [Rung("the released script", "formulas", {}, first)]
    rungs += _fault_rungs(attention, hardware, _bytes_beside(attention, start))
    rungs += _engine_rungs(workload, start)
    return Ladder(workload.name, hardware.name, tuple(rungs))


def _fault_rungs(
    attention: Workload, hardware: Hardware, moved: Mapping[str, int]
) -> Iterator[Rung]:
    script = Script()
    for cause, switches in FAULTS:
        script = replace(script, **switches)
        cycles = script.cycles(attention, hardware, moved)
        yield Rung(cause, "formulas", switches, cycles)


STEPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("the mask's own rule makes keys global", ("global_threshold",)),
    ("queries stay for all keys of their head", ("query_loads",)),
    ("one index for both products, in 8 bits", ("index_streams", "index_encoding")),
    ("one scratchpad, cut for each call", ("scratchpad",)),
    ("keys and index loaded where they are used", ("key_loads", "index_loads")),
    ("latents decoded where that is best", ("latents",)),
    ("lines split by the time an entry takes", ("assignment", "sparser_percent")),
    ("the mapper's objective and candidates", ("objective", "mappings_stepped", "mapping")),
    ("heads that fit stay on chip after the projection", ("on_chip",)),
)
"""From ViTCoD's own schedule to another, in the order of the rungs: fields of `Schedule`."""

BESIDE = ("dense_dataflow", "dense_orientation", "dense_fill", "vector_fusion")
"""Policies of the products beside attention, as the ladder's schedule has them from the start."""


def _published(schedule: Schedule) -> Schedule:
    """ViTCoD's own schedule of attention."""
    return replace(Schedule.published(), **{name: getattr(schedule, name) for name in BESIDE})


def _engine_rungs(workload: Workload, start: Configuration) -> Iterator[Rung]:
    """First the machine by ViTCoD's own schedule, then the schedule of ``start``."""
    own = _published(start.schedule)
    ideals = _ideals(start.hardware, own.assignment)
    ideal = {k: v for _, part in ideals for k, v in part.items()}
    given = {**vars(start.hardware), **vars(own)}
    cycles = _attention_cycles(workload, configured(start.hardware, ideal, own))
    yield Rung("stepped: whole columns and rows on lines, all else ideal", "engine", {}, cycles)
    for cause, part in ideals:
        real = {name: given[name] for name in part}
        ideal = {name: value for name, value in ideal.items() if name not in part}
        machine = configured(start.hardware, ideal, own)
        yield Rung(cause, "engine", real, _attention_cycles(workload, machine))
    for cause, names in STEPS:
        taken = {name: getattr(start.schedule, name) for name in names}
        changed = {k: v for k, v in taken.items() if v != getattr(own, k)}
        if changed:
            own = replace(own, **changed)
            cycles = _attention_cycles(workload, Configuration(start.hardware, own))
            yield Rung(cause, "schedule", changed, cycles)


def _attention_cycles(workload: Workload, machine: Configuration) -> int:
    return simulate_silently(workload, machine.hardware, schedule=machine.schedule).attention_cycles


def _bytes_beside(attention: Workload, machine: Configuration) -> dict[str, int]:
    """Bytes of index and output that the machine moves, by operation."""
    report: Report = simulate_silently(attention, machine.hardware, schedule=machine.schedule)
    return {
        op.name: sum(
            row.total_bytes
            for row in op.traffic
            if row.level == "dram" and row.tensor in ("index", "output")
        )
        for op in report.attention
    }
