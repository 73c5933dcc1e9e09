"""The best run of an attention call: mappings are stepped, and the schedule's objective decides.

The closed forms of `estimate` say which mappings are worth stepping; what they cost is counted.
Where many lines meet at few banks more of a resource may be worse: rows cut into more pieces
drain more often, and lines that all have their data lose the step in which one read serves many.
There more mappings are stepped, and the best also with less of the machine used, so that the
larger machine is not the slower one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...workload import Attention
from ..hardware import Hardware, schedule_of
from ..report.energy import energy_pj
from ..schedule import DEFAULT, SPLITS, Schedule
from .coded import with_index_held
from .core.registers import BANK, BUSY, DRAIN, INDEX_PORT, KEY_REGISTER
from .cost import cost_of
from .mapper import fitting
from .mapping import Mapping
from .stepped import (
    WAITS,
    AttentionRun,
    head_costs,
    named_phases,
    named_stalls,
    run_mapping,
)

__all__ = [
    "WAITS",
    "AttentionRun",
    "head_costs",
    "named_phases",
    "named_stalls",
    "run_attention",
    "run_mapping",
    "value_of",
]

CROWDED = 0.3
"""Share of the line-cycles. On the networks and machines of the documentation it is less."""

MORE_MAPPINGS = 6

PARTS = ("lines", "q_banks", "k_banks", "v_banks", "dram_bytes_per_s")
"""Of the machine, what may be left unused in part."""


def run_attention(
    op: Attention,
    hardware: Hardware,
    batch: int = 1,
    schedule: Schedule = DEFAULT,
    on_chip_bytes: int = 0,
) -> AttentionRun:
    """Map, build and run one attention call, all its windows and images.

    Of ``schedule.mappings_stepped`` mappings, the first by the closed forms, and of some more
    where ports are crowded, the one with the least `value_of`; of the splits of its lines that
    ``schedule`` allows likewise. ``on_chip_bytes`` of Q, K and V may be on chip from the
    projection on. Raises ValueError where no mapping fits the machine's buffers.
    """
    instances = op.windows * batch
    schedule = schedule_of(hardware, schedule)
    found = fitting(op, hardware, schedule, instances, on_chip_bytes)
    best = _best(_apart(found), schedule.mappings_stepped, min(instances, 2))
    if schedule.sparser_percent == "best":
        best = min([best, *_other_splits(best)], key=value_of)
    return best if best.instances == instances else run_mapping(best.mapping, instances)


def _run(mapping: Mapping, instances: int) -> AttentionRun:
    return run_mapping(with_index_held(mapping, instances), instances)


def _other_splits(run: AttentionRun) -> Iterator[AttentionRun]:
    """The same mapping with the lines split otherwise, where both engines have work."""
    if any(p.num_global and len(p.columns[1]) for p in run.mapping.patterns):
        for percent in SPLITS[1:]:
            schedule = replace(run.mapping.schedule, sparser_percent=percent)
            yield _run(replace(run.mapping, schedule=schedule), run.instances)


def _apart(mappings: Sequence[Mapping]) -> list[Mapping]:
    """Those of which none is cut as one before it is."""
    made: dict[tuple[int, int, int, bool], Mapping] = {}
    for one in mappings:
        cut = (one.group, one.query_tile, one.key_tile, one.resident_latents)
        made.setdefault(cut, one)
    return list(made.values())


def _best(mappings: Sequence[Mapping], count: int, instances: int) -> AttentionRun:
    """The best run of the first ``count`` mappings; where lines wait for ports much in the first
    or in the best of them, of `MORE_MAPPINGS` more, and of these two with less of the machine
    used."""
    runs = [_run(made, instances) for made in mappings[:count]]
    best = min(runs, key=value_of)
    if _crowded(runs[0]) or _crowded(best):
        more = mappings[count : count + MORE_MAPPINGS]
        best = min([best, *(_run(made, instances) for made in more)], key=value_of)
        starts = [best] if best is runs[0] else [best, runs[0]]
        best = min((_less_used(run, instances) for run in starts), key=value_of)
    return best


def _crowded(run: AttentionRun) -> bool:
    """Whether lines wait for banks and for the port of the index more than `CROWDED` of the
    time: the closed forms know little of that."""
    stalls = run.trace.stage_stalls.sum(axis=0)
    return int(stalls[[BANK, KEY_REGISTER, INDEX_PORT, DRAIN]].sum()) > CROWDED * stalls.sum()


def _less_used(best: AttentionRun, instances: int) -> AttentionRun:
    """``best``, or what is better: its mapping with half of the lines, of the banks of a buffer
    or of the bandwidth left unused, again and again."""
    for field in PARTS:
        used = getattr(best.mapping.hardware, field) // 2
        while used and not (field == "lines" and _busy_cycles(best, used) >= best.cycles):
            if field == "dram_bytes_per_s" and best.hardware.dram_model != "flat":
                break  # its channels are there or not
            less = _run(best.mapping.using(**{field: used}), instances)
            if value_of(less) >= value_of(best):
                break
            best, used = less, used // 2
    return best


def _busy_cycles(run: AttentionRun, lines: int) -> int:
    """What so many lines take at least for the operands that the lines of ``run`` took."""
    return int(run.trace.stage_stalls[:, BUSY].sum()) // lines


def value_of(run: AttentionRun) -> tuple[float, int]:
    """What the schedule's objective counts of ``run``, less is better; of equals, cycles."""
    objective, cycles = run.mapping.schedule.objective, run.cycles
    if objective == "cycles":
        return cycles, cycles
    cost = cost_of(run, run.instances)
    if objective == "bytes":
        return cost.dram_bytes, cycles
    energy = energy_pj(cost, run.hardware)
    return (energy if objective == "energy" else energy * cycles), cycles
