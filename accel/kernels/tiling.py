"""Tiles of a mask: queries that share keys together, with the list of keys they need.

A mask learned on a ViT has few empty blocks, even of 16 x 16: its kept entries are spread.
What can be skipped is a key that no query of a tile keeps. So each tile carries the list
of keys that any of its queries keeps, and for each of them a word whose bit r says whether
row r of the tile keeps it. The fewer different keys in a tile, the less is computed in
vain: rows are gathered greedily, each time the one that adds the fewest new keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

try:
    from numba import njit
except ImportError:  # the same functions, interpreted
    njit = None

HAVE_NUMBA = njit is not None


def compiled(function: Callable) -> Callable:
    if njit is None:
        return function
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no folder that can be written
        return njit(nogil=True)(function)


@dataclass(frozen=True, eq=False)
class Csr:
    """Kept entries by rows: of row i (head * rows + row), columns[indptr[i]:indptr[i + 1]],
    ascending. indptr int64 [heads * rows + 1], columns int32 [kept]."""

    heads: int
    rows: int
    width: int
    indptr: np.ndarray
    columns: np.ndarray

    @classmethod
    def of(cls, keep: np.ndarray) -> Csr:
        """From bool [heads, rows, columns]."""
        heads, rows, width = keep.shape
        counts = np.count_nonzero(keep, axis=-1).reshape(-1)
        columns = (np.flatnonzero(head).astype(np.int64) % width for head in keep)
        return cls(
            heads,
            rows,
            width,
            np.concatenate(([0], np.cumsum(counts, dtype=np.int64))),
            np.concatenate([part.astype(np.int32) for part in columns]),
        )

    def transposed(self) -> Csr:
        """The same entries by columns."""
        indptr = np.zeros(self.heads * self.width + 1, np.int64)
        columns = np.empty(len(self.columns), np.int32)
        _transpose(self.heads, self.rows, self.width, self.indptr, self.columns, indptr, columns)
        return Csr(self.heads, self.width, self.rows, indptr, columns)

    def reordered(self, order: np.ndarray) -> Csr:
        """Rows of each head in the order given, int [heads, rows]."""
        rows = (np.arange(self.heads)[:, None] * self.rows + order).reshape(-1)
        indptr = np.concatenate(([0], np.cumsum(np.diff(self.indptr)[rows])))
        columns = np.empty_like(self.columns)
        _copy_rows(rows, self.indptr, self.columns, indptr, columns)
        return Csr(self.heads, self.rows, self.width, indptr, columns)


@compiled
def _transpose(heads, rows, width, indptr, columns, column_starts, out):
    counts = column_starts[1:]
    for row in range(heads * rows):
        base = row // rows * width
        for e in range(indptr[row], indptr[row + 1]):
            counts[base + columns[e]] += 1
    for i in range(1, heads * width):
        counts[i] += counts[i - 1]
    fill = column_starts[:-1].copy()
    for row in range(heads * rows):
        base = row // rows * width
        for e in range(indptr[row], indptr[row + 1]):
            out[fill[base + columns[e]]] = row - row // rows * rows
            fill[base + columns[e]] += 1


@compiled
def _copy_rows(rows, indptr, columns, new_indptr, out):
    for i in range(len(rows)):
        start = indptr[rows[i]]
        for e in range(new_indptr[i + 1] - new_indptr[i]):
            out[new_indptr[i] + e] = columns[start + e]


def cluster(csr: Csr, by_columns: Csr, tile: int, full: float) -> np.ndarray:
    """int32 [heads, rows]: an order in which ``tile`` rows after one another share columns.

    Rows that keep more than ``full`` of all columns come first, gathered among themselves,
    and are followed by a new tile: `lay_out` starts one there.
    """
    order = np.empty((csr.heads, csr.rows), np.int32)
    limit = int(full * csr.width)
    for head in range(csr.heads):
        _cluster_head(
            csr.indptr[head * csr.rows : (head + 1) * csr.rows + 1],
            csr.columns,
            by_columns.indptr[head * csr.width : (head + 1) * csr.width + 1],
            by_columns.columns,
            tile,
            limit,
            order[head],
        )
    return order


@compiled
def _cluster_head(indptr, columns, column_starts, rows_of, tile, limit, order):
    rows = len(indptr) - 1
    missing = indptr[1:] - indptr[:-1]  # columns of a row that the tile does not have yet
    waiting = np.empty(rows, np.int64)
    inside = np.zeros(len(column_starts) - 1, np.bool_)
    placed = 0
    for full in (True, False):
        count = 0
        for row in range(rows):
            if (indptr[row + 1] - indptr[row] > limit) == full:
                waiting[count] = row
                count += 1
        while count > 0:
            inside[:] = False
            for row in range(rows):
                missing[row] = indptr[row + 1] - indptr[row]
            best = 0  # a tile starts with the first row that is left
            for _ in range(min(tile, count)):
                row = waiting[best]
                order[placed] = row
                placed += 1
                count -= 1
                for i in range(best, count):
                    waiting[i] = waiting[i + 1]
                for e in range(indptr[row], indptr[row + 1]):
                    column = columns[e]
                    if not inside[column]:
                        inside[column] = True
                        for o in range(column_starts[column], column_starts[column + 1]):
                            missing[rows_of[o]] -= 1
                best = 0
                for i in range(1, count):
                    if missing[waiting[i]] < missing[waiting[best]]:
                        best = i


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of all heads, those of a head after one another.

    head     int32 [tiles]
    rows     int32 [tiles, tile]: the rows of each, -1 where there is none
    start    int32 [tiles]: where its list begins
    count    int32 [tiles]: the length of its list
    columns  int32 [entries]: the lists, ascending
    bits     int32 [entries], int64 for tiles of 64: bit r says that row r keeps the column
    """

    head: np.ndarray
    rows: np.ndarray
    start: np.ndarray
    count: np.ndarray
    columns: np.ndarray
    bits: np.ndarray


