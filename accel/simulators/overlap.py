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


def softmax_beyond(
    queries: int, keys: int, heads: int, scores: Layout, values: Layout, hardware: Hardware
) -> int:
    """Cycles of softmax that the two products of ``heads`` do not hide, where it follows scores
    row by row and values follow it.

    The array makes the scores of the next head before the values of this one, softmax runs beside
    it. So either the array is busy throughout and waits for softmax at its last head alone; or
    softmax is, from the first stripe of rows to the last.
    """
    array = heads * (scores.stream_cycles + values.stream_cycles)
    first = _by_then(scores, queries, _stripes(queries, scores.stripe)[0].stop)
    last = values.stream_cycles - _by_then(
        values, queries, _stripes(queries, values.stripe)[-1].start
    )
    softmax = heads * -(-queries * keys // hardware.softmax_lanes)
    throughout = first + softmax + hardware.softmax_latency_cycles + last - array
    return max(throughout, _last_head(queries, keys, scores, values, hardware))


def _last_head(queries: int, keys: int, scores: Layout, values: Layout, hardware: Hardware) -> int:
    """Cycles that the values of the last head wait for softmax, stripe by stripe: softmax takes a
    stripe when its scores are there, values of a stripe begin when softmax is through with its
    rows and all scores are made."""
    ready, through = [], 0  # rows that softmax is through with, and when
    for rows in _stripes(queries, scores.stripe):
        took = -(-len(rows) * keys // hardware.softmax_lanes)
        through = max(through, _by_then(scores, queries, rows.stop)) + took
        ready.append((rows.stop, through + hardware.softmax_latency_cycles))
    end, found = scores.stream_cycles, iter(ready)
    done, when = next(found)
    for rows in _stripes(queries, values.stripe):
        while done < rows.stop:
            done, when = next(found)
        share = _by_then(values, queries, rows.stop) - _by_then(values, queries, rows.start)
        end = max(end, when) + share
    return end - scores.stream_cycles - values.stream_cycles


def _by_then(layout: Layout, rows: int, done: int) -> int:
    """Cycles in which the array makes ``done`` of the ``rows`` of a product."""
    return -(-layout.stream_cycles * done // rows)


def _stripes(rows: int, stripe: int) -> list[range]:
    return [range(first, min(first + stripe, rows)) for first in range(0, rows, stripe)]


def kept_by_row(mask: PolarizedMask) -> np.ndarray:
    """Kept entries of each query in the original order, int64 [queries]."""
    counts = np.empty(mask.queries, dtype=np.int64)
    counts[mask.query_order] = mask.global_keep.sum(axis=1) + np.diff(mask.rows[0])
    return counts
