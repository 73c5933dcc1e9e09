"""Who computes what: vectors of one product shared out to the MAC lines, ahead of time.

ViTCoD section V: the mask never changes, so the work of each line is known before the first
image. A *vector* stays in a line (a key in SDDMM, an output row in SpMM); its *operands*
stream past it (queries, value rows). Global keys make a dense block for the denser engine,
the kept entries of the other keys go to the sparser engine, and both share the lines.

Policies of the sparser engine:

lockstep      one vector at a time, its entries spread over all sparser lines
round_robin   vector i to line i modulo lines, never cut
balanced      longest first to the least loaded line; a vector longer than the lines' fair
              share is cut, and the partial results of its pieces are added
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .hardware import ASSIGNMENTS

BALANCED, ROUND_ROBIN, LOCKSTEP = (
    ASSIGNMENTS.index(name) for name in ("balanced", "round_robin", "lockstep")
)

DENSE_ROUND = -1
"""`round` of a piece of the denser engine, which lockstep does not hold back."""


class Assignment(NamedTuple):
    """The pieces of one product, line after line; a piece is part of one vector's work.

    line_piece   [lines + 1] pieces of line l are line_piece[l]:line_piece[l + 1]
    line_entry   [lines + 1] likewise the line's entries, in the order of its pieces
    vector       [pieces] key (SDDMM) or row (SpMM), counted inside the tile
    first        [pieces] denser: first operand; sparser: first entry
    length       [pieces] operands, at least 1
    round        [pieces] DENSE_ROUND, or the lockstep round (0 for other policies)
    entry        [entries] operands of the sparser pieces
    arrival      [entries] place in the index stream, which serves the lines in turn
    denser_lines, sparser_lines   the split
    """

    line_piece: np.ndarray
    line_entry: np.ndarray
    vector: np.ndarray
    first: np.ndarray
    length: np.ndarray
    round: np.ndarray
    entry: np.ndarray
    arrival: np.ndarray
    denser_lines: int
    sparser_lines: int


@njit(cache=True)
def denser_length(vectors: int, operands: int, lines: int) -> int:
    """Operands that the busiest of ``lines`` takes from a block of vectors x operands.

    Whole rounds give each line a vector; the vectors of the last round are shared by
    several lines each, which split the operands.
    """
    full, rest = divmod(vectors, lines)
    if rest == 0:
        return full * operands
    sharing = lines // rest
    return full * operands + (operands + sharing - 1) // sharing


@njit(cache=True)
def split_lines(vectors: int, operands: int, entries: int, lines: int) -> tuple[int, int]:
    """Lines for the denser and the sparser engine, in proportion to their work.

    Of all whole splits the one whose slower engine ends first; ties: fewer denser lines.
    A single line serves both engines in turn.
    """
    if vectors * operands == 0:
        return 0, lines
    if entries == 0:
        return lines, 0
    if lines == 1:
        return 1, 1
    best, best_length = 1, np.int64(2**62)
    for denser in range(1, lines):
        sparser = (entries + lines - denser - 1) // (lines - denser)
        length = max(denser_length(vectors, operands, denser), sparser)
        if length < best_length:
            best, best_length = denser, length
    return best, lines - best


@njit(cache=True)
def _denser_pieces(vectors, operands, lines, out):
    """Rows (line, vector, first, length, round) for the dense block; returns their number."""
    full, rest = divmod(vectors, lines)
    count = 0
    for vector in range(full * lines):
        out[count] = (vector % lines, vector, 0, operands, DENSE_ROUND)
        count += 1
    line = 0
    for index in range(rest):
        sharing = lines // rest + (1 if index < lines % rest else 0)
        sharing = min(sharing, operands)
        for part in range(sharing):
            first = operands * part // sharing
            length = operands * (part + 1) // sharing - first
            out[count] = (line + part, full * lines + index, first, length, DENSE_ROUND)
            count += 1
        line += sharing
    return count


@njit(cache=True)
def _lightest(loads):
    """Index of the smallest load; ties: the lowest line."""
    best = 0
    for line in range(1, loads.size):
        if loads[line] < loads[best]:
            best = line
    return best


@njit(cache=True)
def _balanced_pieces(indptr, lines, base, entry, shift, out):
    lengths = np.diff(indptr)
    fair = max((indptr[-1] + lines - 1) // lines, 1)
    count = 0
    for vector in range(lengths.size):
        parts = (lengths[vector] + fair - 1) // fair
        for part in range(parts):
            first = lengths[vector] * part // parts
            length = lengths[vector] * (part + 1) // parts - first
            out[count] = (0, vector, indptr[vector] + first, length, 0)
            count += 1
    loads = np.zeros(lines, np.int64)
    for piece in np.argsort(-out[:count, 3], kind="mergesort"):
        line = _lightest(loads)
        loads[line] += out[piece, 3]
        out[piece, 0] = base + line
    # Inside a line by the time its data is in: vectors and operands arrive in order.
    ready = np.empty(count, np.int64)
    for piece in range(count):
        ready[piece] = max(out[piece, 1] + shift, entry[out[piece, 2] + out[piece, 3] - 1])
    out[:count] = out[:count][np.argsort(ready, kind="mergesort")]
    return count


@njit(cache=True)
def _round_robin_pieces(indptr, lines, base, out):
    count = 0
    for vector in range(indptr.size - 1):
        length = indptr[vector + 1] - indptr[vector]
        if length:
            out[count] = (base + vector % lines, vector, indptr[vector], length, 0)
            count += 1
    return count


@njit(cache=True)
def _lockstep_pieces(indptr, lines, base, out):
    count, turn = 0, 0
    for vector in range(indptr.size - 1):
        total = indptr[vector + 1] - indptr[vector]
        for line in range(min(lines, total)):
            parts = min(lines, total)
            first = total * line // parts
            length = total * (line + 1) // parts - first
            out[count] = (base + line, vector, indptr[vector] + first, length, turn)
            count += 1
        turn += total > 0
    return count


@njit(cache=True)
def _stream_order(line_entry):
    """Place of each entry in the index stream: first entries of all lines, then second ..."""
    lines = line_entry.size - 1
    arrival = np.empty(line_entry[-1], np.int64)
    place, rank, left = 0, 0, line_entry[-1]
    while left:
        for line in range(lines):
            if line_entry[line] + rank < line_entry[line + 1]:
                arrival[line_entry[line] + rank] = place
                place += 1
                left -= 1
        rank += 1
    return arrival


@njit(cache=True)
def _by_line(pieces, entry, lines):
    """Pieces and their entries rearranged line after line, the order inside a line kept."""
    count = pieces.shape[0]
    line_piece = np.zeros(lines + 1, np.int64)
    line_entry = np.zeros(lines + 1, np.int64)
    for piece in range(count):
        line_piece[pieces[piece, 0] + 1] += 1
        if pieces[piece, 4] != DENSE_ROUND:
            line_entry[pieces[piece, 0] + 1] += pieces[piece, 3]
    line_piece = np.cumsum(line_piece)
    line_entry = np.cumsum(line_entry)
    next_piece, next_entry = line_piece.copy(), line_entry.copy()
    moved = np.empty_like(pieces)
    streamed = np.empty(line_entry[-1], np.int64)
    for piece in range(count):
        line, _, first, length, turn = pieces[piece]
        target = next_piece[line]
        next_piece[line] += 1
        moved[target] = pieces[piece]
        if turn != DENSE_ROUND:
            start = next_entry[line]
            streamed[start : start + length] = entry[first : first + length]
            moved[target, 2] = start
            next_entry[line] += length
    return line_piece, line_entry, moved, streamed


@njit(cache=True)
def _assign(indptr, entry, dense_vectors, dense_operands, lines, policy, first_sparser):
    total = indptr[-1]
    denser, sparser = split_lines(dense_vectors, dense_operands, total, lines)
    base = denser if denser + sparser <= lines else 0
    vectors = indptr.size - 1
    room = dense_vectors + lines + (vectors + lines) * (lines if policy == LOCKSTEP else 1)
    pieces = np.empty((room, 5), np.int64)
    count = 0
    if denser:
        count = _denser_pieces(dense_vectors, dense_operands, denser, pieces)
    if total:
        rest = pieces[count:]
        if policy == BALANCED:
            count += _balanced_pieces(indptr, sparser, base, entry, first_sparser, rest)
        elif policy == ROUND_ROBIN:
            count += _round_robin_pieces(indptr, sparser, base, rest)
        else:
            count += _lockstep_pieces(indptr, sparser, base, rest)
    for piece in range(count):
        if pieces[piece, 4] != DENSE_ROUND:
            pieces[piece, 1] += first_sparser
    line_piece, line_entry, moved, streamed = _by_line(pieces[:count], entry, lines)
    return line_piece, line_entry, moved, streamed, _stream_order(line_entry), denser, sparser


def assign(
    indptr: np.ndarray,
    entry: np.ndarray,
    dense_vectors: int,
    dense_operands: int,
    lines: int,
    policy: str,
    first_sparser: int = 0,
) -> Assignment:
    """Share one product out to ``lines``.

    The denser block is ``dense_vectors`` x ``dense_operands``, both from 0. Sparser vector
    ``first_sparser + v`` has the operands ``entry[indptr[v]:indptr[v + 1]]``: in SDDMM the
    sparser keys follow the global ones, in SpMM both engines hold the same rows.
    """
    line_piece, line_entry, moved, streamed, arrival, denser, sparser = _assign(
        np.asarray(indptr, dtype=np.int64),
        np.asarray(entry, dtype=np.int64),
        dense_vectors,
        dense_operands,
        lines,
        ASSIGNMENTS.index(policy),
        first_sparser,
    )
    vector, first, length, turn = (np.ascontiguousarray(moved[:, i]) for i in range(1, 5))
    return Assignment(
        line_piece, line_entry, vector, first, length, turn, streamed, arrival, denser, sparser
    )
