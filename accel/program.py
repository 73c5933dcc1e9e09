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
from numba import njit

from ..workload import Attention
from .assign import Assignment, assign
from .hardware import Hardware
from .mapping import Mapping, Pattern

SDDMM, SPMM = 0, 1
"""Kinds of stage."""

Q, K, V, INDEX, CODEC, STORE = range(6)
"""DMA channels: each serves its transfers in order; the DRAM serves the channels."""

NEVER = 2**62


# Columns of Program.pieces and Program.entries: see `Assignment`.
VECTOR, FIRST, LENGTH, ROUND = range(4)
ENTRY_OPERAND, ENTRY_ARRIVAL = range(2)

# Columns of Program.stages. Token t of head HEAD of a chunk that HEADS share begins at word
# (t * HEADS + HEAD) * WORDS of its buffer; VECTOR_TOKEN and OPERAND_TOKEN count through the
# whole DMA channel. INDEX_BYTES lie before the stage's stream in the index channel; STORES
# must be done before it.
(KIND, PLAN, UNIT, WORDS, VECTOR_TOKEN, OPERAND_TOKEN, HEADS, HEAD, INDEX_BYTES, STORES,
 RECONFIGURE_CYCLES) = range(11)  # fmt: skip

# Columns of Program.transfers. ROOM bytes are taken in the buffer (0: freed as it is read);
# the stage NEED is the first to use it; it starts after AFTER stages are done and its room
# is free after RELEASE stages; TOKEN tokens of TOKEN_BYTES precede it in the channel.
BYTES, ROOM, NEED, AFTER, RELEASE, TOKEN, TOKEN_BYTES = range(7)


class Program(NamedTuple):
    """Arrays of int64. Pieces and entries are numbered through all plans.

    A *plan* is one assignment; stages of equal heads in several windows share it.
    """

    line_piece: np.ndarray  # (plans, lines + 1)
    line_entry: np.ndarray  # (plans, lines + 1)
    pieces: np.ndarray  # (pieces, 4)
    entries: np.ndarray  # (entries, 2)
    stages: np.ndarray  # (stages, 11) in the order of execution
    unit_row: np.ndarray  # (units + 1) first of the unit's rows in row_scores
    row_scores: np.ndarray  # scores of each row, all key tiles
    channel_first: np.ndarray  # (7) first transfer of each channel
    transfers: np.ndarray  # (transfers, 7)


@dataclass(frozen=True)
class Counts:
    """Of all stages of a program, for the traffic table: nothing here depends on time."""

    pieces: int
    output_rows: int  # rows with at least one piece, summed over units
    scores: int  # computed
    entries: int  # of index streams, both products
    index_dram_bytes: int


@njit(cache=True)
def _tile(indptr, indices, first, last, low, high, shift):
    """Vectors first..last of a compressed matrix, operands in low..high, moved by shift."""
    pointer = np.zeros(last - first + 1, np.int64)
    kept = np.empty(indptr[last] - indptr[first], np.int64)
    count = 0
    for vector in range(first, last):
        for place in range(indptr[vector], indptr[vector + 1]):
            if low <= indices[place] < high:
                kept[count] = indices[place] - low + shift
                count += 1
        pointer[vector - first + 1] = count
    return pointer, kept[:count]


def _plan(
    pattern: Pattern, rows: slice, keys: slice, kind: int, hardware: Hardware
) -> tuple[Assignment, int]:
    """The assignment of one tile of one head, and its vectors with a pointer in the index."""
    dense = max(min(keys.stop, pattern.num_global) - keys.start, 0)
    low = max(keys.start, pattern.num_global) - pattern.num_global
    high = max(keys.stop - pattern.num_global, low)
    height = rows.stop - rows.start
    if kind == SDDMM:
        columns = _tile(*pattern.columns, low, high, rows.start, rows.stop, 0)
        shape, shift = (dense, height), dense
        pointers = high - low
    else:
        columns = _tile(*pattern.rows, rows.start, rows.stop, low, high, dense)
        shape, shift = (height, dense), 0
        pointers = height if high > low else 0
    made = assign(*columns, *shape, hardware.lines, hardware.assignment, shift)
    return made, pointers


