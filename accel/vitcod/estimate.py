"""Closed forms that rank the mappings of an attention call: about how long each would take.

They never give a figure of a report: `mapping` orders its candidates by them, and the
engine steps what is taken. On the 12 layers of the DeiT-Tiny mask at 95 %, with and without
codec, on six machines, the first of them took 0.1 to 6.0 % more cycles than the fastest of
all candidates, the faster of the first two, which are stepped by default, 1.9 % at most, and
the fastest of the first four 0.4 % (`Schedule.mappings_stepped`).

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
from typing import NamedTuple

import numpy as np

from ...workload import Attention
from ..hardware import Hardware
from ..report.energy import PROFILES, leakage_mw
from .mapping import Mapping
from .pattern import Pattern
from .scratchpad import chunk_bytes, loaded_again

BANK_WAITS = 1.3
"""Cycles of a line over the words it takes, about, where there are banks enough."""

SHARED_READS = 0.7
"""Of the operands of the sparser engine, about so many are reads of their own: the others are
shared with a line that asks for the same word in that cycle."""

STAGE_OVERHEAD_CYCLES = 48
"""What starting and draining one more stage costs, about."""

TOLERANCE = 1.01
"""Estimates this close to the best count as equal: the fewest bytes then decide."""


class WorkOfTiles:
    """What query tiles of each size ask of buffers and lines, made when first asked for."""

    def __init__(self, op: Attention, patterns: Sequence[Pattern], lines: int) -> None:
        self.op, self.patterns, self.lines = op, patterns, lines
        self.dense = np.array([p.num_global for p in patterns])[:, None]  # (heads, 1)
        self.masked = np.array([p.masked for p in patterns])[:, None]
        self.row_scores = np.stack([p.row_scores for p in patterns])  # (heads, queries)
        self._used: dict[int, np.ndarray] = {}
        self._most: dict[int, tuple[int, int, int]] = {}
        self._cycles: dict[int, tuple[int, int]] = {}
        self._ports: dict[int, Ports] = {}

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

    def most(self, tile: int) -> tuple[int, int, int]:
        """(scores, bytes of a bitmap, scores of the sparser part) of the largest unit."""
        if tile not in self._most:
            rows, scores = self._units(tile)
            bitmaps = -(-rows * self.dense // 8) * self.masked
            entries = scores - rows * self.dense
            self._most[tile] = int(scores.max()), int(bitmaps.max()), int(entries.max())
        return self._most[tile]

    def used(self, tile: int) -> np.ndarray:
        """Keys that each unit uses, int64 [heads, tiles]: the global ones and those that one of
        its queries keeps."""
        if tile not in self._used:
            self._used[tile] = np.stack([_used(pattern, tile) for pattern in self.patterns])
        return self._used[tile]

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

    def ports(self, tile: int) -> Ports:
        """What the banks are asked for, summed over the units."""
        if tile not in self._ports:
            rows, scores = self._units(tile)
            dense, rows, entries = np.broadcast_arrays(self.dense, rows, scores - rows * self.dense)
            columns = np.minimum(self.op.keys - dense, entries)
            shared = SHARED_READS * int(entries.sum())
            self._ports[tile] = Ports(
                shared + block_reads(dense, rows, entries, self.lines),
                int((dense + columns).sum()),
                shared + block_reads(rows, dense, entries, self.lines),
                int(np.maximum(rows, np.minimum(self.lines, rows * dense + entries)).sum()),
                int(entries.sum()),
            )
        return self._ports[tile]


class Ports(NamedTuple):
    """Reads of queries, keys and values (vectors), rows that drain, and entries of an index."""

    queries: float
    keys: int
    values: float
    drains: int
    entries: int


def _used(pattern: Pattern, tile: int) -> np.ndarray:
    """Keys that each tile of so many queries uses, int64 [tiles]."""
    indptr, keys = pattern.rows
    tiles, count = -(-(len(indptr) - 1) // tile), len(pattern.columns[0]) - 1
    met = np.zeros((tiles, count), dtype=bool)
    met[np.repeat(np.arange(len(indptr) - 1) // tile, np.diff(indptr)), keys] = True
    return np.maximum(met.sum(axis=1) + pattern.num_global, 1)


def ranked(mappings: Sequence[Mapping], work: WorkOfTiles) -> list[Mapping]:
    """The most promising first, by the objective of their schedule; of those near the least
    estimate the fewest bytes."""
    if not mappings:
        return []
    prices = Prices.of(mappings[0].hardware)
    costs = {made: _cost(made, work, prices) for made in mappings}
    near = TOLERANCE * min(costs.values())

    def rank(made: Mapping) -> tuple[float, float]:
        return (load_bytes(made, work) if costs[made] <= near else math.inf, costs[made])

    return sorted(mappings, key=rank)


def _cost(mapping: Mapping, work: WorkOfTiles, prices: Prices) -> float:
    """Of one instance, in what the schedule's objective counts."""
    objective = mapping.schedule.objective
    if objective == "bytes":
        return load_bytes(mapping, work) + 1.0
    cycles = estimate_cycles(mapping, work)
    if objective == "cycles":
        return cycles
    energy = estimate_pj(mapping, work, prices, cycles)
    return energy if objective == "energy" else energy * cycles


