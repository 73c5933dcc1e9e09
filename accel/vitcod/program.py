"""What the compiled engine runs: one attention call as plain arrays.

`build` walks an attention operation in the order of its mapping and writes down the stages
of the MAC lines (SDDMM or SpMM of one head, query tile and key tile), the pieces of each
line, and the transfers between DRAM and the buffers with what each waits for and frees.

Order of the stages: the scores of the next (head, query tile) come before the values of
this one, so that its softmax runs beside them; `Mapping.ahead` says whether the score
buffer has room for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..dram.address import BURST, Span, bursts_of
from ..dram.ddr4 import LINE_BYTES
from .assign import DENSE_ROUND
from .coded import Coded, coded_tile
from .mapping import Mapping
from .pattern import SDDMM, SPMM

Q, K, V, INDEX, CODEC, STORE, LATENT = range(7)
CHANNELS = 7
"""DMA channels: each serves its transfers in order; the DRAM serves the channels. Where
latents are resident they come by a channel of their own, and those of Q and K are served by
the decoder."""

STAGE = np.dtype(
    [
        (name, np.int64)
        for name in (
            "kind",
            "plan",  # the assignment it runs
            "unit",  # (instance, head, rows) it belongs to
            "opens_unit",  # the first of its unit
            "words",  # of an operand
            # Tokens count through the whole DMA channel. A buffer holds a chunk head after
            # head: vector v begins at word (vector_place + v) * words, operands likewise.
            "vector_token",
            "operand_token",
            "vector_place",
            "operand_place",
            "index_bytes",  # of the index channel, that lie before its index stream
            "index_frees",  # bytes of the index buffer that are free after it
            "stores",  # stores that must be done before it
            "reconfigure",  # cycles
        )
    ]
)

TRANSFER = np.dtype(
    [
        (name, np.int64)
        for name in (
            "bytes",  # of DRAM; none for what is on chip from the beginning
            "tokens",
            "room",  # bytes that a chunk of Q, K or V takes in its buffer
            "need",  # first stage that uses it: the DRAM serves the earliest need
            "after",  # stages that must be done before it starts
            "release",  # stages that must be done before its room is free
            "token",  # tokens (bytes) of its channel before it
            "token_bytes",
            "source",  # first latent token that it is decoded from; -1: the DRAM brings it
            "order",  # of `Program.orders`, where the latent of its first token stands
        )
    ]
)


class Program(NamedTuple):
    """Arrays of int64 fields. Pieces and entries are numbered through all plans.

    A *plan* is one assignment; stages of equal heads in several windows share it.
    """

    line_piece: np.ndarray  # (plans, lines + 1)
    line_entry: np.ndarray  # (plans, lines + 1)
    pieces: np.ndarray  # PIECE
    entries: np.ndarray  # ENTRY
    stages: np.ndarray  # STAGE, in the order of execution
    unit_row: np.ndarray  # (units + 1) first of the unit's rows in row_scores
    row_scores: np.ndarray  # scores of each row, all key tiles
    row_lists: np.ndarray  # where the list of each row begins among its unit's
    list_entries: int  # of the largest unit
    orders: np.ndarray  # original token at each place, a head's queries or keys after another
    channel_first: np.ndarray  # (8) first transfer of each channel
    transfers: np.ndarray  # TRANSFER, channel after channel
    channel_burst: np.ndarray  # (8) first burst of each channel; zeros in the flat model
    bursts: np.ndarray  # BURST, transfer after transfer; none in the flat model

    def dram_bytes(self, channel: int) -> int:
        """All bytes that a channel moves."""
        first, last = self.channel_first[channel : channel + 2]
        return int(self.transfers["bytes"][first:last].sum())

    def tokens(self, channel: int) -> int:
        """All tokens that a channel moves, those loaded again counted again."""
        first, last = self.channel_first[channel : channel + 2]
        if first == last:
            return 0
        final = self.transfers[last - 1]
        return int(final["token"] + final["tokens"])


@dataclass(frozen=True)
class Counts:
    """Of all stages of a program, for the traffic table: nothing here depends on time."""

    pieces: int  # of SpMM: partial output rows that drain
    output_rows: int  # rows with at least one piece, summed over units
    scores: int  # computed
    entries: int  # of index streams
    stream_bits: int  # of those entries
    listed: int  # keys that SDDMM writes into lists


class _Builder:
    """Lists that grow while `build` walks the stages; `_arrays` ends it."""

    def __init__(self, mapping: Mapping) -> None:
        self.mapping, self.op, self.hardware = mapping, mapping.op, mapping.hardware
        self.plans: dict[tuple, int] = {}
        self.coded: list[Coded] = []
        self.stages: list[tuple[int, ...]] = []
        self.transfers: list[list[list[int]]] = [[] for _ in range(CHANNELS)]
        self.spans: list[list[Span]] = [[] for _ in range(CHANNELS)]
        self.chunks: dict[int, tuple] = {}
        self.tokens = [0] * CHANNELS
        self.orders: list[np.ndarray] = []
        self.order_places: dict[tuple[int, int], int] = {}
        self.constant_bytes = 0
        self.biased = (-1, -1)
        self.split = (0, 0)
        self.index_bytes = 0
        self.index_places: dict[int, int] = {}
        self.index_end = 0
        self.rows: list[np.ndarray] = []
        self.lists: list[np.ndarray] = []  # of them, those of the sparser part

    def plan(self, head: int, rows: slice, keys: slice, kind: int) -> int:
        """Number of the plan, which is made once for all windows."""
        key = (head, rows.start, keys.start, kind)
        if key not in self.plans:
            self.plans[key] = len(self.coded)
            self.coded.append(coded_tile(self.mapping, head, rows, keys, kind))
        return self.plans[key]

    def chunk(
        self,
        channel: int,
        key: tuple,
        span: Span,
        token_bytes: int,
        room: int,
        source: int = -1,
    ) -> int:
        """First token of chunk ``key`` in its channel; a new one is loaded, or decoded from
        latent ``source`` on, an old one kept."""
        if self.chunks.get(channel) != key:
            self.chunks[channel] = key
            self.spans[channel].append(span)
            stage, tokens, start = len(self.stages), span.stop - span.start, self.tokens[channel]
            self.tokens[channel] += tokens
            here = source >= 0 or len(self.transfers[channel]) < _kept(self.mapping, channel)
            size = 0 if here else tokens * token_bytes
            order = self._order(channel, span.head) + span.start if source >= 0 else 0
            row = [size, tokens, tokens * room, stage, 0, stage + 1, start, token_bytes]
            self.transfers[channel].append([*row, source, order])
        return self._used(channel)

    def _used(self, channel: int) -> int:
        """The stage to come uses the channel's last chunk: its first token."""
        transfer = self.transfers[channel][-1]
        transfer[5] = len(self.stages) + 1
        return transfer[6]

    def _order(self, channel: int, head: int) -> int:
        """Where in ``orders`` the head's queries (keys) begin."""
        if (channel, head) not in self.order_places:
            self.order_places[channel, head] = sum(map(len, self.orders))
            tokens = self.op.queries if channel == Q else self.op.keys
            order = np.arange(tokens)
            if self.op.masks is not None:
                mask = self.op.masks[head]
                order = mask.query_order if channel == Q else mask.key_order
            self.orders.append(order)
        return self.order_places[channel, head]

    def latents(self, instance: int, head: int) -> tuple[int, int]:
        """First latent token of Q and of K of the head's codec block, which stay on chip; in
        DRAM those of Q follow those of K."""
        op, mapping = self.op, self.mapping
        blocks = op.codec.groups if op.codec else 1
        block = head * blocks // op.heads
        span = Span(instance * blocks + block, 0, op.keys + op.queries)
        size, room = mapping.token_bytes, mapping.latent_room_bytes
        keys = self.chunk(LATENT, (instance, block), span, size, room)
        return keys + op.keys, keys

    def constants(self, start: int, size: int, after: int) -> None:
        """Load bytes ``start`` on of the codec's weights and the bias behind them, for the
        stage to come, once ``after`` stages are done."""
        if size:
            need, sent = len(self.stages), self.constant_bytes
            self.transfers[CODEC].append([size, size, 0, need, after, 0, sent, 1, -1, 0])
            self.spans[CODEC].append(Span(0, start, start + size))
            self.constant_bytes += size

    def bias(self, instance: int, group: int) -> None:
        """The bias of a pass, where not all of it stays on chip."""
        mapping, size = self.mapping, self.mapping.pass_bias_bytes
        if not mapping.bias_stays and self.biased != (instance, group):
            self.biased = instance, group
            start = min(group * size, max(mapping.bias_bytes - size, 0))
            self.constants(mapping.codec_bytes + start, size, len(self.stages))

    def stage(
        self,
        kind: int,
        unit: int,
        plan: int,
        opens: bool,
        words: int,
        place: tuple[int, int, int, int],
        units: tuple[int, int],
        stores: int = 0,
    ) -> None:
        """Queue a stage's index bytes and the stage; ``units``: bytes loaded and freed of what
        its unit holds."""
        coded = self.coded[plan]
        made, held = coded.assignment, coded.held_bytes
        before = self.index_bytes + units[0] + held
        size = units[0] + held + coded.stream_bytes
        if size:
            need = len(self.stages)
            row = [size, size, 0, need, 0, need + 1, self.index_bytes, 1, -1, 0]
            self.transfers[INDEX].append(row)
            self._place_index(plan, size)
        self.index_bytes += size
        split = (made.denser_lines, made.sparser_lines)
        changed = bool(self.stages) and self.split != split
        self.split = split
        cycles = self.hardware.reconfigure_cycles if changed else 0
        frees = units[1] + held
        self.stages.append((kind, plan, unit, opens, words, *place, before, frees, stores, cycles))

    def _place_index(self, plan: int, size: int) -> None:
        """Windows load the same index bytes again; each plan's begin a line."""
        if plan not in self.index_places:
            self.index_places[plan] = self.index_end
            self.index_end += -(-size // LINE_BYTES) * LINE_BYTES
        start = self.index_places[plan]
        self.spans[INDEX].append(Span(0, start, start + size))


def _kept(mapping: Mapping, channel: int) -> int:
    """First transfers of the channel that are on chip from the beginning."""
    kept = mapping.kept
    return {Q: kept.q, K: kept.k, V: kept.v, LATENT: kept.latents}.get(channel, 0)


def build(mapping: Mapping, instances: int) -> tuple[Program, Counts]:
    """Arrays of ``instances`` windows (images x windows) of the mapping's call."""
    builder = _Builder(mapping)
    if mapping.op.codec is not None:
        builder.constants(0, mapping.codec_bytes, 0)
    if mapping.bias_stays:
        builder.constants(mapping.codec_bytes, mapping.bias_bytes, 0)
    units = list(mapping.units(instances))
    for number, unit in enumerate(units):
        if number == 0 or not mapping.ahead:
            _scores(builder, number, unit)
        if mapping.ahead and number + 1 < len(units):
            _scores(builder, number + 1, units[number + 1])
        _values(builder, number, unit)
    return _arrays(builder), _counts(builder)


def _scores(builder: _Builder, number: int, unit: tuple[int, int, slice]) -> None:
    """SDDMM of a unit (instance, head, rows), key tile by key tile."""
    op, mapping = builder.op, builder.mapping
    instance, head, rows = unit
    group, member = divmod(head, mapping.group)
    tokens = slice(0, op.queries) if mapping.whole_queries else rows
    size = mapping.token_bytes
    room = mapping.group * mapping.key_words * builder.hardware.word_bytes
    regions = op.codec.groups if op.codec else op.heads
    region = instance * regions + head * regions // op.heads
    alone = head if mapping.group == 1 else -1
    builder.bias(instance, group)
    sources = builder.latents(instance, head) if mapping.resident_latents else (-1, -1)
    for keys in mapping.key_tiles:
        first = (instance, group, keys.start, *mapping.reload(unit))
        key_count, query_count = keys.stop - keys.start, tokens.stop - tokens.start
        span = Span(region, keys.start, keys.stop, alone, keys=True)
        vector = builder.chunk(K, first, span, size, room, sources[1])
        first = (instance, group, tokens.start)
        span = Span(region, tokens.start, tokens.stop, alone)
        operand = builder.chunk(Q, first, span, size, room, sources[0])
        skipped = rows.start - tokens.start
        opens = keys.start == 0
        held = mapping.unit_index_bytes(head, rows) if opens else 0
        plan = builder.plan(head, rows, keys, SDDMM)
        place = (
            vector,
            operand + skipped,
            vector * mapping.group + member * key_count,
            operand * mapping.group + member * query_count + skipped,
        )
        builder.stage(SDDMM, number, plan, opens, mapping.key_words, place, (held, 0))
    pattern = mapping.patterns[head]
    builder.rows.append(pattern.row_scores[rows])
    builder.lists.append(pattern.row_scores[rows] - pattern.num_global)


def _values(builder: _Builder, number: int, unit: tuple[int, int, slice]) -> None:
    """SpMM of a unit, then its store."""
    op, mapping = builder.op, builder.mapping
    instance, head, rows = unit
    size = op.value_dim * builder.hardware.operand_bytes
    room = mapping.value_words * builder.hardware.word_bytes
    for keys in mapping.key_tiles:
        first = (instance, head, keys.start, *mapping.reload(unit))
        span = Span(instance * op.heads + head, keys.start, keys.stop, head, keys=True)
        operand = builder.chunk(V, first, span, size, room)
        stores = max(number + 1 - mapping.output_regions, 0) if keys.start == 0 else 0
        held = mapping.unit_index_bytes(head, rows) if keys.stop == op.keys else 0
        plan = builder.plan(head, rows, keys, SPMM)
        place = (0, operand, 0, operand)
        builder.stage(
            SPMM, number, plan, False, mapping.value_words, place, (0, held), stores
        )  # fmt: skip
    stage = len(builder.stages)
    need = stage + 2 * len(mapping.key_tiles)
    out = (rows.stop - rows.start) * size
    builder.transfers[STORE].append([out, out, 0, need, stage, 0, 0, 1, -1, 0])
    builder.spans[STORE].append(Span(instance * op.heads + head, rows.start, rows.stop, head))


def _arrays(builder: _Builder) -> Program:
    made = [coded.assignment for coded in builder.coded]
    piece_base = np.cumsum([0] + [len(a.pieces) for a in made])
    entry_base = np.cumsum([0] + [len(a.entries) for a in made])
    pieces = _joined([a.pieces for a in made])
    bases = np.repeat(entry_base[:-1], np.diff(piece_base))
    pieces["first"] += np.where(pieces["round"] == DENSE_ROUND, 0, bases)
    transfers = [tuple(transfer) for queue in builder.transfers for transfer in queue]
    bursts, channel_burst = _bursts(builder)
    return Program(
        line_piece=np.stack([a.line_piece for a in made]) + piece_base[:-1, None],
        line_entry=np.stack([a.line_entry for a in made]) + entry_base[:-1, None],
        pieces=pieces,
        entries=_joined([a.entries for a in made]),
        stages=np.array(builder.stages, dtype=STAGE),
        unit_row=np.cumsum([0] + [len(rows) for rows in builder.rows]),
        row_scores=np.concatenate(builder.rows),
        row_lists=np.concatenate([np.cumsum(count) - count for count in builder.lists]),
        list_entries=max(int(count.sum()) for count in builder.lists),
        orders=np.concatenate([np.zeros(0, np.int64), *builder.orders]),
        channel_first=np.cumsum([0] + [len(queue) for queue in builder.transfers]),
        transfers=np.array(transfers, dtype=TRANSFER),
        channel_burst=channel_burst,
        bursts=bursts,
    )


def _bursts(builder: _Builder) -> tuple[np.ndarray, np.ndarray]:
    """(BURST of all transfers, first of each channel), where the memory has addresses."""
    op, mapping = builder.op, builder.mapping
    if builder.hardware.dram_model == "flat":
        return np.zeros(0, BURST), np.zeros(CHANNELS + 1, np.int64)
    value = op.value_dim * builder.hardware.operand_bytes
    size, both = mapping.token_bytes, op.keys + op.queries
    token_bytes = [size, size, value, 1, 1, value, size]
    index = builder.index_end
    tokens = [op.queries, op.keys, op.keys, index, mapping.codec_bytes, op.queries, both]
    silent = [_kept(mapping, channel) for channel in range(CHANNELS)]
    if mapping.resident_latents:
        silent[Q], silent[K] = len(builder.spans[Q]), len(builder.spans[K])
    return bursts_of(op, builder.spans, token_bytes, tokens, silent)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Records of one type after each other (numpy compares the types again at each one)."""
    return np.concatenate([part.view(np.int64) for part in parts]).view(parts[0].dtype)


def _counts(builder: _Builder) -> Counts:
    of_plan = [(len(c.assignment.pieces), c.streamed, c.stream_bits) for c in builder.coded]
    used = [(stage[0], *of_plan[stage[1]]) for stage in builder.stages]
    return Counts(
        pieces=sum(pieces for kind, pieces, *_ in used if kind == SPMM),
        output_rows=sum(int(np.count_nonzero(rows)) for rows in builder.rows),
        scores=sum(int(rows.sum()) for rows in builder.rows),
        entries=sum(entries for _, _, entries, _ in used),
        stream_bits=sum(bits for *_, bits in used),
        listed=sum(int(count.sum()) for count in builder.lists) * builder.mapping.one_stream,
    )
