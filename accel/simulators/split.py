"""Whether the split into global keys and the rest costs time, rather than saves it.

The denser engine computes pruned entries too, and lines are shared out between two engines: on
some masks and machines the sparser engine alone is faster. Closed forms do not tell: within a
few percent both take the same, and it is the waits for banks that decide. So the calls are
stepped without global keys, the longest first; no more than a third of them where these
save nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ...workload import Attention, Op, Workload
from ..cache import LruCache
from ..hardware import Hardware
from ..schedule import Schedule
from ..vitcod.simulate import Calls

TOLERANCE = 1.01
"""A split that takes at most so many times the cycles is not worth a word."""

SAMPLED = 3
"""# choice: one of so many calls is stepped first. Of 96 networks (DeiT-Tiny, -Small and -Base,
DINOv2; 90 and 95 %; 16, 32 and 64 banks; four thresholds), 39 lose more than 1 %, each found."""

STEPPED = LruCache(2**20)
"""Cycles without global keys, by the network, the machine and what it took with them."""


def cycles_unsplit(
    workload: Workload,
    hardware: Hardware,
    schedule: Schedule,
    batch: int,
    split_cycles: Sequence[int],
) -> int | None:
    """Attention cycles of ``workload`` without global keys, where these are so few that the
    ``split_cycles`` (of each attention call, as it is polarized) are more than `TOLERANCE`
    times as many; else None. What is given is exact, stepped call by call; a network whose
    longest calls gain by the split and whose others lose more may go unnoticed."""
    alone = replace(schedule, global_threshold="none")
    content = tuple(map(_content, workload.ops))
    key = (content, hardware, alone, batch, tuple(split_cycles))
    make = partial(_stepped, workload, hardware, alone, batch, split_cycles)
    return STEPPED.get(key, make, lambda made: 64)


def _content(op: Op) -> tuple[Op, tuple[str, ...]]:
    """What the cycles of an operation depend on."""
    if not isinstance(op, Attention) or op.masks is None:
        return op, ()
    return replace(op, masks=None), tuple(mask.digest for mask in op.masks)


def _stepped(
    workload: Workload,
    hardware: Hardware,
    schedule: Schedule,
    batch: int,
    split_cycles: Sequence[int],
) -> int | None:
    calls = Calls(workload.ops, hardware, schedule, batch)
    places = [place for place, op in enumerate(workload.ops) if isinstance(op, Attention)]
    longest = sorted(zip(split_cycles, places, strict=True), reverse=True)

    def cycles(some: Sequence[tuple[int, int]]) -> int:
        return sum(calls.at(place)[0].cycles for _, place in some)

    sample = longest[: -(-len(longest) // SAMPLED)]
    try:
        if cycles(sample) >= sum(split for split, _ in sample):
            return None
        found = cycles(longest)
    except ValueError:  # what fits the buffers with global keys need not fit without
        return None
    return found if found * TOLERANCE < sum(split_cycles) else None
