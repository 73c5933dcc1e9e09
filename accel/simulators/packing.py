"""Packing and splitting (Sanger, MICRO 2021, section 5): kept entries of a mask into rows of the
array, and what those rows take from the banks.

A row of the mask is split into full pieces of the array's width and a remainder; remainders go,
in order, into the fullest open array row that has room (best fit). Array rows are numbered as
they are opened. Rows of the array work in groups, one row a line; with scores held in place a
group takes one element of each of its keys (or values) a cycle, whoever of its MACs need it: as
the released hardware passes a column down its rows (pe_row.scala, `h_regs`), a word is read
once for a group. Each row needs the queries of its pieces, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of a tile after packing.

    rows    array rows filled
    place   array row of each piece, int64 [pieces], query by query, the remainder last
    sizes   entries of each piece, int64 [pieces]
    """

    rows: int
    place: np.ndarray
    sizes: np.ndarray

    @property
    def pieces(self) -> int:
        """That the rows of the mask were cut into."""
        return len(self.place)

    @property
    def entry_rows(self) -> np.ndarray:
        """Array row of each kept entry, int64 [entries], query by query, keys ascending."""
        return np.repeat(self.place, self.sizes)


def pack(kept: np.ndarray, width: int) -> Packed:
    """``kept`` entries of each mask row, [rows], into array rows of ``width``."""
    room: list[list[int]] = [[] for _ in range(width + 1)]  # array rows by free places
    place: list[int] = []
    sizes: list[int] = []
    rows = 0
    for count in np.asarray(kept).tolist():
        full, rest = divmod(count, width)
        place += range(rows, rows + full)
        sizes += [width] * full
        rows += full
        if not rest:
            continue
        free = next((f for f in range(rest, width) if room[f]), width)
        row = heappop(room[free]) if free < width else rows
        rows += free == width
        heappush(room[free - rest], row)
        place.append(row)
        sizes.append(rest)
    return Packed(rows, np.array(place, dtype=np.int64), np.array(sizes, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Unit:
    """Heads whose array rows follow each other without a gap: of each kept entry its array row,
    its query and its key, int64 [entries], all numbered through the heads of the unit.

    rows, pieces      in all
    queries, keys     of all its heads
    """

    rows: int
    pieces: int
    queries: int
    keys: int
    entry_rows: np.ndarray
    entry_queries: np.ndarray
    entry_keys: np.ndarray

    @classmethod
    def of(cls, tiles: list[np.ndarray], width: int) -> Unit:
        """Of the mask tiles of its heads, each bool [queries, keys], in array rows of ``width``."""
        rows = queries = pieces = 0
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for head, keep in enumerate(tiles):
            packed = pack(np.count_nonzero(keep, axis=1), width)
            query, key = np.nonzero(keep)
            parts.append((packed.entry_rows + rows, query + queries, key + head * keep.shape[1]))
            rows, pieces = rows + packed.rows, pieces + packed.pieces
            queries += keep.shape[0]
        keys = sum(keep.shape[1] for keep in tiles)
        return cls(rows, pieces, queries, keys, *map(np.concatenate, zip(*parts, strict=True)))

    @property
    def entries(self) -> int:
        """Kept."""
        return len(self.entry_rows)

    @property
    def held_bytes(self) -> int:
        """Of its arrays."""
        return sum(each.nbytes for each in (self.entry_rows, self.entry_queries, self.entry_keys))

    def taken(self, height: int, side: str) -> np.ndarray:
        """Which of its "queries" or "keys" each group of ``height`` array rows takes, bool
        [groups, queries or keys]."""
        made = np.zeros((-(-self.rows // height), getattr(self, side)), dtype=bool)
        tokens = self.entry_queries if side == "queries" else self.entry_keys
        made[self.entry_rows // height, tokens] = True
        return made
