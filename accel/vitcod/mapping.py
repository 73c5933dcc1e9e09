"""How one attention call is cut up so that it fits the buffers.

A pass is (a group of heads) x (a tile of queries), and inside it keys may come in tiles too.
Without a codec a group is one head. With one, decoding a head needs every latent head of its
block: heads of one group are decoded in one pass over the latents, and the latents are
loaded again for each further group of the block.

`mapper` enumerates the mappings that fit, ranked by the closed forms of `estimate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ...workload import Attention
from ..encodings import ENCODINGS, Widths
from ..hardware import Hardware
from ..schedule import Schedule
from .pattern import Pattern


@dataclass(frozen=True, eq=False)
class Mapping:
    """Tiles and groups of one attention call, and the sizes that follow from them.

    The call, the machine and its schedule travel inside it.

    ahead            scores of the next unit are computed before the values of this one
    output_regions   accumulators of how many units fit: 2 = a store runs beside the next
    whole_queries    all queries of a group are resident, tiles only limit the scores
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

    @property
    def key_words(self) -> int:
        """Words of a query or key: cycles of one score."""
        return -(-self.op.key_dim // self.hardware.macs_per_line)

    @property
    def value_words(self) -> int:
        """Words of a value row: cycles of one kept entry in SpMM."""
        return -(-self.op.value_dim // self.hardware.macs_per_line)

    @cached_property
    def _widths(self) -> Widths:
        most = max(len(pattern.columns[1]) for pattern in self.patterns)
        encoding = ENCODINGS[self.schedule.index_encoding]
        return encoding(self.op.queries, self.op.keys, most)

    @property
    def entry_bytes(self) -> int:
        """An index entry, by the schedule's encoding."""
        return self._widths.entry_bytes

    @property
    def pointer_bytes(self) -> int:
        """A column or row pointer, by the entries that it may count."""
        return self._widths.pointer_bytes

    @property
    def start_bytes(self) -> int:
        """Where a sparser vector begins: a pointer; under "balanced" also which vector it is,
        since lines do not take them in order."""
        named = self.schedule.assignment == "balanced"
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
        hardware, room = self.hardware, self.group * padded_bytes(self.op.key_dim, self.hardware)
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


def _tiles(total: int, size: int) -> tuple[slice, ...]:
    return tuple(slice(i, min(i + size, total)) for i in range(0, total, size))


def padded_bytes(dim: int, hardware: Hardware) -> int:
    """Bytes of a vector in a buffer: whole words."""
    return -(-dim // hardware.macs_per_line) * hardware.word_bytes