def lay_out(csr: Csr, order: np.ndarray, tile: int, full: float) -> Tiles:
    """Tiles of the rows of ``csr`` (in their own order) taken in ``order``."""
    counts = np.diff(csr.indptr).reshape(csr.heads, csr.rows)
    leading = np.count_nonzero(counts > int(full * csr.width), axis=1)
    heads, rows = [], []
    for head in range(csr.heads):
        for part in (order[head, : leading[head]], order[head, leading[head] :]):
            padded = np.full(-(-len(part) // tile) * tile, -1, np.int32)
            padded[: len(part)] = part
            rows.append(padded.reshape(-1, tile))
            heads.append(np.full(len(rows[-1]), head, np.int32))
    head_of, rows_of = np.concatenate(heads), np.concatenate(rows)
    columns = np.empty(len(csr.columns), np.int32)
    bits = np.empty(len(csr.columns), np.int64)
    count = np.empty(len(rows_of), np.int32)
    used = _lists(
        head_of, rows_of, csr.indptr, csr.columns, csr.rows, csr.width, count, columns, bits
    )
    word = np.int64 if tile > 32 else np.int32
    start = np.concatenate(([0], np.cumsum(count[:-1], dtype=np.int64)))
    if used >= 2**31:
        raise ValueError(f"the lists of a plan hold at most 2**31 - 1 entries, these {used}")
    return Tiles(
        head_of,
        rows_of,
        start.astype(np.int32),
        count,
        columns[:used].copy(),
        bits[:used].astype(word),
    )


@compiled
def _lists(head_of, rows_of, indptr, row_columns, rows, width, count, columns, bits):
    word = np.zeros(width, np.int64)
    used = 0
    for t in range(len(rows_of)):
        low, high = width, 0
        for r in range(rows_of.shape[1]):
            if rows_of[t, r] < 0:
                continue
            row = head_of[t] * rows + rows_of[t, r]
            for e in range(indptr[row], indptr[row + 1]):
                word[row_columns[e]] |= np.int64(1) << np.int64(r)
                low = min(low, row_columns[e])
                high = max(high, row_columns[e] + 1)
        begin = used
        for column in range(low, high):
            if word[column] != 0:
                columns[used] = column
                bits[used] = word[column]
                word[column] = 0
                used += 1
        count[t] = used - begin
    return used
