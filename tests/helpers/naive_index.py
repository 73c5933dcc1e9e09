"""The index of a stage again, entry by entry: bits of both encodings as their words have them."""

from __future__ import annotations

from types import SimpleNamespace

from sievit.accel.vitcod.pattern import SDDMM


def bits_for(largest):
    """Of an unsigned number up to ``largest``, one at least."""
    return max(len(f"{largest:b}"), 1)


def stage_index(mapping, kind, head, rows, keys, pieces):
    """(held bytes, stream) of a stage's sparser ``pieces``, (line, vector, operands) each.

    The stream is [(line, number of the line's entry, bits)] in the order in which it comes, an
    entry's bits with the address of its score where it has one. Empty where SpMM reads lists.
    """
    if not pieces:
        return 0, []
    schedule = mapping.schedule
    tile = _tile(mapping, kind, head, rows, keys)
    held, bits = {"absolute": _absolute, "relative": _relative}[schedule.index_encoding](
        mapping, tile, pieces
    )
    address = 0
    if schedule.index_streams == 2 and kind == SDDMM:
        address = 16 if most_entries(mapping) <= 65536 else 32
    if schedule.index_streams == 1 and kind != SDDMM:
        return -(-held // 8), []
    order = _in_turn(pieces) if schedule.assignment != "lockstep" else _by_vector(pieces)
    return -(-held // 8), [(line, n, bits(operand) + address) for line, n, operand in order]


def keys_of(mapping, head, rows):
    """The keys of a unit, in the order of the head: all, or where they are loaded again for each
    tile of queries the global ones and those that one of the unit's queries keeps."""
    op, every = mapping.op, list(range(mapping.op.keys))
    in_tiles = mapping.query_tile < op.queries and mapping.key_tile < op.keys
    again = mapping.schedule.query_loads == "per_key_tile" and not op.codec
    if again or not (op.masks and in_tiles and mapping.schedule.key_loads == "used"):
        return every
    kept = op.masks[head].reordered()[rows]
    return [k for k in every if k < op.masks[head].num_global or kept[:, k].any()] or [0]


def tiles_of(mapping, head, rows):
    """Tiles of them, by their places."""
    count, size = len(keys_of(mapping, head, rows)), mapping.key_tile
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _tile(mapping, kind, head, rows, keys):
    """Operands and vectors of the tile's sparser part, and the number of its first operand."""
    globals_ = mapping.op.masks[head].num_global
    dense = sum(key < globals_ for key in range(keys.start, keys.stop))
    queries, sparser = rows.stop - rows.start, keys.stop - keys.start - dense
    if kind == SDDMM:
        return SimpleNamespace(operands=queries, first=0, vectors=sparser)
    return SimpleNamespace(operands=sparser, first=dense, vectors=queries)


def most_entries(mapping):
    """Of the sparser part of a head."""
    return max((mask.sparser_kept for mask in mapping.op.masks or ()), default=0)


def _starts(mapping, tile, pieces):
    """A start for each piece; where lines take vectors in order, for each vector."""
    return len(pieces) if mapping.schedule.assignment == "balanced" else tile.vectors


def _absolute(mapping, tile, pieces):
    entry = 8 if max(mapping.op.queries, mapping.op.keys) <= 256 else 16
    pointer = 16 if most_entries(mapping) < 65536 else 32
    named = entry if mapping.schedule.assignment == "balanced" else 0
    return _starts(mapping, tile, pieces) * (pointer + named), lambda operand: entry


def _relative(mapping, tile, pieces):
    """One number of 8 bits says how many first operands every vector keeps."""
    kept = {}
    for _, vector, operands in pieces:
        kept.setdefault(vector, set()).update(operand - tile.first for operand in operands)
    apart = 0
    while apart < 255 and all(apart in operands for operands in kept.values()):
        apart += 1
    later_blocks = len(range(256, tile.operands - apart, 256))
    start = bits_for(max(len(operands) for _, _, operands in pieces)) + 9 * later_blocks
    if mapping.schedule.assignment == "balanced":
        start += bits_for(tile.vectors - 1)
    held = 8 + _starts(mapping, tile, pieces) * start
    return held, lambda operand: 0 if operand - tile.first < apart else 8


def _in_turn(pieces):
    """(line, number, operand): the lines' first entries, then their second ones, ..."""
    lines = {}
    for line, _, operands in pieces:
        lines.setdefault(line, []).extend(operands)
    for number in range(max(map(len, lines.values()))):
        for line in sorted(lines):
            if number < len(lines[line]):
                yield line, number, lines[line][number]


def _by_vector(pieces):
    """... : vector after vector, the operands of each in order."""
    read, entries = {}, []
    for line, vector, operands in pieces:
        for operand in operands:
            entries.append((vector, operand, line, read.get(line, 0)))
            read[line] = read.get(line, 0) + 1
    for _, operand, line, number in sorted(entries):
        yield line, number, operand


def unit_bytes(mapping, head, rows):
    """What a unit holds: a bit for each entry of its dense block, and how long the list of each
    row is, in as many bits as a row of all keys needs."""
    if not mapping.op.masks:
        return 0
    mask, count = mapping.op.masks[head], rows.stop - rows.start
    size = 0 if mask.global_keep.all() else -(-count * mask.num_global // 8)
    if mapping.schedule.index_streams == 1 and mask.sparser_kept:
        width = bits_for(mapping.op.keys)
        if mapping.schedule.index_encoding == "absolute":
            width = 16 if most_entries(mapping) < 65536 else 32
        size += -(-count * width // 8)
    return size
