"""What closed forms of attention share: products turned the better way round, units that
follow each other through resources, kept entries by row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...workload import PolarizedMask
from ..hardware import Hardware
from ..products import Layout, array_cycles
from ..schedule import DEFAULT, Schedule


def product_cycles(m: int, n: int, k: int, hardware: Hardware, schedule: Schedule = DEFAULT) -> int:
    """Of [m, k] x [k, n] or its transpose, whichever the array finishes first."""
    if m == 0:
        return 0
    return min(array_cycles(*sides, k, hardware, schedule) for sides in ((m, n), (n, m)))


def pipelined(
    array: Mapping[str, int], exposed: Mapping[str, int], busy: Mapping[str, int]
) -> dict[str, int]:
    """Phases of units that follow each other through resources: the array's own, what is
    exposed at both ends, and what the busiest resource takes beyond the array."""
    phases = {name: cycles for name, cycles in {**array, **exposed}.items() if cycles}
    longest = max(busy, key=lambda resource: busy[resource])
    beyond = busy[longest] - sum(array.values())
    if beyond > 0:
        phases[f"{longest} beyond MAC lines"] = beyond
    return phases


WALKED_HEADS = 4
"""Heads of a call that are walked through; each further one takes as long as the last of them."""


def softmax_beyond(
    queries: int, keys: int, heads: int, scores: Layout, values: Layout, hardware: Hardware
) -> int:
    """Cycles of softmax that the two products of ``heads`` do not hide, where it follows scores
    row by row and values follow it.

    The array makes the scores of the next head before the values of this one. Softmax takes a
    stripe of rows when its scores are there; the values of a stripe begin when softmax is through
    with its rows. No less than what softmax takes from the first stripe to the last.
    """
    walk = _Walk(queries, keys, scores, values, hardware)
    few = min(heads, WALKED_HEADS)
    took = walk.cycles(few)
    if heads > few:
        took += (heads - few) * (took - walk.cycles(few - 1))
    softmax = heads * walk.softmax_cycles + hardware.softmax_latency_cycles
    throughout = walk.scored[0][1] + softmax + walk.valued[-1][1]
    array = heads * (scores.stream_cycles + values.stream_cycles)
    return max(took, throughout) - array


class _Walk:
    """Heads through the array and the softmax unit, stripe by stripe.

    scored, softmaxed, valued  (first row behind a stripe, its cycles) of a head's three stages
    """

    def __init__(
        self, queries: int, keys: int, scores: Layout, values: Layout, hardware: Hardware
    ) -> None:
        lanes = hardware.softmax_lanes
        self.latency = hardware.softmax_latency_cycles
        self.scored = _stripes(queries, scores.stripe, scores.stream_cycles)
        self.valued = _stripes(queries, values.stripe, values.stream_cycles)
        self.softmax_cycles = -(-queries * keys // lanes)
        self.softmaxed = _stripes(queries, scores.stripe, self.softmax_cycles)

    def cycles(self, heads: int) -> int:
        """From the first scores of the first head to the last values of the last."""
        free, softmax_free, waiting = 0, 0, []
        for head in range(heads + 1):
            if head < heads:
                free, softmax_free, ends = self._scores(free, softmax_free)
                waiting.append(ends)
            if head > 0:
                free = self._values(free, waiting.pop(0))
        return free

    def _scores(self, start: int, softmax_free: int) -> tuple[int, int, list[int]]:
        """(when the array is free, when softmax is, when it is through with each stripe)."""
        ends = []
        for (_, made), (_, took) in zip(self.scored, self.softmaxed, strict=True):
            start += made
            softmax_free = max(softmax_free, start) + took
            ends.append(softmax_free + self.latency)
        return start, softmax_free, ends

    def _values(self, start: int, ends: list[int]) -> int:
        """When the values are made, of rows whose stripes softmax is through with at ``ends``."""
        stripes = zip(self.scored, ends, strict=True)
        done, ready = 0, 0
        for rows, made in self.valued:
            while done < rows:
                (done, _), ready = next(stripes)
            start = max(start, ready) + made
        return start


def _stripes(rows: int, stripe: int, cycles: int) -> list[tuple[int, int]]:
    """(first row behind it, its share of ``cycles``) of each stripe of ``rows``."""
    ends = [*range(stripe, rows, stripe), rows]
    starts = [0, *ends[:-1]]
    by_then = [-(-cycles * end // rows) for end in (*starts, rows)]
    return [(end, by_then[i + 1] - by_then[i]) for i, end in enumerate(ends)]


def kept_by_row(mask: PolarizedMask) -> np.ndarray:
    """Kept entries of each query in the original order, int64 [queries]."""
    counts = np.empty(mask.queries, dtype=np.int64)
    counts[mask.query_order] = mask.global_keep.sum(axis=1) + np.diff(mask.rows[0])
    return counts
