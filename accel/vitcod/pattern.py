"""One head's mask as work, and the tiles of it as given to the MAC lines.

Both depend on little else, so both are kept: a pattern by its mask, an assignment by the
pattern, the tile, the product, the lines and the policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from ...workload import Attention, PolarizedMask
from ..cache import LruCache
from ..jit import cached
from ..schedule import Schedule
from .assign import Assignment, assign

SDDMM, SPMM = 0, 1
"""Kinds of stage: the two products."""

PATTERNS = LruCache(64 * 1024**2)
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


class UnitWork(NamedTuple):
    """What a tile of queries does: ``rows`` of ``pattern``. ``keys``: the head's keys that
    those of the pattern are, int64; None: all, in their order."""

    pattern: Pattern
    rows: slice
    keys: np.ndarray | None


def of_rows(pattern: Pattern, rows: slice) -> UnitWork:
    """The work of these queries alone, on the global keys and those that one of them keeps (one
    key at least)."""
    indptr, columns = pattern.rows
    mine = columns[indptr[rows.start] : indptr[rows.stop]]
    used = np.unique(mine)
    if not len(used) and not pattern.num_global:
        used = np.zeros(1, np.int64)
    renamed, count = np.searchsorted(used, mine), rows.stop - rows.start
    pointer = indptr[rows.start : rows.stop + 1] - indptr[rows.start]
    row_of = np.repeat(np.arange(count), np.diff(pointer))
    starts = np.cumsum(np.bincount(renamed, minlength=len(used)))
    made = Pattern(
        pattern.num_global,
        (
            _frozen(np.concatenate([[0], starts])),
            _frozen(row_of[np.argsort(renamed, kind="stable")]),
        ),
        (_frozen(pointer), _frozen(renamed)),
        pattern.row_scores[rows],
        pattern.masked,
        pattern.digest and f"{pattern.digest} rows {rows.start} to {rows.stop}",
    )
    keys = np.concatenate([np.arange(pattern.num_global), used + pattern.num_global])
    return UnitWork(made, slice(0, count), keys)


def patterns_of(op: Attention) -> tuple[Pattern, ...]:
    """One a head; made once for equal masks."""
    if op.masks is None:
        return (Pattern.dense(op.queries, op.keys),) * op.heads
    return tuple(
        PATTERNS.get(mask.digest, partial(Pattern.of, mask), lambda made: made.held_bytes)
        for mask in op.masks
    )


@cached
def _tile(indptr, indices, first, last, low, high, shift):
    """Vectors first..last of a compressed matrix, operands in low..high, moved by shift."""
    pointer = np.zeros(last - first + 1, np.int64)
    kept = np.empty(indptr[last] - indptr[first], np.int64)
    count = 0
    for vector in range(first, last):
        start, stop = indptr[vector], indptr[vector + 1]
        while start < stop:  # operands ascend: find the first one that is not below `low`
            middle = (start + stop) // 2
            if indices[middle] < low:
                start = middle + 1
            else:
                stop = middle
        while start < indptr[vector + 1] and indices[start] < high:
            kept[count] = indices[start] - low + shift
            count += 1
            start += 1
        pointer[vector - first + 1] = count
    return pointer, kept[:count]


ASSIGNMENTS = LruCache(256 * 1024**2)
"""By pattern, tile, product, lines and policy: what an assignment depends on."""


def plan_tile(
    pattern: Pattern, rows: slice, keys: slice, kind: int, lines: int, schedule: Schedule
) -> Assignment:
    """The assignment of one tile of one head to the lines, made once for equal ones."""

    def make() -> Assignment:
        return _planned(pattern, rows, keys, kind, lines, schedule)

    if not pattern.digest:
        return make()
    how = (schedule.assignment, schedule.split_percent)
    tile = (pattern.digest, rows.start, rows.stop, keys.start, keys.stop, kind)
    return ASSIGNMENTS.get((*tile, lines, *how), make, _held_bytes)


def _held_bytes(made: Assignment) -> int:
    return sum(array.nbytes for array in made[:4])


def _planned(
    pattern: Pattern, rows: slice, keys: slice, kind: int, lines: int, schedule: Schedule
) -> Assignment:
    dense = max(min(keys.stop, pattern.num_global) - keys.start, 0)
    low = max(keys.start, pattern.num_global) - pattern.num_global
    high = max(keys.stop - pattern.num_global, low)
    height = rows.stop - rows.start
    how = (schedule.assignment, schedule.split_percent)
    if kind == SDDMM:
        pointer, operands = _tile(*pattern.columns, low, high, rows.start, rows.stop, 0)
        return assign(pointer, operands, dense, height, lines, *how, first_sparser=dense)
    pointer, operands = _tile(*pattern.rows, rows.start, rows.stop, low, high, dense)
    return assign(pointer, operands, height, dense, lines, *how)


def _frozen(values: np.ndarray) -> np.ndarray:
    array = np.array(values, dtype=np.int64)
    array.setflags(write=False)
    return array
