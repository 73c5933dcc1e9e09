"""What an encoding is given of one stage, and what it answers. Sizes are bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from ..vitcod.assign import Assignment


class Widths(NamedTuple):
    """No stage asks for more bits than these: for where a vector (a piece of one) begins, for
    an entry, for the length of a row's list of scores, and once for the stage itself."""

    start_bits: int
    entry_bits: int
    row_bits: int
    stage_bits: int = 0


@dataclass(frozen=True, eq=False)
class Stream:
    """The entries of one stage, as its assignment has them.

    assignment     the stage's pieces and entries
    named          the lines do not take vectors in order: each start says which it is
    operands       of the whole tile, and the first of them
    vectors        likewise; vectors of the sparser part follow those of the dense block
    most_entries   of a head, both products alike
    tokens         queries or keys of the whole call, whichever are more
    """

    assignment: Assignment
    named: bool
    operands: int
    first_operand: int
    vectors: int
    first_vector: int
    most_entries: int
    tokens: int

    @property
    def starts(self) -> int:
        """How often the sparser engine is told where a vector, or a piece of one, begins."""
        return self.assignment.starts

    @cached_property
    def lengths(self) -> np.ndarray:
        """Entries of each piece, int64 [pieces]."""
        return self._pieces["length"]

    @cached_property
    def entry_operands(self) -> np.ndarray:
        """Counted from ``first_operand``, in the order of the stream, int64 [entries]."""
        made = self.assignment.entries
        operands = np.empty(len(made), dtype=np.int64)
        operands[made["arrival"]] = made["operand"] - self.first_operand
        return operands

    @property
    def _pieces(self) -> np.ndarray:
        pieces = self.assignment.pieces
        return pieces[pieces["round"] >= 0]

    @cached_property
    def vectors_met(self) -> int:
        """Vectors with an entry."""
        return len(np.unique(self._pieces["vector"]))


class Encoded(NamedTuple):
    """Bits that a stage holds before its stream begins, and of each entry in the order of the
    stream, int64 [entries]."""

    held_bits: int
    entry_bits: np.ndarray


@dataclass(frozen=True)
class Encoding:
    """By name.

    encode   of a stage
    bounds   (operands, vectors, entries of a head, named) -> `Widths`
    tiled    operands and vectors of ``bounds`` are those of a tile, not of the call
    """

    name: str
    encode: Callable[[Stream], Encoded]
    bounds: Callable[[int, int, int, bool], Widths]
    tiled: bool


def bits_below(values: int) -> int:
    """Bits of an unsigned number below ``values``, one at least."""
    return max((values - 1).bit_length(), 1)