class Prices(NamedTuple):
    """Picojoules of a MAC, a byte of DRAM, a byte that lines read, and a cycle (leakage)."""

    mac: float
    dram: float
    read: float
    cycle: float

    @classmethod
    def of(cls, hardware: Hardware) -> Prices:
        """Under the profile "aladdin-28nm"."""
        profile = PROFILES["aladdin-28nm"]
        return cls(
            profile.mac_pj,
            8 * profile.dram_pj_per_bit,
            profile.sram_read_pj(hardware.q_buffer_bytes),
            leakage_mw(hardware, profile) * hardware.seconds(1) * 1e9,
        )


def estimate_pj(mapping: Mapping, work: WorkOfTiles, prices: Prices, cycles: float) -> float:
    """About what one instance takes: only to rank mappings. Not the scores, the softmax unit
    and the index, which are the same for all mappings of a call."""
    op, hardware = mapping.op, mapping.hardware
    macs = work.scores * (op.key_dim + op.value_dim) + _tokens(mapping, work) * mapping.decode_macs
    stored = op.heads * op.queries * op.value_dim * hardware.operand_bytes
    reads = work.scores * (mapping.key_words + mapping.value_words) * hardware.word_bytes
    dram = load_bytes(mapping, work) + stored
    return macs * prices.mac + dram * prices.dram + reads * prices.read + cycles * prices.cycle


def estimate_cycles(mapping: Mapping, work: WorkOfTiles) -> float:
    """About how long one instance takes: only to rank mappings.

    What the lines, the softmax unit and the store of an average unit take, one beside the
    other as far as the mapping lets them; the fill of each pass that no buffer has room to
    hide; no less than all DRAM traffic or all decoding; and a little for each stage.
    """
    op, hardware = mapping.op, mapping.hardware
    units = op.heads * len(mapping.query_tiles)
    scores, values = _line_cycles(mapping, work)
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
    passes = 1 if _loads_ahead(mapping) else op.heads // mapping.group
    fills = max(passes - min(mapping.kept.q, mapping.kept.k), 0)
    stages = STAGE_OVERHEAD_CYCLES * 2 * _tiles(mapping, work)
    decode = _decode_cycles(mapping, _tokens(mapping, work))
    body = units * unit + fills * fill + stages
    index = work.ports(mapping.query_tile).entries * mapping.widths.entry_bits // 8
    loads = (load_bytes(mapping, work) + index * mapping.schedule.index_streams) / rate
    return max(body, loads + store * units, decode) + tail + store


def _line_cycles(mapping: Mapping, work: WorkOfTiles) -> tuple[float, float]:
    """About what the lines take for all scores and for all values: the busiest line's operands,
    and no less than what the banks and the port of the index can serve."""
    hardware, ports = mapping.hardware, work.ports(mapping.query_tile)
    columns, rows = work.cycles(mapping.query_tile)
    scores = max(
        BANK_WAITS * columns * mapping.key_words,
        ports.queries * mapping.key_words / hardware.q_banks,
        ports.keys * mapping.key_words / hardware.k_banks,
        ports.entries / hardware.index_entries_per_cycle,
    )
    listed = 0 if mapping.one_stream else ports.entries
    values = max(
        BANK_WAITS * rows * mapping.value_words,
        ports.values * mapping.value_words / hardware.v_banks,
        ports.drains * mapping.value_words / hardware.output_banks,
        listed / hardware.index_entries_per_cycle,
    )
    return scores, values


def denser_lines(work: np.ndarray, entries: np.ndarray, lines: int) -> np.ndarray:
    """Lines of the denser engine, in proportion to the work; see `assign`."""
    if lines == 1:
        return np.ones_like(work)
    share = np.rint(lines * work / np.maximum(work + entries, 1)).astype(np.int64)
    return np.clip(share, (work > 0).astype(np.int64), lines - (entries > 0))


