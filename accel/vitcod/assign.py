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

from typing import Any, NamedTuple

import numpy as np

from ..jit import cached, compiled

BALANCED, ROUND_ROBIN, LOCKSTEP = range(3)
POLICIES = {"balanced": BALANCED, "round_robin": ROUND_ROBIN, "lockstep": LOCKSTEP}
"""`Schedule.assignment` as the compiled code knows it."""

DENSE_ROUND = np.int64(-1)
"""`round` of a piece of the denser engine, which lockstep does not hold back."""

# Typed, so that a compiled function is not made again for each literal it is given.
ZERO, ONE = np.int64(0), np.int64(1)

PIECE = np.dtype([(name, np.int64) for name in ("line", "vector", "first", "length", "round")])
"""A part of one vector's work: key (SDDMM) or row (SpMM), counted inside the tile.

first    denser: its first operand; sparser: its first entry in `Assignment.entries`
length   operands, at least 1
round    DENSE_ROUND, or the lockstep round (0 for other policies)
"""

ENTRY = np.dtype([(name, np.int64) for name in ("operand", "arrival")])
"""An operand of the sparser engine, and its place in the index stream: the lines' first
entries, then their second ones, ...; under "lockstep" vector after vector."""


class Assignment(NamedTuple):
    """The pieces and entries of one product, line after line.

    line_piece   int64 [lines + 1]: line l has the pieces line_piece[l]:line_piece[l + 1]
    line_entry   int64 [lines + 1]: likewise its entries, in the order of its pieces
    pieces       PIECE
    entries      ENTRY
    denser_lines, sparser_lines   the split
    starts       how often the sparser engine must be told where a vector begins: for each
                 piece under "balanced", else for each vector
    """

    line_piece: np.ndarray
    line_entry: np.ndarray
    pieces: np.ndarray
    entries: np.ndarray
    denser_lines: int
    sparser_lines: int
    starts: int


@compiled
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


@compiled
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
    best, best_length = 1, 2**62
    for denser in range(1, lines):
        sparser = (entries + lines - denser - 1) // (lines - denser)
        length = max(denser_length(vectors, operands, denser), sparser)
        if length < best_length:
            best, best_length = denser, length
    return best, lines - best


@compiled
def _cut(pieces, count, vector, first, total, parts, line, turn):
    """Cut ``total`` operands of a vector into ``parts`` pieces on lines ``line``, ...;
    returns the number of pieces then."""
    for part in range(parts):
        piece = pieces[count + part]
        begin = total * part // parts
        piece.line, piece.vector, piece.round = line + part, vector, turn
        piece.first, piece.length = first + begin, total * (part + 1) // parts - begin
    return count + parts


@compiled
def _denser_pieces(pieces, vectors, operands, lines):
    """Pieces of the dense block; returns their number."""
    full, rest = divmod(vectors, lines)
    count, line = ZERO, ZERO
    for vector in range(full * lines):
        line = vector % lines
        count = _cut(pieces, count, vector, ZERO, operands, ONE, line, DENSE_ROUND)
    line = ZERO
    for index in range(rest):
        sharing = lines // rest + (1 if index < lines % rest else 0)
        parts, vector = min(sharing, operands), full * lines + index
        count = _cut(pieces, count, vector, ZERO, operands, parts, line, DENSE_ROUND)
        line += sharing
    return count


@compiled
def _sorted_by(keys):
    """Positions of small non-negative numbers in ascending order, equals in their order."""
    most = 0
    for index in range(keys.size):
        most = max(most, keys[index])
    begin = np.zeros(most + 2, np.int64)
    for index in range(keys.size):
        begin[keys[index] + 1] += 1
    for key in range(most):
        begin[key + 1] += begin[key]
    order = np.empty(keys.size, np.int64)
    for index in range(keys.size):
        order[begin[keys[index]]] = index
        begin[keys[index]] += 1
    return order


@compiled
def _lightest(loads):
    """The line with the least load; ties: the lowest."""
    best = 0
    for line in range(1, loads.size):
        if loads[line] < loads[best]:
            best = line
    return best


@compiled
def _balanced_pieces(pieces, start, indptr, indices, base, lines, shift):
    """Cut at the fair share; longest first to the lightest line."""
    count, fair = start, (indptr[-1] + lines - 1) // lines
    for vector in range(indptr.size - 1):
        total = indptr[vector + 1] - indptr[vector]
        parts = (total + fair - 1) // fair
        count = _cut(pieces, count, vector, indptr[vector], total, parts, ZERO, ZERO)
    cut = pieces[start:count].copy()
    keys, loads = np.empty(cut.size, np.int64), np.zeros(lines, np.int64)
    for index in range(cut.size):
        keys[index] = fair - cut[index].length
    order = _sorted_by(keys)
    for index in range(cut.size):
        piece = cut[order[index]]
        line = _lightest(loads)
        loads[line] += piece.length
        piece.line = base + line
    # Inside a line by the time its data is in: vectors and operands arrive in order.
    for index in range(cut.size):
        piece = cut[index]
        keys[index] = max(piece.vector + shift, indices[piece.first + piece.length - 1])
    order = _sorted_by(keys)
    for index in range(cut.size):
        pieces[start + index] = cut[order[index]]
    return count


