"""How one attention call is cut up so that it fits the buffers.

A pass is (a group of heads) x (a tile of queries), and inside it keys may come in tiles too.
Without a codec a group is one head. With one, decoding a head needs every latent head of its
block: heads of one group are decoded in one pass over the latents, and the latents are
loaded again for each further group of the block.

`candidates` enumerates what fits, ranked by the closed forms of `estimate`; `choose` takes
the first, `stepped.step` runs the first few and takes the fastest. The estimate only ranks;
cycles come from the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

from ..workload import Attention
from .ddr4 import LINE_BYTES
from .estimate import WorkOfTiles, ranked
from .hardware import Hardware
from .pattern import Pattern, patterns_of
from .remembered import Remembered

TILE_PARTS = (1, 2, 3)
"""Tiles of queries that are tried for each one that the buffers ask for."""


WORK = Remembered(64 * 1024**2)
"""What tiles ask for, by the patterns of a call and the lines."""


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
    def bias_bytes(self) -> int:
        """The learned bias of the scores, all heads, as wide as scores."""
        return self.op.bias_params * self.hardware.score_bytes

    @property
    def pass_bias_bytes(self) -> int:
        """... of the heads of one pass."""
        return -(-self.bias_bytes * self.group // self.op.heads)

    @property
    def bias_stays(self) -> bool:
        """The bias of all heads is loaded once and kept; else each pass loads its own."""
        latents = 2 * self.token_bytes + self.codec_bytes if self.op.codec else 0
        return latents + self.bias_bytes <= self.hardware.other_buffer_bytes

    @property
    def staging_tokens(self) -> int:
        """Latent tokens of Q (of K) that may wait for the decoder."""
        if not self.op.codec:
            return 0
        bias = self.bias_bytes if self.bias_stays else self.pass_bias_bytes
        left = self.hardware.other_buffer_bytes - self.codec_bytes - bias
        return left // (2 * self.token_bytes)

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
    """The mapping of ``op`` that the closed forms put first; raises as `fitting`."""
    return fitting(op, hardware)[0]


def fitting(op: Attention, hardware: Hardware) -> list[Mapping]:
    """`candidates`, at least one.

    Raises ValueError where a buffer cannot hold even one query's pass: which, and how much
    it would need.
    """
    made = candidates(op, hardware)
    if not made:
        raise ValueError(_refusal(op, hardware, patterns_of(op)))
    return made


def candidates(op: Attention, hardware: Hardware) -> list[Mapping]:
    """Mappings that fit the buffers, the most promising first.

    For each group of heads, order of stages and number of output regions: the fewest query
    tiles that fit, and a few more, which overlap more finely.
    """
    patterns = patterns_of(op)
    work = _work(op, patterns, hardware.lines)
    made: list[Mapping] = []
    for group in _groups(op):
        for ahead in (True, False):
            given = Mapping(op, hardware, patterns, group, 1, 1, True, ahead, 2)
            made += _tilings(given, work)
    return ranked(made, work)


def _work(op: Attention, patterns: tuple[Pattern, ...], lines: int) -> WorkOfTiles:
    """Kept for all machines that have these patterns and lines."""
    digests = tuple(pattern.digest for pattern in patterns)
    made = partial(WorkOfTiles, op, patterns, lines)
    if not all(digests):
        return made()
    kept_alive = sum(pattern.held_bytes for pattern in patterns)
    return WORK.get((digests, lines), made, lambda work: kept_alive)


def _groups(op: Attention) -> list[int]:
    """Heads that may be decoded together: divisors of the heads of a codec block."""
    block = op.heads // op.codec.groups if op.codec else 1
    return [group for group in range(1, block + 1) if block % group == 0]


def _tilings(given: Mapping, work: WorkOfTiles) -> list[Mapping]:
    """``given`` with the largest query tile that fits, and with parts of it: two output
    regions, and one where that makes the tile larger."""
    op, residences = given.op, (True, False)
    if given.group > 1 and not work.in_order:
        residences = (True,)  # a tile of queries is not the same tokens for all its heads
    key_tile = _key_tile(op, given.hardware, given.group)
    if key_tile == 0 or (given.group > 1 and key_tile < op.keys):
        return []
    made: dict[tuple[int, bool], Mapping] = {}
    for regions in (2, 1):
        largest = replace(given, key_tile=key_tile, output_regions=regions)
        largest = _largest_tile(largest, residences, work)
        for parts in TILE_PARTS if largest else ():
            size = -(-op.queries // (len(largest.query_tiles) * parts))
            for whole in residences:
                tried = replace(largest, query_tile=size, whole_queries=whole)
                same = (size, whole or size == op.queries)
                if same not in made and not _shortages(tried, work):
                    made[same] = tried
    return list(made.values())


def _largest_tile(
    given: Mapping, residences: tuple[bool, ...], work: WorkOfTiles
) -> Mapping | None:
    """The fewest query tiles that fit, or None."""
    tiles, queries = 1, given.op.queries
    while True:
        tile = -(-queries // tiles)
        for whole in residences:
            made = replace(given, query_tile=tile, whole_queries=whole)
            if not _shortages(made, work):
                return made
        if tile == 1:
            return None
        tiles = -(-queries // (tile - 1))


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


def _shortages(mapping: Mapping, work: WorkOfTiles) -> list[tuple[str, int]]:
    """(field of the hardware, bytes needed) of each buffer that the mapping overflows."""
    op, hardware = mapping.op, mapping.hardware
    units = op.heads * -(-op.queries // mapping.query_tile)
    alive = 2 if mapping.ahead and units > 1 else 1
    regions = min(mapping.output_regions, units)
    accumulators = mapping.query_tile * mapping.value_words * hardware.macs_per_line
    scores, bitmap = work.most(mapping.query_tile)
    starts = max(mapping.query_tile, mapping.key_tile) + hardware.lines
    row = mapping.key_words * hardware.word_bytes
    latents = 2 * mapping.token_bytes + mapping.codec_bytes if op.codec else 0
    burst = LINE_BYTES if hardware.dram_model == "ddr4" else 0  # enters IdxBuf whole
    needs = {
        "q_buffer_bytes": mapping.group * _resident_queries(mapping) * row,
        "k_buffer_bytes": mapping.group * mapping.key_tile * row,
        "v_buffer_bytes": mapping.key_tile * mapping.value_words * hardware.word_bytes,
        "index_buffer_bytes": alive * bitmap
        + starts * mapping.start_bytes
        + max(hardware.lines * mapping.entry_bytes, burst),
        "output_buffer_bytes": alive * scores * hardware.score_bytes
        + regions * accumulators * hardware.accumulator_bytes,
        "other_buffer_bytes": latents + (0 if mapping.bias_stays else mapping.pass_bias_bytes),
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
        for name, need in _shortages(least, WorkOfTiles(op, patterns, hardware.lines))
    )
    return f"{op.name} does not fit the machine {hardware.name!r}: {short}"


def _tiles(total: int, size: int) -> tuple[slice, ...]:
    return tuple(slice(i, min(i + size, total)) for i in range(0, total, size))


def _padded(dim: int, hardware: Hardware) -> int:
    """Bytes of a vector in a buffer: whole words."""
    return -(-dim // hardware.macs_per_line) * hardware.word_bytes


def _unsigned_bytes(values: int) -> int:
    """Bytes of an unsigned number below ``values``: 1, 2 or 4."""
    return 1 if values <= 256 else 2 if values <= 256**2 else 4
