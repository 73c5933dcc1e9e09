"""One tile of a head as a stage runs it: its assignment, and its index as DRAM holds it.

With one stream for both products SDDMM writes each score with its key into the list of its
row, one behind the other as they come out. Choice (`Hardware.sorted_lists`): the softmax unit,
which goes over a row three times, notes its keys in a bitmap in the first pass, and in the last
one writes each probability to the place that the keys below it leave (a count of bits, as
sparse machines with bitmaps have it), so that SpMM meets the keys of all rows in ascending order
and lines share reads of a value. Without it SpMM takes them as they were written.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..cache import LruCache
from ..encodings import ENCODINGS, Stream
from .assign import Assignment
from .mapping import Mapping
from .pattern import SDDMM, SPMM, Pattern, plan_tile

CODED = LruCache(256 * 1024**2)
"""By what `plan_tile` depends on, the encoding, and the addresses beside the entries."""


class Coded(NamedTuple):
    """held_bytes: what is there before the stream begins; streamed: entries that IdxBuf holds;
    stream_bits: of all of them."""

    assignment: Assignment
    held_bytes: int
    streamed: int
    stream_bits: int

    @property
    def stream_bytes(self) -> int:
        return -(-self.stream_bits // 8)


def coded_tile(mapping: Mapping, head: int, rows: slice, keys: slice, kind: int) -> Coded:
    """The tile's stage of ``kind``, made once for equal ones."""
    (pattern, inside, _), schedule = mapping.work_of(head, rows), mapping.schedule
    tiles = len(mapping.tiles_of(head, rows))
    rows = inside

    def make() -> Coded:
        made = plan_tile(pattern, rows, keys, kind, mapping.hardware.lines, schedule)
        if kind == SPMM and mapping.one_stream:
            return _listed(mapping, pattern, made, rows, keys, tiles)
        return _streamed(mapping, pattern, made, rows, keys, kind)

    if not pattern.digest:
        return make()
    tile = (pattern.digest, rows.start, rows.stop, keys.start, keys.stop, kind)
    lists = mapping.one_stream * (1 + mapping.hardware.sorted_lists)
    how = (schedule.assignment, schedule.split_percent, schedule.index_encoding, lists)
    sizes = (mapping.hardware.lines, mapping.op.queries, mapping.op.keys, mapping.most_entries)
    return CODED.get((*tile, *how, *sizes), make, _held_bytes)


def with_index_held(mapping: Mapping, instances: int) -> Mapping:
    """The mapping with the index of each head loaded once for all ``instances`` (windows of all
    images), where the schedule lets it and IdxBuf holds that of the heads which are in work:
    of two passes where the scores of the next come before the values of this one."""
    if instances == 1 or mapping.schedule.index_loads != "once":
        return replace(mapping, index_held=False) if mapping.index_held else mapping
    heads = [_index_bytes(mapping, head) for head in range(mapping.op.heads)]
    outer = mapping.outer_heads
    sizes = [sum(heads[first : first + outer]) for first in range(0, len(heads), outer)]
    if mapping.ahead and len(sizes) > 1:
        sizes = [a + b for a, b in pairwise(sizes)]
    fits = max(sizes) <= mapping.hardware.index_buffer_bytes
    return mapping if fits == mapping.index_held else replace(mapping, index_held=fits)


def _index_bytes(mapping: Mapping, head: int) -> int:
    """All that IdxBuf gets of a head for one instance."""
    total = 0
    for rows in mapping.query_tiles:
        made = [
            coded_tile(mapping, head, rows, keys, kind)
            for keys in mapping.tiles_of(head, rows)
            for kind in (SDDMM, SPMM)
        ]
        total += mapping.unit_index_bytes(head, rows)
        total += sum(coded.held_bytes + coded.stream_bytes for coded in made)
    return total


def _held_bytes(made: Coded) -> int:
    return sum(array.nbytes for array in made.assignment[:4])


def _stream(
    mapping: Mapping, pattern: Pattern, made: Assignment, rows: slice, keys: slice, kind: int
) -> Stream:
    dense = max(min(keys.stop, pattern.num_global) - keys.start, 0)
    queries, count = rows.stop - rows.start, keys.stop - keys.start
    sizes = (queries, 0, count, dense) if kind == SDDMM else (count, dense, queries, 0)
    whole = max(mapping.op.queries, mapping.op.keys)
    return Stream(made, mapping.named_starts, *sizes, mapping.most_entries, whole)


def _streamed(
    mapping: Mapping, pattern: Pattern, made: Assignment, rows: slice, keys: slice, kind: int
) -> Coded:
    """With its entries as the schedule's encoding writes them."""
    encoding = ENCODINGS[mapping.schedule.index_encoding]
    coded = encoding.encode(_stream(mapping, pattern, made, rows, keys, kind))
    address = 8 * mapping.address_bytes if kind == SDDMM else 0
    ends = np.cumsum(coded.entry_bits + address)
    whole = -(-ends // 8)
    entries = made.entries.copy()
    order = entries["arrival"]
    entries["size"] = np.diff(whole, prepend=0)[order]
    entries["arrival"] = whole[order]
    bits = int(ends[-1]) if len(ends) else 0
    return Coded(made._replace(entries=entries), -(-coded.held_bits // 8), len(entries), bits)


def _listed(
    mapping: Mapping, pattern: Pattern, made: Assignment, rows: slice, keys: slice, tiles: int
) -> Coded:
    """Without entries: ``place`` of a piece is where in the lists of its unit its keys begin.
    The keys of earlier tiles come first in the list of a row."""
    pieces = made.pieces.copy()
    if tiles > 1:
        before, inside = _lists_before(pattern, rows, keys)
        sparser = pieces["round"] >= 0
        pieces["place"][sparser] += (before - inside)[pieces["vector"][sparser]]
    encoding = ENCODINGS[mapping.schedule.index_encoding]
    coded = encoding.encode(_stream(mapping, pattern, made, rows, keys, SPMM))
    listed = made._replace(pieces=pieces)
    if not mapping.hardware.sorted_lists:
        nowhere = np.zeros_like(made.line_entry)
        listed = listed._replace(entries=made.entries[:0], line_entry=nowhere)
    return Coded(listed, -(-coded.held_bits // 8), 0, 0)


def _lists_before(pattern: Pattern, rows: slice, keys: slice) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, where its list goes on with this tile, among the lists of the unit; and
    where its entries begin among those of the tile."""
    indptr, columns = pattern.rows
    low, high = (max(key - pattern.num_global, 0) for key in (keys.start, keys.stop))
    spans = [columns[indptr[row] : indptr[row + 1]] for row in range(rows.start, rows.stop)]
    earlier = np.array([np.searchsorted(span, low) for span in spans])
    inside = np.array([np.searchsorted(span, high) for span in spans]) - earlier
    whole = np.diff(indptr[rows.start : rows.stop + 1])
    return np.cumsum(whole) - whole + earlier, np.cumsum(inside) - inside
