"""How the kept entries of the sparser part are written in DRAM and IdxBuf: widths in bytes.

An encoding is a plain function (queries, keys, entries) -> `Widths`, where ``entries`` are the
most that one head holds. A new one is a function and a line of `ENCODINGS`; a `Schedule`
names the one that is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Widths(NamedTuple):
    """Bytes of an index entry (an operand of a vector), and of a pointer to its first."""

    entry_bytes: int
    pointer_bytes: int


def absolute(queries: int, keys: int, entries: int) -> Widths:
    """The operand's own number in 1, 2 or 4 bytes, by the number of tokens; pointers by the
    entries that they may count, 2 bytes at least."""
    return Widths(_unsigned_bytes(max(queries, keys)), max(_unsigned_bytes(entries + 1), 2))


ENCODINGS: dict[str, Callable[[int, int, int], Widths]] = {"absolute": absolute}


def _unsigned_bytes(values: int) -> int:
    """Bytes of an unsigned number below ``values``: 1, 2 or 4."""
    return 1 if values <= 256 else 2 if values <= 256**2 else 4
