"""What closed forms of attention share: layouts of its products, units that follow each other
through resources, softmax between two products, kept entries by row and by key. Bytes and
cycles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from ...workload import PolarizedMask
from ..hardware import Hardware
from ..products import Layout, layouts
from ..products.array import NEAR, Array
from ..report.report import Traffic
from ..schedule import Schedule


def pipelined(
    array: Mapping[str, int], waits: Mapping[str, int], busy: Mapping[str, int], load: int = 0
) -> dict[str, int]:
    """Phases of units that follow each other through resources: the array's own, what it waits
    for between and behind them, and what the busiest resource takes beyond both; all of it
    behind the first ``load``."""
    phases = {name: cycles for name, cycles in {**array, "load": load, **waits}.items() if cycles}
    longest = max(busy, key=lambda resource: busy[resource])
    beyond = busy[longest] - sum(array.values()) - sum(waits.values())
    if beyond > 0:
        phases[f"{longest} beyond MAC lines"] = beyond
    return phases


def first_load(
    loads: Mapping[str, int], heads: int, kept: Mapping[str, int], hardware: Hardware
) -> int:
    """Cycles until the first of ``heads`` is there: of what is loaded by tensor, tensors of which
    no head is ``kept`` on chip."""
    size = sum(loaded for name, loaded in loads.items() if not kept[name]) // heads
    if not size:
        return 0
    return hardware.dram_cycles(size) + hardware.dram_latency_cycles


def query_tiles(name: str, queries: int, keys: int, hardware: Hardware) -> int:
    """Tiles of ``queries`` whose scores fit the output buffer, two tiles at a time. Raises
    ValueError, naming the call, where one row of scores does not."""
    row = 2 * keys * hardware.score_bytes
    if row > hardware.output_buffer_bytes:
        raise ValueError(
            f"{name}: one row of {keys} scores takes {row} bytes twice, "
            f"output_buffer_bytes is {hardware.output_buffer_bytes}"
        )
    return -(-queries // (hardware.output_buffer_bytes // row))


def summed_bytes(products: Iterable[tuple[int, Layout]], hardware: Hardware) -> tuple[int, int]:
    """Bytes of the partial sums of (how often, layout): written to the output buffer and read
    from it again, and of them what it does not hold."""
    size = hardware.accumulator_bytes
    room = hardware.output_buffer_bytes // size
    made = [(n * one.partial_sums, n * one.spilled_sums(room)) for n, one in products]
    return size * sum(sums for sums, _ in made), size * sum(spilled for _, spilled in made)


def sum_traffic(summed: int, spilled: int) -> tuple[Traffic, ...]:
    """Of `summed_bytes`."""
    rows = [Traffic("partial sums", "dram", spilled, spilled)] if spilled else []
    if summed:
        rows.append(Traffic("partial sums", "buffer", summed + spilled, summed + spilled))
    return tuple(rows)


def candidates(
    m: int, n: int, k: int, hardware: Hardware, schedule: Schedule, count: int
) -> tuple[Layout, ...]:
    """Layouts of ``count`` products [m, k] x [k, n] among which the best one is, whatever waits
    for their rows or splits K: none of them has another beside it with no more cycles, skew at
    the end, rows a stripe, bytes and parts of K. The fastest first."""
    return _candidates(m, n, k, count, Array.of(hardware, schedule))


@lru_cache(maxsize=1024)
def _candidates(m: int, n: int, k: int, count: int, array: Array) -> tuple[Layout, ...]:
    def merits(one: Layout) -> tuple[int, int, int, int, int]:
        moved = one.buffer_bytes(array)
        return one.cycles(count), one.end_cycles, one.stripe, moved, one.parts

    found: list[Layout] = []
    for one in sorted(layouts(m, n, k, array), key=merits):
        own = merits(one)
        if not any(all(a <= b for a, b in zip(merits(o), own, strict=True)) for o in found):
            found.append(one)
    return tuple(found)


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
    return max(took, throughout, array) - array


def softmax_behind(queries: int, keys: int, heads: int, scores: Layout, hardware: Hardware) -> int:
    """Cycles of softmax that the scores of ``heads`` alone do not hide: it takes a stripe of rows
    when its scores are there, and all of them before anything else begins."""
    stripe, took = min(scores.stripe, queries), -(-queries * keys // hardware.softmax_lanes)
    first, last = (-(-cycles * stripe // queries) for cycles in (scores.stream_cycles, took))
    array = heads * scores.stream_cycles
    return max(first + heads * took, array + last) - array + hardware.softmax_latency_cycles


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


def least(
    tried: Iterable[Layout],
    cycles: Callable[[Layout], int],
    hardware: Hardware,
    schedule: Schedule,
) -> Layout:
    """Of ``tried`` the layout that takes the fewest ``cycles``; of those near that (`NEAR`) the one
    that moves the fewest bytes of the buffers."""
    array, took = Array.of(hardware, schedule), {one: cycles(one) for one in tried}
    near = NEAR * min(took.values())
    some = (one for one in took if took[one] <= near)
    return min(some, key=lambda one: (one.buffer_bytes(array), took[one]))


class Pair(NamedTuple):
    """Layouts of scores and of values, and the cycles of softmax that they do not hide."""

    scores: Layout
    values: Layout
    beyond: int


@dataclass(frozen=True)
class Sizes:
    """Scores [queries, score_steps] x [score_steps, keys] and values [queries, keys] x [keys,
    value_dim] of ``heads``, softmax between them."""

    queries: int
    keys: int
    score_steps: int
    value_dim: int
    heads: int


Waits = Callable[[Layout, Layout], int]
"""Cycles that scores and values in these layouts wait for something else."""


@lru_cache(maxsize=1024)
def attention_pair(sizes: Sizes, hardware: Hardware, schedule: Schedule) -> Pair:
    """Scores and values laid out so that the two products and the softmax between them take the
    least time together; of what is near that (`NEAR`), the fewest bytes of the buffers."""
    return waiting_pair(sizes, hardware, schedule, lambda scores, values: 0)


def waiting_pair(sizes: Sizes, hardware: Hardware, schedule: Schedule, waits: Waits) -> Pair:
    """As `attention_pair`, for products that have ``waits`` besides."""
    heads, array = sizes.heads, Array.of(hardware, schedule)
    how = hardware, schedule, heads
    first = candidates(sizes.queries, sizes.keys, sizes.score_steps, *how)
    second = candidates(sizes.queries, sizes.value_dim, sizes.keys, *how)
    pairs = sorted(product(first, second), key=lambda pair: _array(pair, heads))
    found: list[tuple[int, int, Pair]] = []
    for scores, values in pairs:
        made = _array((scores, values), heads)
        if found and made > NEAR * min(cycles for cycles, _, _ in found):
            break
        beyond = softmax_beyond(sizes.queries, sizes.keys, heads, scores, values, hardware)
        moved = scores.buffer_bytes(array) + values.buffer_bytes(array)
        took = made + beyond + waits(scores, values)
        found.append((took, moved, Pair(scores, values, beyond)))
    least = NEAR * min(cycles for cycles, _, _ in found)
    return min((one for one in found if one[0] <= least), key=lambda one: one[1::-1])[2]


def _array(pair: tuple[Layout, Layout], heads: int) -> int:
    return sum(one.cycles(heads) for one in pair)


def kept_by_row(mask: PolarizedMask) -> np.ndarray:
    """Kept entries of each query in the original order, int64 [queries]."""
    counts = np.empty(mask.queries, dtype=np.int64)
    counts[mask.query_order] = mask.global_keep.sum(axis=1) + np.diff(mask.rows[0])
    return counts


def kept_by_key(mask: PolarizedMask) -> np.ndarray:
    """Kept entries of each key in the original order, int64 [keys]."""
    counts = np.empty(mask.keys, dtype=np.int64)
    counts[mask.key_order] = np.append(mask.global_keep.sum(axis=0), np.diff(mask.indptr))
    return counts