class _Builder:
    """Lists that grow while `build` walks the stages; `arrays` ends it."""

    def __init__(self, op: Attention, hardware: Hardware, mapping: Mapping) -> None:
        self.op, self.hardware, self.mapping = op, hardware, mapping
        self.plans: dict[tuple, tuple[int, int]] = {}
        self.assignments: list[Assignment] = []
        self.stages: list[tuple[int, ...]] = []
        self.splits: list[tuple[int, int]] = []
        self.transfers: list[list[list[int]]] = [[] for _ in range(6)]
        self.chunks: dict[int, tuple] = {}
        self.tokens = [0, 0, 0]
        self.index_bytes = 0
        self.output_rows = 0
        self.scores = 0
        self.rows: list[np.ndarray] = []
        self.bitmaps: dict[int, list[int]] = {}

    def plan(self, head: int, rows: slice, keys: slice, kind: int) -> tuple[int, int]:
        """(number of the plan, its vector pointers), made once for all windows."""
        key = (head, rows.start, keys.start, kind)
        if key not in self.plans:
            pattern = self.mapping.patterns[head]
            made, pointers = _plan(pattern, rows, keys, kind, self.hardware)
            self.plans[key] = len(self.assignments), pointers
            self.assignments.append(made)
        return self.plans[key]

    def chunk(self, channel: int, key: tuple, tokens: int, token_bytes: int, room: int) -> int:
        """First token of chunk ``key`` in its channel; a new one is loaded, an old one kept."""
        stage = len(self.stages)
        if self.chunks.get(channel) != key:
            self.chunks[channel] = key
            start = self.tokens[channel]
            self.tokens[channel] += tokens
            self.transfers[channel].append(
                [tokens * token_bytes, room, stage, 0, stage + 1, start, token_bytes]
            )
        transfer = self.transfers[channel][-1]
        transfer[4] = stage + 1
        return transfer[5]

    def index(self, plan: int, pointers: int, bitmap_bytes: int, unit: int) -> int:
        """Queue a stage's pointers, bitmap and index stream; bytes before the stream."""
        mapping, stage = self.mapping, len(self.stages)
        entries = len(self.assignments[plan].entry)
        pointer_bytes = pointers * mapping.pointer_bytes
        held = [pointer_bytes, pointer_bytes, stage, 0, stage + 1, 0, 1]
        bitmap = [bitmap_bytes, bitmap_bytes, stage, 0, NEVER, 0, 1]
        stream = [entries * mapping.entry_bytes, 0, stage, 0, 0, 0, 1]
        if bitmap_bytes:
            self.bitmaps[unit] = bitmap
        before = self.index_bytes + pointer_bytes + bitmap_bytes
        for transfer in (bitmap, held, stream):
            transfer[5] = self.index_bytes
            self.index_bytes += transfer[0]
            if transfer[0]:
                self.transfers[INDEX].append(transfer)
        return before


def build(
    op: Attention, hardware: Hardware, mapping: Mapping, instances: int
) -> tuple[Program, Counts]:
    """Arrays of ``instances`` windows (images x windows) of ``op`` under ``mapping``."""
    builder = _Builder(op, hardware, mapping)
    if op.codec is not None:
        size = mapping.codec_bytes
        builder.transfers[CODEC].append([size, 0, 0, 0, NEVER, 0, 1])
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
    tokens = range(0, op.queries) if mapping.whole_queries else range(rows.start, rows.stop)
    for keys in mapping.key_tiles:
        plan, pointers = builder.plan(head, rows, keys, SDDMM)
        size = mapping.token_bytes
        room = mapping.group * mapping.key_words * builder.hardware.word_bytes
        key_count = keys.stop - keys.start
        vector = builder.chunk(K, (instance, group, keys.start) + mapping.reload(unit), key_count,
                               size, key_count * room)  # fmt: skip
        operand = builder.chunk(Q, (instance, group, tokens.start), len(tokens),
                                size, len(tokens) * room)  # fmt: skip
        operand += rows.start - tokens.start
        bitmap = mapping.bitmap_bytes(head, rows) if keys.start == 0 else 0
        base = builder.index(plan, pointers, bitmap, number)
        words = mapping.key_words
        place = (vector, operand, mapping.group, member)
        _stage(builder, SDDMM, plan, number, words, place, base, 0)
    scores = mapping.patterns[head].row_scores[rows]
    builder.rows.append(scores)
    builder.scores += int(scores.sum())


