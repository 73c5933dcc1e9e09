"""Numbers inside a block of 256 operands, 8 bits each, and nothing for CLS.

The first operands of a tile that every vector keeps (the row of CLS, where it is kept whole)
have no entries: one number a stage says how many they are. The others are counted from there
in blocks of 256; where a tile has several blocks, each start says how many entries of the
piece lie in each block but the last. A start says how long the piece is, and which vector
(where lines do not take them in order), in as many bits as the largest needs.
"""

from __future__ import annotations

import numpy as np

from .stream import Encoded, Encoding, Stream, Widths, bits_below

BLOCK = 256
ENTRY_BITS = 8
APART_BITS = 8
"""How many leading operands are kept by every vector: 255 at most are taken apart."""
COUNT_BITS = bits_below(BLOCK + 1)


def bounds(operands: int, vectors: int, most_entries: int, named: bool) -> Widths:
    """Of a tile of so many operands and vectors."""
    start = bits_below(operands + 1) + _later_blocks(operands) * COUNT_BITS
    return Widths(
        start + (bits_below(vectors) if named else 0),
        ENTRY_BITS,
        bits_below(vectors + 1),
        APART_BITS,
    )


def encode(stream: Stream) -> Encoded:
    """8 bits an entry, none for operands that are taken apart."""
    operands, starts = stream.entry_operands, stream.starts
    if not len(operands):
        return Encoded(0, operands)
    apart = _apart(operands, stream.vectors_met)
    rest = stream.operands - stream.first_operand - apart
    start = bits_below(int(stream.lengths.max()) + 1) + _later_blocks(rest) * COUNT_BITS
    if stream.named:
        start += bits_below(stream.vectors - stream.first_vector)
    bits = np.where(operands < apart, 0, ENTRY_BITS)
    return Encoded(APART_BITS + starts * start, bits.astype(np.int64))


def _apart(operands: np.ndarray, vectors: int) -> int:
    """Leading operands that all vectors keep."""
    counts = np.bincount(operands, minlength=1)[: 2**APART_BITS]
    partly = np.flatnonzero(counts < vectors)
    return min(int(partly[0]) if len(partly) else len(counts), 2**APART_BITS - 1)


def _later_blocks(operands: int) -> int:
    return max(-(-operands // BLOCK) - 1, 0)


RELATIVE = Encoding("relative", encode, bounds, tiled=True)
