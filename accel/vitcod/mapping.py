"""How one attention call is cut up so that it fits the buffers.

A pass is (a group of heads) x (a tile of queries), and inside it keys may come in tiles too.
Without a codec a group is one head. With one, decoding a head needs every latent head of its
block: heads of one group are decoded in one pass over the latents, and the latents are
loaded again for each further group of the block.

`mapper` enumerates the mappings that fit, ranked by the closed forms of `estimate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from ...workload import Attention
from ..encodings import ENCODINGS, Widths
from ..encodings.stream import bits_below
from ..hardware import Hardware
from ..schedule import Schedule
from .pattern import Pattern, UnitWork, of_rows
from .regions import NOTHING, Cut, Kept


@dataclass(frozen=True, eq=False)
class Mapping:
    """Tiles and groups of one attention call, and the sizes that follow from them.

    The call, the machine and its schedule travel inside it.

    ahead            scores of the next unit are computed before the values of this one
    output_regions   accumulators of how many units fit: 2 = a store runs beside the next
    whole_queries    all queries of a group are resident, tiles only limit the scores
    cut              of the buffers
    kept             what is in them when the call begins
    resident_latents all latents of a codec block stay on chip, heads are decoded from there
    index_held       IdxBuf keeps the index of a head for all windows and images, which then
                     come one after the other for each head (or codec block)
    hardware         what of the machine is used: fewer lines or banks than it has, or less of
                     its bandwidth, where that is faster
    machine          all of it; None: ``hardware``
    repeated         more than one instance (window of an image) runs, one behind the other
    token_bytes      of one token of a group of Q or K in DRAM (latents, with a codec)
    """

    op: Attention
    hardware: Hardware
    schedule: Schedule
    patterns: tuple[Pattern, ...]
    group: int
    query_tile: int
    key_tile: int
    whole_queries: bool
    ahead: bool
    output_regions: int
    cut: Cut
    kept: Kept = NOTHING
    resident_latents: bool = False
    index_held: bool = False
    machine: Hardware | None = None
    repeated: bool = False

    @property
    def whole(self) -> Hardware:
        """The machine, what of it is not used included."""
        return self.machine or self.hardware

    @property
    def idle_lines(self) -> int:
        """MAC lines that get no work."""
        return self.whole.lines - self.hardware.lines

    def using(self, **part: int) -> Mapping:
        """The mapping with so much of its machine used."""
        return replace(self, hardware=replace(self.hardware, **part), machine=self.whole)

    @property
    def key_words(self) -> int:
        """Words of a query or key: cycles of one score."""
        return -(-self.op.key_dim // self.hardware.macs_per_line)

    @property
    def value_words(self) -> int:
        """Words of a value row: cycles of one kept entry in SpMM."""
        return -(-self.op.value_dim // self.hardware.macs_per_line)

    @property
    def one_stream(self) -> bool:
        """Whether SpMM takes its keys from the lists that SDDMM writes."""
        return self.schedule.index_streams == 1

    @cached_property
    def most_entries(self) -> int:
        """Of the sparser part of a head."""
        return max(len(pattern.columns[1]) for pattern in self.patterns)

    @property
    def named_starts(self) -> bool:
        """Whether a start says which vector it is: under "balanced" lines do not take them in
        order."""
        return self.schedule.assignment == "balanced"

    @cached_property
    def widths(self) -> Widths:
        """Bounds of the schedule's encoding for tiles of this size."""
        encoding = ENCODINGS[self.schedule.index_encoding]
        tile = self.op.queries, self.op.keys
        if encoding.tiled:
            tile = self.query_tile, self.key_tile
        return encoding.bounds(max(tile), max(tile), self.most_entries, self.named_starts)

    @cached_property
    def row_bits(self) -> int:
        """Of the length of a row's list, which goes over the tiles of keys."""
        encoding, keys = ENCODINGS[self.schedule.index_encoding], self.op.keys
        return encoding.bounds(keys, keys, self.most_entries, self.named_starts).row_bits

    @property
    def key_bits(self) -> int:
        """Of the key that a score carries in the list of its row: its number among the sparser
        keys of a tile."""
        keys = min(self.key_tile, max(len(p.columns[0]) - 1 for p in self.patterns))
        return bits_below(keys) if self.one_stream else 0

    @property
    def address_bytes(self) -> int:
        """Of a score's place in the score buffer, where an index entry says it."""
        return 0 if self.one_stream else (2 if self.most_entries <= 256**2 else 4)

    @property
    def units_in_flight(self) -> int:
        """Units, 2 at most, that follow each other: of one instance, or of two."""
        units = self.op.heads * len(self.query_tiles)
        return 2 if units > 1 or self.repeated else 1

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
        """MACs that the decoder does in a cycle: no more than what it makes can be written,
        and than the latents it takes can be read where they stay on chip."""
        hardware, rate = self.hardware, self.hardware.decoder_macs
        if self.resident_latents:
            latents = self.latent_heads * padded_bytes(self.op.key_dim, hardware)
            port = hardware.latent_banks * hardware.word_bytes
            rate = min(rate, max(self.decode_macs * port // latents, 1))
        room = self.group * padded_bytes(self.op.key_dim, hardware)
        port = min(hardware.q_banks, hardware.k_banks) * hardware.word_bytes
        return min(rate, max(self.decode_macs * port // room, 1))

    @property
    def latent_room_bytes(self) -> int:
        """Of a latent token in the scratchpad: whole words."""
        return self.latent_heads * padded_bytes(self.op.key_dim, self.hardware)

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
        return self.least_latent_bytes + self.bias_bytes <= self.cut.rest

    @property
    def least_latent_bytes(self) -> int:
        """Of the rest, what codec weights and latents must have: a token of Q and of K that waits
        for the decoder, or all tokens of a block."""
        if self.op.codec is None:
            return 0
        if self.resident_latents:
            return self.codec_bytes + (self.op.queries + self.op.keys) * self.latent_room_bytes
        return self.codec_bytes + 2 * self.token_bytes

    @property
    def latent_space_bytes(self) -> int:
        """Of the rest, what codec weights and bias leave to latents."""
        bias = self.bias_bytes if self.bias_stays else self.pass_bias_bytes
        return self.cut.rest - self.codec_bytes - bias

    @property
    def staging_tokens(self) -> int:
        """Latent tokens of Q (of K) that may wait for the decoder."""
        if not self.op.codec or self.resident_latents:
            return 0
        return self.latent_space_bytes // (2 * self.token_bytes)

    @cached_property
    def key_tiles(self) -> tuple[slice, ...]:
        return _tiles(self.op.keys, self.key_tile)

    @cached_property
    def query_tiles(self) -> tuple[slice, ...]:
        return _tiles(self.op.queries, self.query_tile)

    @property
    def used_keys(self) -> bool:
        """Whether each unit has keys of its own: those that its queries keep."""
        if self.fetched_again or self.op.masks is None or self.schedule.key_loads == "all":
            return False
        return len(self.query_tiles) > 1 and self.key_tile < self.op.keys

    @property
    def fetched_again(self) -> bool:
        """Whether queries come again for each tile of keys."""
        return self.schedule.query_loads == "per_key_tile" and self.op.codec is None

    @cached_property
    def _works(self) -> dict[tuple[int, int], UnitWork]:
        return {}

    def work_of(self, head: int, rows: slice) -> UnitWork:
        """What a unit does."""
        if not self.used_keys:
            return UnitWork(self.patterns[head], rows, None)
        name = head, rows.start
        if name not in self._works:
            self._works[name] = of_rows(self.patterns[head], rows)
        return self._works[name]

    def tiles_of(self, head: int, rows: slice) -> tuple[slice, ...]:
        """The tiles of keys of a unit, counted among the keys that it has."""
        keys = self.work_of(head, rows).keys
        return self.key_tiles if keys is None else _tiles(len(keys), self.key_tile)

    @property
    def outer_heads(self) -> int:
        """Heads whose index is held together: of a pass, or of a block of resident latents."""
        if self.resident_latents and self.op.codec:
            return self.op.heads // self.op.codec.groups
        return self.group

    def units(self, instances: int) -> Iterator[tuple[int, int, slice]]:
        """(instance, head, rows) in the order of execution."""
        heads, outer = range(0, self.op.heads, self.group), self.outer_heads
        passes = [(i, first) for i in range(instances) for first in heads]
        if self.index_held:
            passes.sort(key=lambda made: (made[1] // outer, made[0], made[1]))
        for instance, first in passes:
            group = range(first, first + self.group)
            if self.whole_queries:
                yield from ((instance, h, rows) for h in group for rows in self.query_tiles)
            else:
                yield from ((instance, h, rows) for rows in self.query_tiles for h in group)

    def reload(self, unit: tuple[int, int, slice]) -> tuple[int, ...]:
        """Part of a chunk's name: with several key tiles each unit loads its own."""
        return (unit[1], unit[2].start) if len(self.key_tiles) > 1 else ()

    def unit_index_bytes(self, head: int, rows: slice) -> int:
        """What a unit holds in IdxBuf from its first stage to its last: a bit for each entry
        of its dense block, and how long the list of each row is."""
        pattern, count = self.patterns[head], rows.stop - rows.start
        bitmap = -(-count * pattern.num_global // 8) if pattern.masked else 0
        listed = self.one_stream and len(pattern.columns[1]) > 0
        return bitmap + (-(-count * self.row_bits // 8) if listed else 0)


def codec_side_bytes(op: Attention, hardware: Hardware, *, decoder: bool) -> int:
    """Weights (operand width) and biases (accumulator width) of one decoder or encoder."""
    codec = op.codec
    if codec is None:
        return 0
    weights = codec.heads * codec.latent_heads // codec.groups
    biases = codec.heads if decoder else codec.latent_heads
    return weights * hardware.operand_bytes + biases * hardware.accumulator_bytes


def _tiles(total: int, size: int) -> tuple[slice, ...]:
    return tuple(slice(i, min(i + size, total)) for i in range(0, total, size))


def padded_bytes(dim: int, hardware: Hardware) -> int:
    """Bytes of a vector in a buffer: whole words."""
    return -(-dim // hardware.macs_per_line) * hardware.word_bytes