def _values(builder: _Builder, number: int, unit: tuple[int, int, slice]) -> None:
    """SpMM of a unit, then its store."""
    op, mapping = builder.op, builder.mapping
    instance, head, rows = unit
    size = op.value_dim * builder.hardware.operand_bytes
    for keys in mapping.key_tiles:
        plan, pointers = builder.plan(head, rows, keys, SPMM)
        key_count = keys.stop - keys.start
        room = key_count * mapping.value_words * builder.hardware.word_bytes
        operand = builder.chunk(V, (instance, head, keys.start) + mapping.reload(unit),
                                key_count, size, room)  # fmt: skip
        base = builder.index(plan, pointers, 0, number)
        place = (0, operand, 1, 0)
        stores = max(number + 1 - mapping.output_regions, 0) if keys.start == 0 else 0
        _stage(builder, SPMM, plan, number, mapping.value_words, place, base, stores)
    stage = len(builder.stages)
    if number in builder.bitmaps:
        builder.bitmaps[number][4] = stage
    need = stage + 2 * len(mapping.key_tiles)
    out = (rows.stop - rows.start) * size
    builder.transfers[STORE].append([out, 0, need, stage, NEVER, 0, 1])
    builder.output_rows += int(np.count_nonzero(mapping.patterns[head].row_scores[rows]))


def _stage(
    builder: _Builder,
    kind: int,
    plan: int,
    unit: int,
    words: int,
    place: tuple[int, int, int, int],
    index_bytes: int,
    stores: int,
) -> None:
    made = builder.assignments[plan]
    split = (made.denser_lines, made.sparser_lines)
    changed = bool(builder.splits) and builder.splits[-1] != split
    builder.splits.append(split)
    cycles = builder.hardware.reconfigure_cycles if changed else 0
    builder.stages.append((kind, plan, unit, words, *place, index_bytes, stores, cycles))


def _arrays(builder: _Builder) -> Program:
    made = builder.assignments
    piece_base = np.cumsum([0] + [len(a.vector) for a in made])[:-1, None]
    entry_base = np.cumsum([0] + [len(a.entry) for a in made])[:-1, None]
    pieces = [
        np.stack([a.vector, np.where(a.round < 0, a.first, a.first + base), a.length, a.round], 1)
        for a, base in zip(made, entry_base, strict=True)
    ]
    transfers = [transfer for queue in builder.transfers for transfer in queue]
    return Program(
        line_piece=np.stack([a.line_piece for a in made]) + piece_base,
        line_entry=np.stack([a.line_entry for a in made]) + entry_base,
        pieces=np.concatenate(pieces),
        entries=np.concatenate([np.stack([a.entry, a.arrival], axis=1) for a in made]),
        stages=np.array(builder.stages, dtype=np.int64),
        unit_row=np.cumsum([0] + [len(rows) for rows in builder.rows]),
        row_scores=np.concatenate(builder.rows),
        channel_first=np.cumsum([0] + [len(queue) for queue in builder.transfers]),
        transfers=np.array(transfers, dtype=np.int64).reshape(-1, 7),
    )


def _counts(builder: _Builder) -> Counts:
    of_plan = [(len(a.vector), len(a.entry)) for a in builder.assignments]
    used = [(stage[0], *of_plan[stage[1]]) for stage in builder.stages]
    return Counts(
        pieces=sum(pieces for kind, pieces, _ in used if kind == SPMM),
        output_rows=builder.output_rows,
        scores=builder.scores,
        entries=sum(entries for _, _, entries in used),
        index_dram_bytes=builder.index_bytes,
    )