@compiled
def _round_robin_pieces(pieces, count, indptr, base, lines):
    for vector in range(indptr.size - 1):
        total, line = indptr[vector + 1] - indptr[vector], base + vector % lines
        parts = min(total, ONE)
        count = _cut(pieces, count, vector, indptr[vector], total, parts, line, ZERO)
    return count


@compiled
def _lockstep_pieces(pieces, count, indptr, base, lines):
    turn = ZERO
    for vector in range(indptr.size - 1):
        total = indptr[vector + 1] - indptr[vector]
        parts = min(total, lines)
        count = _cut(pieces, count, vector, indptr[vector], total, parts, base, turn)
        turn += parts > 0
    return count


@compiled
def _line_starts(pieces, lines):
    """First piece, and first entry, of each line once they stand line after line."""
    line_piece = np.zeros(lines + 1, np.int64)
    line_entry = np.zeros(lines + 1, np.int64)
    for index in range(pieces.size):
        piece = pieces[index]
        line_piece[piece.line + 1] += 1
        if piece.round != DENSE_ROUND:
            line_entry[piece.line + 1] += piece.length
    for line in range(lines):
        line_piece[line + 1] += line_piece[line]
        line_entry[line + 1] += line_entry[line]
    return line_piece, line_entry


@compiled
def _by_line(pieces, indices, line_piece, line_entry, in_turn):
    """Pieces and their entries line after line, the order inside a line kept.

    ``in_turn``: the index stream serves the lines in turn, else vector after vector.
    """
    next_piece, next_entry = line_piece.copy(), line_entry.copy()
    # Numba reads the fields of a record as attributes, which arrays of NumPy do not have.
    moved: Any = np.empty(pieces.size, PIECE)
    entries: Any = np.empty(indices.size, ENTRY)
    keys = np.empty(indices.size, np.int64)
    for index in range(pieces.size):
        line = pieces[index].line
        piece = moved[next_piece[line]]
        moved[next_piece[line]] = pieces[index]
        next_piece[line] += 1
        if piece.round != DENSE_ROUND:
            start = next_entry[line]
            for offset in range(piece.length):
                place = start + offset
                entries[place].operand = indices[piece.first + offset]
                keys[place] = place - line_entry[line] if in_turn else piece.first + offset
            piece.first = start
            next_entry[line] += piece.length
    order = _sorted_by(keys)
    for index in range(order.size):
        entries[order[index]].arrival = index
    return moved, entries


@cached
def _assign(indptr, indices, dense_vectors, dense_operands, lines, policy, shift):
    total = indptr[-1]
    denser, sparser = split_lines(dense_vectors, dense_operands, total, lines)
    base = denser if denser + sparser <= lines else 0
    room = dense_vectors + lines + (indptr.size + lines) * (lines if policy == LOCKSTEP else 1)
    pieces = np.empty(room, PIECE)
    count = ZERO
    if denser > 0:
        count = _denser_pieces(pieces, dense_vectors, dense_operands, denser)
    start = count
    if total > 0:
        if policy == BALANCED:
            count = _balanced_pieces(pieces, count, indptr, indices, base, sparser, shift)
        elif policy == ROUND_ROBIN:
            count = _round_robin_pieces(pieces, count, indptr, base, sparser)
        else:
            count = _lockstep_pieces(pieces, count, indptr, base, sparser)
    for index in range(start, count):
        pieces[index].vector += shift
    line_piece, line_entry = _line_starts(pieces[:count], lines)
    moved, entries = _by_line(pieces[:count], indices, line_piece, line_entry, policy != LOCKSTEP)
    starts = count - start if policy == BALANCED or total == 0 else indptr.size - 1
    return line_piece, line_entry, moved, entries, denser, sparser, starts


def assign(
    indptr: np.ndarray,
    indices: np.ndarray,
    dense_vectors: int,
    dense_operands: int,
    lines: int,
    policy: str,
    first_sparser: int = 0,
) -> Assignment:
    """Share one product out to ``lines``.

    The denser block is ``dense_vectors`` x ``dense_operands``, both from 0. Sparser vector
    ``first_sparser + v`` has the operands ``indices[indptr[v]:indptr[v + 1]]``, ascending: in
    SDDMM the sparser keys follow the global ones, in SpMM both engines hold the same rows.
    """
    return Assignment(
        *_assign(
            np.asarray(indptr, dtype=np.int64),
            np.asarray(indices, dtype=np.int64),
            dense_vectors,
            dense_operands,
            lines,
            POLICIES[policy],
            first_sparser,
        )
    )
