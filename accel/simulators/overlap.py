"""What closed forms of attention share: products turned the better way round, units that
follow each other through resources, kept entries by row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...workload import PolarizedMask
from ..hardware import Hardware
from ..products import array_cycles
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


def kept_by_row(mask: PolarizedMask) -> np.ndarray:
    """Kept entries of each query in the original order, int64 [queries]."""
    counts = np.empty(mask.queries, dtype=np.int64)
    counts[mask.query_order] = mask.global_keep.sum(axis=1) + np.diff(mask.rows[0])
    return counts
