"""How the program of one attention call is made: its mapping walked in the order of execution.

Order of the stages: the scores of the next (head, query tile) come before the values of
this one, so that its softmax runs beside them; `Mapping.ahead` says whether the score
buffer has room for that.
"""

from __future__ import annotations

import numpy as np

from ..dram.address import BURST, Span, bursts_of
from ..dram.ddr4 import LINE_BYTES
from .assign import DENSE_ROUND
from .coded import Coded, coded_tile
from .mapping import Mapping
from .pattern import SDDMM, SPMM
from .program import (
    CHANNELS,
    CODEC,
    INDEX,
    LATENT,
    STAGE,
    STORE,
    TRANSFER,
    Counts,
    K,
    Program,
    Q,
    V,
)


class _Builder:
    """Lists that grow while `build` walks the stages; `_arrays` ends it."""

    def __init__(self, mapping: Mapping, instances: int) -> None:
        self.mapping, self.op, self.hardware = mapping, mapping.op, mapping.hardware
        self.instances = instances
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
        self.index_read = 0
        self.split = (0, 0)
        self.index_bytes = 0
        self.index_places: dict[int, int] = {}
        self.index_held: dict[int, int] = {}  # of a plan: bytes of the channel before its stream
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

    def order(self, span: Span) -> np.ndarray | None:
        """The original token at each place that ``span`` counts by; None: the same."""
        if self.op.masks is None or span.head < 0:
            return None
        mask = self.op.masks[span.head]
        if not span.keys:
            return mask.query_order
        keys = (
            None if span.rows is None else self.mapping.work_of(span.head, slice(*span.rows)).keys
        )
        return mask.key_order if keys is None else mask.key_order[keys]

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
        name = (0 if mapping.index_held else instance, group)
        if not mapping.bias_stays and self.biased != name:
            self.biased = name
            start = min(group * size, max(mapping.bias_bytes - size, 0))
            self.constants(mapping.codec_bytes + start, size, len(self.stages))

    def stage(
        self,
        kind: int,
        unit: int,
        instance: int,
        plan: int,
        opens: bool,
        words: int,
        place: tuple[int, int, int, int],
        units: tuple[int, int],
        stores: int = 0,
    ) -> None:
        """Queue a stage's index bytes and the stage; ``units``: bytes loaded and freed of what
        its unit holds. Where the index is held the first instance loads it, the last frees it."""
        coded = self.coded[plan]
        made, held = coded.assignment, coded.held_bytes
        size = units[0] + held + coded.stream_bytes
        self.index_read += size
        if plan not in self.index_held or not self.mapping.index_held:
            self.index_held[plan] = self.index_bytes + units[0] + held
            self._load_index(plan, size)
        split = (made.denser_lines, made.sparser_lines)
        changed = bool(self.stages) and self.split != split
        self.split = split
        cycles = self.hardware.reconfigure_cycles if changed else 0
        stays = self.mapping.index_held and instance < self.instances - 1
        frees = 0 if stays else units[1] + held
        index = self.index_held[plan], frees, stays
        self.stages.append((kind, plan, unit, opens, words, *place, *index, stores, cycles))

    def _load_index(self, plan: int, size: int) -> None:
        if size:
            need = len(self.stages)
            row = [size, size, 0, need, 0, need + 1, self.index_bytes, 1, -1, 0]
            self.transfers[INDEX].append(row)
            self._place_index(plan, size)
        self.index_bytes += size

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
    builder = _Builder(mapping, instances)
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
    subset = None if mapping.work_of(head, rows).keys is None else (rows.start, rows.stop)
    again = (rows.start,) if mapping.fetched_again else ()
    builder.bias(instance, group)
    sources = builder.latents(instance, head) if mapping.resident_latents else (-1, -1)
    for keys in mapping.tiles_of(head, rows):
        first = (instance, group, keys.start, *mapping.reload(unit))
        key_count, query_count = keys.stop - keys.start, tokens.stop - tokens.start
        span = Span(region, keys.start, keys.stop, alone, keys=True, rows=subset)
        vector = builder.chunk(K, first, span, size, room, sources[1])
        first = (instance, group, tokens.start, *(again and (*again, keys.start)))
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
        builder.stage(SDDMM, number, instance, plan, opens, mapping.key_words, place, (held, 0))
    pattern = mapping.patterns[head]
    builder.rows.append(pattern.row_scores[rows])
    builder.lists.append(pattern.row_scores[rows] - pattern.num_global)


def _values(builder: _Builder, number: int, unit: tuple[int, int, slice]) -> None:
    """SpMM of a unit, then its store."""
    op, mapping = builder.op, builder.mapping
    instance, head, rows = unit
    size = op.value_dim * builder.hardware.operand_bytes
    room = mapping.value_words * builder.hardware.word_bytes
    subset = None if mapping.work_of(head, rows).keys is None else (rows.start, rows.stop)
    tiles = mapping.tiles_of(head, rows)
    for keys in tiles:
        first = (instance, head, keys.start, *mapping.reload(unit))
        region = instance * op.heads + head
        span = Span(region, keys.start, keys.stop, head, keys=True, rows=subset)
        operand = builder.chunk(V, first, span, size, room)
        stores = max(number + 1 - mapping.output_regions, 0) if keys.start == 0 else 0
        held = mapping.unit_index_bytes(head, rows) if keys is tiles[-1] else 0
        plan = builder.plan(head, rows, keys, SPMM)
        place = (0, operand, 0, operand)
        words = mapping.value_words
        builder.stage(SPMM, number, instance, plan, False, words, place, (0, held), stores)
    stage = len(builder.stages)
    need = stage + 2 * len(tiles)
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
    return bursts_of(builder.order, builder.spans, token_bytes, tokens, silent)


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
        index_bytes=builder.index_read,
        stream_bits=sum(bits for *_, bits in used),
        listed=sum(int(count.sum()) for count in builder.lists) * builder.mapping.one_stream,
    )