def busiest_line(
    vectors: np.ndarray, operands: np.ndarray, entries: np.ndarray, lines: int
) -> np.ndarray:
    """Operands of the busiest line."""
    work = vectors * operands
    if lines == 1:
        return work + entries
    denser = denser_lines(work, entries, lines)
    full, rest = np.divmod(vectors, np.maximum(denser, 1))
    sharing = np.where(rest > 0, np.maximum(denser, 1) // np.maximum(rest, 1), 1)
    block = full * operands + np.where(rest > 0, -(-operands // sharing), 0)
    return np.maximum(np.where(work > 0, block, 0), -(-entries // np.maximum(lines - denser, 1)))


def block_reads(vectors: np.ndarray, operands: np.ndarray, entries: np.ndarray, lines: int) -> int:
    """Operands of the dense block that are read: once for all lines in each of its rounds."""
    denser = np.maximum(denser_lines(vectors * operands, entries, lines), 1)
    return int((-(-vectors // denser) * operands).sum())


def _fill_cycles(mapping: Mapping) -> float:
    """To load and decode what the first stage of a pass needs."""
    op, hardware = mapping.op, mapping.hardware
    tokens = mapping.key_tile + (op.queries if mapping.whole_queries else mapping.query_tile)
    load = tokens * mapping.token_bytes / float(hardware.dram_stream_bytes_per_cycle)
    return max(load, _decode_cycles(mapping, tokens))


def _decode_cycles(mapping: Mapping, tokens: int) -> float:
    """Of the decoder for ``tokens`` of Q and K; a machine without one runs no codec."""
    return tokens * mapping.decode_macs / max(mapping.hardware.decoder_macs, 1)


def _loads_ahead(mapping: Mapping) -> bool:
    """Whether the next pass (or tile of keys) fills its buffers beside the one in work."""
    queries, keys, _ = chunk_bytes(mapping)
    return 2 * keys <= mapping.cut.k and 2 * queries <= mapping.cut.q


def _tiles(mapping: Mapping, work: WorkOfTiles) -> int:
    """Tiles of keys of all units."""
    if mapping.used_keys:
        return int((-(-work.used(mapping.query_tile) // mapping.key_tile)).sum())
    return mapping.op.heads * len(mapping.query_tiles) * len(mapping.key_tiles)


def _tokens(mapping: Mapping, work: WorkOfTiles) -> int:
    """Tokens of Q and K that are loaded (and decoded) for one instance."""
    passes = mapping.op.heads // mapping.group
    again = len(mapping.key_tiles) if loaded_again(mapping)[0] else 1
    keys = _keys(mapping, work) if loaded_again(mapping)[1] else passes * mapping.op.keys
    return passes * mapping.op.queries * again + keys


def _keys(mapping: Mapping, work: WorkOfTiles) -> int:
    """Keys that are loaded for one instance, where each unit loads its own."""
    if mapping.used_keys:
        return int(work.used(mapping.query_tile).sum())
    return mapping.op.heads * len(mapping.query_tiles) * mapping.op.keys


def load_bytes(mapping: Mapping, work: WorkOfTiles) -> int:
    """Q, K and V from DRAM for one instance."""
    op, width = mapping.op, mapping.hardware.operand_bytes
    values = _keys(mapping, work) if loaded_again(mapping)[2] else op.heads * op.keys
    if mapping.resident_latents and op.codec:
        vectors = op.codec.groups * (op.queries + op.keys) * mapping.token_bytes
    else:
        vectors = _tokens(mapping, work) * mapping.token_bytes
    return max(vectors + values * op.value_dim * width - sum(kept_bytes(mapping)), 0)


def kept_bytes(mapping: Mapping) -> tuple[int, int, int]:
    """Of Q, K and V, what is on chip when the call begins, as DRAM would hold it."""
    op, kept, size = mapping.op, mapping.kept, mapping.token_bytes
    whole = (slice(0, op.queries),) if mapping.whole_queries else mapping.query_tiles
    queries = _tokens_of(kept.q, whole) + kept.latents * op.queries
    keys = _tokens_of(kept.k, mapping.key_tiles) + kept.latents * op.keys
    value = op.value_dim * mapping.hardware.operand_bytes
    return queries * size, keys * size, _tokens_of(kept.v, mapping.key_tiles) * value


def _tokens_of(chunks: int, tiles: tuple[slice, ...]) -> int:
    """Of the first chunks, tile after tile; the last tile may be smaller."""
    sizes = [tile.stop - tile.start for tile in tiles]
    rounds, rest = divmod(chunks, len(tiles))
    return rounds * sum(sizes) + sum(sizes[:rest])
