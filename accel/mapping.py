"""How one attention call is cut up so that it fits the buffers.

A pass is (a group of heads) x (a tile of queries), and inside it keys may come in tiles too.
Without a codec a group is one head. With one, decoding a head needs every latent head of its
block: heads of one group are decoded in one pass over the latents, and the latents are
loaded again for each further group of the block.

`candidates` enumerates what fits and puts first, of those whose estimated time is within
2 % of the least, the one that loads the fewest bytes; `choose` takes that one. Estimated
time: the largest of DRAM, decoder and line cycles, and a little for each stage. The
estimate only ranks; cycles come from the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from ..workload import Attention, PolarizedMask
from .hardware import Hardware
from .remembered import Remembered

STAGE_OVERHEAD_CYCLES = 32
"""Ranking only: what starting and draining one more stage costs, about."""

TOLERANCE = 1.02
"""Ranking only: estimates this close to the best count as equal."""


PATTERNS = Remembered(64 * 1024**2)
"""By the digest of the mask."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """One head's work: a dense block of global keys, the rest compressed both ways.

    columns, rows  (indptr, indices) of the sparser part, keys counted after the global ones
    row_scores     int64 [queries], scores computed in each row
    masked         a bitmap says which entries of the dense block are kept
    digest         names the content, so that what is made of it can be kept; "": it is not
    """

    num_global: int
    columns: tuple[np.ndarray, np.ndarray]
    rows: tuple[np.ndarray, np.ndarray]
    row_scores: np.ndarray
    masked: bool
    digest: str = ""

    @classmethod
    def dense(cls, queries: int, keys: int) -> Pattern:
        """Nothing pruned: every key is global and no bitmap is needed."""
        none = _frozen(np.zeros(0))
        return cls(
            keys,
            (_frozen(np.zeros(1)), none),
            (_frozen(np.zeros(queries + 1)), none),
            np.full(queries, keys, dtype=np.int64),
            masked=False,
            digest=f"dense {queries} x {keys}",
        )

    @classmethod
    def of(cls, mask: PolarizedMask) -> Pattern:
        """The work of a polarized mask."""
        indptr, columns = mask.rows
        scores = mask.num_global + np.diff(indptr)
        whole = bool(mask.global_keep.all())
        return cls(
            mask.num_global,
            (mask.indptr, mask.indices),
            (_frozen(indptr), _frozen(columns)),
            scores.astype(np.int64),
            masked=not whole,
            digest=mask.digest,
        )

    @property
    def held_bytes(self) -> int:
        """Of its arrays."""
        arrays = (*self.columns, *self.rows, self.row_scores)
        return sum(array.nbytes for array in arrays)


@dataclass(frozen=True, eq=False)
class Mapping:
    """Tiles and groups of one attention call, and the sizes that follow from them.

    ahead            scores of the next unit are computed before the values of this one
    output_regions   accumulators of how many units fit: 2 = a store runs beside the next
    whole_queries    all queries of a group are resident, tiles only limit the scores
    token_bytes      of one token of a group of Q or K in DRAM (latents, with a codec)
    """

    op: Attention
    hardware: Hardware
    patterns: tuple[Pattern, ...]
    group: int
    query_tile: int
    key_tile: int
    whole_queries: bool
    ahead: bool
    output_regions: int

    @property
    def key_words(self) -> int:
        """Words of a query or key: cycles of one score."""
        return -(-self.op.key_dim // self.hardware.macs_per_line)

    @property
    def value_words(self) -> int:
        """Words of a value row: cycles of one kept entry in SpMM."""
        return -(-self.op.value_dim // self.hardware.macs_per_line)

    @property
    def entry_bytes(self) -> int:
        """An index entry: 1, 2 or 4 bytes by the number of tokens."""
        return _unsigned_bytes(max(self.op.queries, self.op.keys))

    @property
    def pointer_bytes(self) -> int:
        """A column or row pointer, by the entries that it may count."""
        most = max(len(pattern.columns[1]) for pattern in self.patterns)
        return max(_unsigned_bytes(most + 1), 2)

    @property
    def start_bytes(self) -> int:
        """Where a sparser vector begins: a pointer; under "balanced" also which vector it is,
        since lines do not take them in order."""
        named = self.hardware.assignment == "balanced"
        return self.pointer_bytes + (self.entry_bytes if named else 0)

    @property
    def latent_heads(self) -> int:
        """Latent heads of one codec block (0 without a codec)."""
        codec = self.op.codec
        return codec.latent_heads // codec.groups if codec else 0

    @property
    def token_bytes(self) -> int:
        return (self.latent_heads or self.group) * self.op.key_dim * self.hardware.operand_bytes

    @property
    def decode_macs(self) -> int:
        """MACs that decode one token of a group (0 without a codec)."""
        return self.group * self.latent_heads * self.op.key_dim

    @property
    def decoder_rate(self) -> int:
        """MACs that the decoder does in a cycle: no more than what it makes can be written."""
        hardware, room = self.hardware, self.group * _padded(self.op.key_dim, self.hardware)
        port = min(hardware.q_banks, hardware.k_banks) * hardware.word_bytes
        return min(hardware.decoder_macs, max(self.decode_macs * port // room, 1))

    @property
    def codec_bytes(self) -> int:
        """Weights and biases of both decoders (Q's and K's)."""
        return codec_side_bytes(self.op, self.hardware, decoder=True) * 2

    @property
    def staging_tokens(self) -> int:
        """Latent tokens of Q (of K) that may wait for the decoder."""
        if not self.op.codec:
            return 0
        return (self.hardware.other_buffer_bytes - self.codec_bytes) // (2 * self.token_bytes)

    @cached_property
    def key_tiles(self) -> tuple[slice, ...]:
        return _tiles(self.op.keys, self.key_tile)

    @cached_property
    def query_tiles(self) -> tuple[slice, ...]:
        return _tiles(self.op.queries, self.query_tile)

    def units(self, instances: int) -> Iterator[tuple[int, int, slice]]:
        """(instance, head, rows) in the order of execution."""
        for instance in range(instances):
            for first in range(0, self.op.heads, self.group):
                heads = range(first, first + self.group)
                if self.whole_queries:
                    yield from ((instance, h, rows) for h in heads for rows in self.query_tiles)
                else:
                    yield from ((instance, h, rows) for rows in self.query_tiles for h in heads)

    def reload(self, unit: tuple[int, int, slice]) -> tuple[int, ...]:
        """Part of a chunk's name: with several key tiles each unit loads its own."""
        return (unit[1], unit[2].start) if len(self.key_tiles) > 1 else ()

    def bitmap_bytes(self, head: int, rows: slice) -> int:
        """One bit for each entry of the dense block in these rows."""
        pattern = self.patterns[head]
        if not pattern.masked:
            return 0
        return -(-(rows.stop - rows.start) * pattern.num_global // 8)


def codec_side_bytes(op: Attention, hardware: Hardware, *, decoder: bool) -> int:
    """Weights (operand width) and biases (accumulator width) of one decoder or encoder."""
    codec = op.codec
    if codec is None:
        return 0
    weights = codec.heads * codec.latent_heads // codec.groups
    biases = codec.heads if decoder else codec.latent_heads
    return weights * hardware.operand_bytes + biases * hardware.accumulator_bytes


def choose(op: Attention, hardware: Hardware) -> Mapping:
    """The mapping of ``op`` with the least estimated time.

    Raises ValueError where a buffer cannot hold even one query's pass: which, and how much
    it would need.
    """
    fitting = candidates(op, hardware)
    if not fitting:
        raise ValueError(_refusal(op, hardware, _patterns(op)))
    return fitting[0]


def candidates(op: Attention, hardware: Hardware) -> list[Mapping]:
    """Every mapping that fits the buffers, the most promising first."""
    patterns, fitting = _patterns(op), []
    for group in _groups(op):
        for ahead in (True, False):
            for regions in (2, 1):
                found = _largest_tile(op, hardware, patterns, group, ahead, regions)
                if found is not None:
                    fitting.append(found)
    cycles = {made: estimate_cycles(made) for made in fitting}
    near = TOLERANCE * min(cycles.values(), default=0.0)

    def rank(made: Mapping) -> tuple[float, float]:
        if cycles[made] <= near:
            return (_load_bytes(made), cycles[made])
        return (math.inf, cycles[made])

    return sorted(fitting, key=rank)


def estimate_cycles(mapping: Mapping) -> float:
    """About how long one instance takes: only to rank mappings."""
    op, hardware = mapping.op, mapping.hardware
    groups, queries, keys = op.heads // mapping.group, len(mapping.query_tiles), _key_loads(mapping)
    decode = groups * (op.queries + op.keys * keys) * mapping.decode_macs / hardware.decoder_macs
    scores = sum(int(p.row_scores.sum()) for p in mapping.patterns)
    lines = scores * (mapping.key_words + mapping.value_words) / hardware.lines
    softmax = scores / hardware.softmax_lanes
    if not mapping.ahead:
        lines += softmax
    stages = 2 * op.heads * queries * len(mapping.key_tiles)
    dram = float(_load_bytes(mapping) / hardware.dram_bytes_per_cycle)
    return max(dram, decode, lines, softmax) + STAGE_OVERHEAD_CYCLES * stages


def _key_loads(mapping: Mapping) -> int:
    """How often K is loaded: where it comes in tiles, for each tile of queries."""
    return len(mapping.query_tiles) if len(mapping.key_tiles) > 1 else 1


def _load_bytes(mapping: Mapping) -> int:
    """Q, K and V from DRAM for one instance."""
    op, queries = mapping.op, len(mapping.query_tiles)
    groups, keys = op.heads // mapping.group, _key_loads(mapping)
    again = keys > 1 or (mapping.group > 1 and not mapping.whole_queries)
    values = op.heads * op.keys * op.value_dim * mapping.hardware.operand_bytes
    vectors = groups * mapping.token_bytes * (op.queries + op.keys * keys)
    return vectors + values * (queries if again else 1)


def _patterns(op: Attention) -> tuple[Pattern, ...]:
    if op.masks is None:
        return (Pattern.dense(op.queries, op.keys),) * op.heads
    return tuple(
        PATTERNS.get(mask.digest, partial(Pattern.of, mask), lambda made: made.held_bytes)
        for mask in op.masks
    )


def _groups(op: Attention) -> list[int]:
    """Heads that may be decoded together: divisors of the heads of a codec block."""
    block = op.heads // op.codec.groups if op.codec else 1
    return [group for group in range(1, block + 1) if block % group == 0]


def _largest_tile(
    op: Attention,
    hardware: Hardware,
    patterns: tuple[Pattern, ...],
    group: int,
    ahead: bool,
    regions: int,
) -> Mapping | None:
    """The fewest query tiles that fit, or None."""
    key_tile = _key_tile(op, hardware, group)
    if key_tile == 0 or (group > 1 and key_tile < op.keys):
        return None
    resident = (True, False) if group == 1 or _one_order(op) else (True,)
    tiles = 1
    while True:
        tile = -(-op.queries // tiles)
        for whole in resident:
            made = Mapping(op, hardware, patterns, group, tile, key_tile, whole, ahead, regions)
            if not _shortages(made):
                return made
        if tile == 1:
            return None
        tiles = -(-op.queries // (tile - 1))


def _one_order(op: Attention) -> bool:
    """Whether all heads take their queries in one order: a tile of them is then the same
    tokens for each head that is decoded with it."""
    orders = [mask.query_order for mask in op.masks or ()]
    return all(np.array_equal(order, orders[0]) for order in orders[1:])


def _key_tile(op: Attention, hardware: Hardware, group: int) -> int:
    """Keys of a tile: all where K and V fit, else half a buffer, so that the next one loads
    beside it (a buffer of one key holds that)."""
    key_row = group * _padded(op.key_dim, hardware)
    value_row = _padded(op.value_dim, hardware)
    fit = min(hardware.k_buffer_bytes // key_row, hardware.v_buffer_bytes // value_row)
    if fit >= op.keys:
        return op.keys
    half = min(hardware.k_buffer_bytes // 2 // key_row, hardware.v_buffer_bytes // 2 // value_row)
    if half == 0:
        return fit
    tiles = -(-op.keys // half)
    return -(-op.keys // tiles)


def _shortages(mapping: Mapping) -> list[tuple[str, int]]:
    """(field of the hardware, bytes needed) of each buffer that the mapping overflows."""
    op, hardware = mapping.op, mapping.hardware
    units = op.heads * len(mapping.query_tiles)
    alive = 2 if mapping.ahead and units > 1 else 1
    regions = min(mapping.output_regions, units)
    scores = max(
        int(np.add.reduceat(p.row_scores, [t.start for t in mapping.query_tiles]).max())
        for p in mapping.patterns
    )
    accumulators = mapping.query_tile * mapping.value_words * hardware.macs_per_line
    bitmap = max(mapping.bitmap_bytes(h, t) for h in range(op.heads) for t in mapping.query_tiles)
    starts = max(mapping.query_tile, mapping.key_tile) + hardware.lines
    row = _padded(op.key_dim, hardware)
    latents = 2 * mapping.token_bytes + mapping.codec_bytes if op.codec else 0
    needs = {
        "q_buffer_bytes": mapping.group * _resident_queries(mapping) * row,
        "k_buffer_bytes": mapping.group * mapping.key_tile * row,
        "v_buffer_bytes": mapping.key_tile * _padded(op.value_dim, hardware),
        "index_buffer_bytes": alive * bitmap
        + starts * mapping.start_bytes
        + hardware.lines * mapping.entry_bytes,
        "output_buffer_bytes": alive * scores * hardware.score_bytes
        + regions * accumulators * hardware.accumulator_bytes,
        "other_buffer_bytes": latents,
    }
    return [(name, need) for name, need in needs.items() if need > getattr(hardware, name)]


def _resident_queries(mapping: Mapping) -> int:
    """All of them, or two tiles, so that the next one loads beside the one in work (a buffer
    of one query holds that)."""
    tile, queries = mapping.query_tile, mapping.op.queries
    if mapping.whole_queries:
        return queries
    return min(2 * tile, queries) if tile > 1 else 1


def _refusal(op: Attention, hardware: Hardware, patterns: tuple[Pattern, ...]) -> str:
    key_tile = max(_key_tile(op, hardware, 1), 1)
    least = Mapping(op, hardware, patterns, 1, 1, key_tile, False, False, 1)
    short = "; ".join(
        f"{name} is {getattr(hardware, name)}, one pass needs at least {need}"
        for name, need in _shortages(least)
    )
    return f"{op.name} does not fit the machine {hardware.name!r}: {short}"


def _tiles(total: int, size: int) -> tuple[slice, ...]:
    return tuple(slice(i, min(i + size, total)) for i in range(0, total, size))


def _padded(dim: int, hardware: Hardware) -> int:
    """Bytes of a vector in a buffer: whole words."""
    return -(-dim // hardware.macs_per_line) * hardware.word_bytes


def _frozen(values: np.ndarray) -> np.ndarray:
    array = np.array(values, dtype=np.int64)
    array.setflags(write=False)
    return array


def _unsigned_bytes(values: int) -> int:
    """Bytes of an unsigned number below ``values``: 1, 2 or 4."""
    return next(size for size in (1, 2, 4) if values <= 256**size)
