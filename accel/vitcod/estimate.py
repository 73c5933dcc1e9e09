"""Closed forms that rank the mappings of an attention call: about how long each would take.

They never give a figure of a report: `mapping` orders its candidates by them, and the
engine steps what is taken. On the 12 layers of the DeiT-Tiny mask at 95 %, with and without
codec, on six machines, the first of them took 0.2 to 4.2 % more cycles than the fastest of
all candidates, and the fastest of the first four 0 to 0.8 %
(`Schedule.mappings_stepped`), for three to four times the time to simulate.

Choices that rounding forces: tiles of queries (keys) have equal sizes but for the last, their
number is the least that the buffers allow, or two or three times that; heads of a pass divide
those of a codec block. So one byte more of a buffer changes nothing or removes a tile, and
a machine with more of a resource may take another mapping whose estimate is better and
whose cycles are not: by up to a few percent. The worst known: units are taken as equal, so
where heads differ much a whole head may seem as good a unit as half of one. With twice the
output buffer the third layer of the DeiT-Tiny mask takes 15 % more cycles, the network 1 % at
most; the best three candidates (`mappings_stepped`) hold a faster one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from ...workload import Attention
from .mapping import Mapping
from .pattern import Pattern

BANK_WAITS = 1.3
"""Cycles of a line over the words it takes, about."""

STAGE_OVERHEAD_CYCLES = 48
"""What starting and draining one more stage costs, about."""

TOLERANCE = 1.01
"""Estimates this close to the best count as equal: the fewest bytes then decide."""


class WorkOfTiles:
    """What query tiles of each size ask of buffers and lines, made when first asked for."""

    def __init__(self, op: Attention, patterns: Sequence[Pattern], lines: int) -> None:
        self.op, self.lines = op, lines
        self.dense = np.array([p.num_global for p in patterns])[:, None]  # (heads, 1)
        self.masked = np.array([p.masked for p in patterns])[:, None]
        self.row_scores = np.stack([p.row_scores for p in patterns])  # (heads, queries)
        self._most: dict[int, tuple[int, int]] = {}
        self._cycles: dict[int, tuple[int, int]] = {}

    @cached_property
    def scores(self) -> int:
        """Computed, of all heads."""
        return int(self.row_scores.sum())

    @cached_property
    def in_order(self) -> bool:
        """Whether all heads take their queries in the original order."""
        orders = [mask.query_order for mask in self.op.masks or ()]
        return all(np.array_equal(order, np.arange(order.size)) for order in orders)

    def _units(self, tile: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows [tiles], scores [heads, tiles]) of the units."""
        starts = np.arange(0, self.op.queries, tile)
        rows = np.minimum(tile, self.op.queries - starts)
        return rows, np.add.reduceat(self.row_scores, starts, axis=1)

    def most(self, tile: int) -> tuple[int, int]:
        """(scores, bytes of a bitmap) of the largest unit."""
        if tile not in self._most:
            rows, scores = self._units(tile)
            bitmaps = -(-rows * self.dense // 8) * self.masked
            self._most[tile] = int(scores.max()), int(bitmaps.max())
        return self._most[tile]

    def cycles(self, tile: int) -> tuple[int, int]:
        """Operands that the busiest lines take, summed over the units: SDDMM, SpMM."""
        if tile not in self._cycles:
            rows, scores = self._units(tile)
            entries = scores - rows * self.dense
            shapes = np.broadcast_arrays(self.dense, rows, entries)
            columns = busiest_line(shapes[0], shapes[1], shapes[2], self.lines)
            lines = busiest_line(shapes[1], shapes[0], shapes[2], self.lines)
            self._cycles[tile] = int(columns.sum()), int(lines.sum())
        return self._cycles[tile]


def ranked(mappings: Sequence[Mapping], work: WorkOfTiles) -> list[Mapping]:
    """The most promising first: of those near the least estimate the fewest bytes."""
    cycles = {made: estimate_cycles(made, work) for made in mappings}
    near = TOLERANCE * min(cycles.values(), default=0.0)

    def rank(made: Mapping) -> tuple[float, float]:
        return (_load_bytes(made) if cycles[made] <= near else math.inf, cycles[made])

    return sorted(mappings, key=rank)


def estimate_cycles(mapping: Mapping, work: WorkOfTiles) -> float:
    """About how long one instance takes: only to rank mappings.

    What the lines, the softmax unit and the store of an average unit take, one beside the
    other as far as the mapping lets them; the fill of each pass that no buffer has room to
    hide; no less than all DRAM traffic or all decoding; and a little for each stage.
    """
    op, hardware = mapping.op, mapping.hardware
    units = op.heads * len(mapping.query_tiles)
    columns, rows = work.cycles(mapping.query_tile)
    scores = BANK_WAITS * columns * mapping.key_words
    values = BANK_WAITS * rows * mapping.value_words
    softmax = work.scores / hardware.softmax_lanes
    rate = float(hardware.dram_stream_bytes_per_cycle)
    store = op.heads * op.queries * op.value_dim * hardware.operand_bytes / rate
    scores, values, softmax, store = (x / units for x in (scores, values, softmax, store))
    if mapping.ahead:  # softmax runs beside the values before and the scores after
        unit, tail = max(scores + values, softmax), max(softmax - values, 0.0)
    else:
        unit, tail = scores + softmax + values, 0.0
    if mapping.output_regions == 1:
        unit += store
    fill = max(_fill_cycles(mapping) - scores, 0.0)
    fills = 1 if _loads_ahead(mapping) else op.heads // mapping.group
    stages = STAGE_OVERHEAD_CYCLES * 2 * units * len(mapping.key_tiles)
    decode = _tokens(mapping) * mapping.decode_macs / hardware.decoder_macs
    body = units * unit + fills * fill + stages
    return max(body, _load_bytes(mapping) / rate + store * units, decode) + tail + store


def busiest_line(
    vectors: np.ndarray, operands: np.ndarray, entries: np.ndarray, lines: int
) -> np.ndarray:
    """Operands of the busiest line, the split in proportion to the work; see `assign`."""
    work = vectors * operands
    if lines == 1:
        return work + entries
    share = np.rint(lines * work / np.maximum(work + entries, 1)).astype(np.int64)
    denser = np.clip(share, (work > 0).astype(np.int64), lines - (entries > 0))
    full, rest = np.divmod(vectors, np.maximum(denser, 1))
    sharing = np.where(rest > 0, np.maximum(denser, 1) // np.maximum(rest, 1), 1)
    block = full * operands + np.where(rest > 0, -(-operands // sharing), 0)
    return np.maximum(np.where(work > 0, block, 0), -(-entries // np.maximum(lines - denser, 1)))


def _fill_cycles(mapping: Mapping) -> float:
    """To load and decode what the first stage of a pass needs."""
    op, hardware = mapping.op, mapping.hardware
    tokens = mapping.key_tile + (op.queries if mapping.whole_queries else mapping.query_tile)
    load = tokens * mapping.token_bytes / float(hardware.dram_stream_bytes_per_cycle)
    return max(load, tokens * mapping.decode_macs / hardware.decoder_macs)


def _loads_ahead(mapping: Mapping) -> bool:
    """Whether the next pass (or tile of keys) fills its buffers beside the one in work."""
    op, hardware = mapping.op, mapping.hardware
    row = mapping.group * mapping.key_words * hardware.word_bytes
    queries = op.queries if mapping.whole_queries else mapping.query_tile
    return (
        2 * mapping.key_tile * row <= hardware.k_buffer_bytes
        and 2 * queries * row <= hardware.q_buffer_bytes
    )


def _tokens(mapping: Mapping) -> int:
    """Tokens of Q and K that are loaded (and decoded) for one instance."""
    groups = mapping.op.heads // mapping.group
    return groups * (mapping.op.queries + mapping.op.keys * _key_loads(mapping))


def _key_loads(mapping: Mapping) -> int:
    """How often K is loaded: where it comes in tiles, for each tile of queries."""
    return len(mapping.query_tiles) if len(mapping.key_tiles) > 1 else 1


def _load_bytes(mapping: Mapping) -> int:
    """Q, K and V from DRAM for one instance."""
    op, queries = mapping.op, len(mapping.query_tiles)
    again = _key_loads(mapping) > 1 or (mapping.group > 1 and not mapping.whole_queries)
    values = op.heads * op.keys * op.value_dim * mapping.hardware.operand_bytes
    vectors = mapping.token_bytes * _tokens(mapping)
    return vectors + values * (queries if again else 1)
