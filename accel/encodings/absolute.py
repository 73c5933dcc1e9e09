"""Whole numbers of bytes: an entry is the operand's own number, a start is a pointer to the
first entry (and the vector's number, where lines do not take them in order).

An operand takes 1, 2 or 4 bytes by the tokens of the call, a pointer 2 or 4 by the entries
that it may count: ViTCoD's CSC as its text has it.
"""

from __future__ import annotations

import numpy as np

from .stream import Encoded, Encoding, Stream, Widths


def bounds(operands: int, vectors: int, most_entries: int, named: bool) -> Widths:
    """The widths themselves."""
    entry = _unsigned_bits(max(operands, vectors))
    pointer = max(_unsigned_bits(most_entries + 1), 16)
    return Widths(pointer + (entry if named else 0), entry, pointer)


def encode(stream: Stream) -> Encoded:
    """All starts and all entries alike."""
    widths = bounds(stream.tokens, stream.tokens, stream.most_entries, stream.named)
    entries = len(stream.assignment.entries)
    held = stream.starts * widths.start_bits
    return Encoded(held, np.full(entries, widths.entry_bits, dtype=np.int64))


def _unsigned_bits(values: int) -> int:
    """Of an unsigned number below ``values``: 8, 16 or 32."""
    return 8 if values <= 256 else 16 if values <= 256**2 else 32


ABSOLUTE = Encoding("absolute", encode, bounds, tiled=False)
