"""Packed rows of a mask with scores held in the array (Sanger, MICRO 2021, section 5): the lines
and MACs of a line that they are laid on, their cycles, and what they wait for the banks.

SDDMM and SpMM of a group of rows, one row a line, take a cycle a dimension. A group reads its
queries, keys and values by index, each word once for all its MACs (`packing`), and waits where
one bank has too many of them (`banks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...workload import Attention
from ..cache import LruCache
from ..hardware import Hardware
from ..schedule import Schedule
from .banks import fullest
from .packing import Unit

UNITS = LruCache(128 * 1024**2)
"""By the masks of their heads, the tile and the array's width."""


@dataclass(frozen=True)
class Held:
    """Packed rows on ``height`` lines and ``width`` MACs of a line: cycles of the products with
    their skew and of waiting for banks, and what is read, all of it for all images.

    rows, pieces             array rows filled, and the pieces of mask rows in them
    query_reads, key_reads   queries and keys that a group reads, each once
    last_scores              of the last group, whose softmax is waited for
    """

    height: int
    width: int
    rows: int
    pieces: int
    sddmm: int
    spmm: int
    waited: int
    query_reads: int
    key_reads: int
    last_scores: int


@dataclass(frozen=True, eq=False)
class PackedCall:
    """An attention call on ``images``, in units of ``tile`` queries of ``heads_a_unit`` heads."""

    op: Attention
    hardware: Hardware
    schedule: Schedule
    images: int
    tile: int
    heads_a_unit: int

    def held(self) -> Held:
        """On the lines and MACs of a line that take the packed rows the least time: with the
        schedule's dataflow "best" halves of them are tried, else all are used."""
        op, best = self.op, None
        for width in self._halves(self.hardware.macs_per_line):
            units: list[tuple[int, Unit]] = []
            for height in self._halves(self.hardware.lines):
                least = -(-op.kept * self.images // (op.windows * height * width))
                if best and least * (op.key_dim + op.value_dim) >= self._time(best):
                    break
                units = units or list(self._units(width))
                held = self._on(units, height, width)
                if best is None or self._time(held) < self._time(best):
                    best = held
        assert best is not None
        return best

    def _halves(self, count: int) -> list[int]:
        if self.schedule.dense_dataflow != "best":
            return [count]
        return [count >> shift for shift in range(count.bit_length())]

    def _time(self, held: Held) -> int:
        softmax = -(-held.last_scores // self.hardware.softmax_lanes)
        return held.sddmm + held.spmm + held.waited + softmax

    def _units(self, width: int) -> Iterator[tuple[int, Unit]]:
        """(how often, unit), the last one last."""
        heads = list(range(self.op.heads))
        together = self.heads_a_unit // len(heads)
        whole, rest = divmod(self.images, max(together, 1))
        groups = [heads * together]
        if not together:
            parts = -(-len(heads) // self.heads_a_unit)
            groups = [some.tolist() for some in np.array_split(heads, parts)]
        for times, some in ((whole, groups), (1, [heads * rest] if rest else [])):
            for start in range(0, self.op.queries, self.tile):
                rows = slice(start, start + self.tile)
                for group in some:
                    yield times, self._unit(group, rows, width)

    def _unit(self, heads: list[int], rows: slice, width: int) -> Unit:
        """Of ``heads``, made once for equal masks."""

        def make() -> Unit:
            return Unit.of([self._keep(head)[rows] for head in heads], width)

        masks = self.op.masks
        if masks is None:
            return make()
        key = (*(masks[head].digest for head in heads), rows.start, rows.stop, width)
        return UNITS.get(key, make, lambda unit: unit.held_bytes)

    def _keep(self, head: int) -> np.ndarray:
        """bool [queries, keys] in the original order."""
        if self.op.masks is None:
            return np.ones((self.op.queries, self.op.keys), dtype=bool)
        return self.op.masks[head].dense()

    def _on(self, units: list[tuple[int, Unit]], height: int, width: int) -> Held:
        """All units, ``height`` packed rows at a time. Skew is paid by the schedule's fill: for
        each group, once a unit, or with the dataflow "best" once for all units."""
        skew, last, sums = height + width - 2, 0, np.zeros(7, dtype=np.int64)
        per_group = self.schedule.dense_fill == "per_tile"
        once = self.schedule.dense_dataflow == "best" and not per_group
        for times, unit in units:
            groups = -(-unit.rows // height)
            skews = groups if per_group else 0 if once else min(groups, 1)
            products = [groups * dim + skews * skew for dim in (self.op.key_dim, self.op.value_dim)]
            read = self._reads(unit, height)
            sums += times * np.array([unit.rows, unit.pieces, *products, *read])
            last = int(np.count_nonzero(unit.entry_rows >= (groups - 1) * height))
        if once and sums[0]:
            sums[2:4] += skew
        return Held(height, width, *map(int, sums), last_scores=last)

    def _reads(self, unit: Unit, height: int) -> tuple[int, int, int]:
        """(cycles of waiting for banks, queries read, keys read) of one unit."""
        op, hardware = self.op, self.hardware
        queries, keys = (unit.taken(height, side) for side in ("queries", "keys"))
        of_scores = np.maximum(fullest(queries, hardware.q_banks), fullest(keys, hardware.k_banks))
        waited = 0
        for dim, most in (
            (op.key_dim, of_scores),
            (op.value_dim, fullest(keys, hardware.v_banks)),
        ):
            words = -(-dim * hardware.operand_bytes // hardware.word_bytes)
            waited += int(np.maximum(words * most - dim, 0).sum())
        return waited, int(np.count_nonzero(queries)), int(np.count_nonzero(keys))
