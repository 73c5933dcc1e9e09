"""Index encodings by hand, and entry by entry against plain ones."""

from __future__ import annotations

import numpy as np
import pytest
from naive_index import stage_index

from sievit.accel.encodings import ENCODINGS, Stream, Widths
from sievit.accel.hardware import Hardware
from sievit.accel.schedule import ASSIGNMENTS, Schedule
from sievit.accel.vitcod.coded import coded_tile
from sievit.accel.vitcod.mapper import choose
from sievit.accel.vitcod.pattern import SDDMM, SPMM, Pattern, plan_tile
from sievit.workload import Attention, polarize_head

LINES = 4


def stream(keep, kind=SDDMM, assignment="balanced"):
    """All of a mask without global keys as one stage."""
    queries, keys = keep.shape
    pattern = Pattern.of(polarize_head(keep, "none"))
    made = plan_tile(
        pattern,
        slice(0, queries),
        slice(0, keys),
        kind,
        LINES,
        Schedule(assignment=assignment),
    )
    operands, vectors = (queries, keys) if kind == SDDMM else (keys, queries)
    named = assignment == "balanced"
    return Stream(made, named, operands, 0, vectors, 0, int(keep.sum()), max(keep.shape))


def encoded(name, keep, **how):
    """(held bits, bits of all entries)"""
    made = ENCODINGS[name].encode(stream(keep, **how))
    return made.held_bits, int(made.entry_bits.sum())


def cls_and(queries, keys, *others):
    """The row of CLS, and (query, key) pairs."""
    keep = np.zeros((queries, keys), dtype=bool)
    keep[0] = True
    for query, key in others:
        keep[query, key] = True
    return keep


def test_the_row_of_cls_costs_a_relative_stage_one_number():
    keep = cls_and(10, 4, (3, 0), (9, 2))
    # 8 bits for the number of rows that are apart; a piece for each key: 2 bits say that it has
    # 1 or 2 entries, CLS's with them, and 2 which of 4 keys it is
    lengths = stream(keep).lengths.tolist()
    assert sorted(lengths) == [1, 1, 2, 2]
    assert encoded("relative", keep) == (8 + 4 * (2 + 2), 2 * 8)
    # the rows of SpMM have no key in common: all six entries count; that of CLS is cut in two,
    # and 4 bits say which of 10 rows a piece is of
    assert sorted(stream(keep, SPMM).lengths.tolist()) == [1, 1, 2, 2]
    assert encoded("relative", keep, kind=SPMM) == (8 + 4 * (2 + 4), 6 * 8)


def test_a_start_says_how_many_entries_lie_in_each_block_but_the_last():
    tall = cls_and(257, 2, (5, 0), (256, 1))  # 256 operands after CLS: one block
    taller = cls_and(258, 2, (5, 0), (257, 1))
    rounds = {"assignment": "round_robin"}
    assert encoded("relative", tall, **rounds) == (8 + 2 * 2, 2 * 8)
    assert encoded("relative", taller, **rounds) == (8 + 2 * (2 + 9), 2 * 8)
    without = tall.copy()
    without[0, 0] = False  # CLS is an entry like others then: 257 operands
    assert encoded("relative", without, **rounds) == (8 + 2 * (2 + 9), 3 * 8)


def test_no_more_than_255_first_operands_are_taken_apart():
    keep = np.ones((300, 2), dtype=bool)
    assert encoded("relative", keep, assignment="round_robin") == (8 + 2 * 9, 2 * 45 * 8)


def test_an_empty_stage_holds_nothing():
    for name in ENCODINGS:
        assert encoded(name, np.zeros((5, 3), dtype=bool)) == (0, 0)


def test_an_absolute_stage_has_pointers_and_names():
    keep = cls_and(10, 4, (3, 0), (9, 2))
    assert encoded("absolute", keep) == (4 * (16 + 8), 6 * 8)
    assert encoded("absolute", keep, assignment="round_robin") == (4 * 16, 6 * 8)
    large = cls_and(300, 4, (3, 0))
    assert encoded("absolute", large) == (len(stream(large).lengths) * (16 + 16), 5 * 16)


def test_bounds_of_the_absolute_encoding_are_its_widths():
    bounds = ENCODINGS["absolute"].bounds
    assert bounds(197, 197, 1000, False) == Widths(16, 8, 16)
    assert bounds(197, 197, 1000, True) == Widths(24, 8, 16)
    assert bounds(257, 9, 70_000, False) == Widths(32, 16, 32)


def test_the_default_stands_first_and_others_are_named():
    assert list(ENCODINGS) == ["relative", "absolute"]
    assert Schedule().index_encoding == "relative"
    with pytest.raises(ValueError, match="index_encoding must be one of relative, absolute, got"):
        Schedule(index_encoding="runs")


def random_tile(seed):
    rng = np.random.default_rng(seed)
    queries, keys = (int(size) for size in rng.choice([1, 5, 40, 300], 2))
    keep = rng.random((queries, keys)) < rng.choice([0.02, 0.3])
    if rng.random() < 0.7:
        keep[0] = True
    mask = polarize_head(keep, ("none", 0.5, 1)[rng.integers(3)])
    op = Attention("call", 1, queries, keys, 4, 4, masks=(mask,))
    schedule = Schedule(
        assignment=ASSIGNMENTS[seed % 3],
        index_encoding=list(ENCODINGS)[seed % 2],
        index_streams=1 + seed // 2 % 2,
    )
    rows, columns = (sorted(rng.integers(0, size + 1, 2)) for size in (queries, keys))
    tiles = [slice(int(a), int(max(b, a + 1))) for a, b in (rows, columns) if a < b]
    return op, schedule, tiles


@pytest.mark.parametrize("seed", range(120))
def test_every_tile_takes_the_bits_of_the_plain_encoder_within_the_bounds(seed):
    op, schedule, tiles = random_tile(seed)
    if len(tiles) < 2:
        tiles = [slice(0, op.queries), slice(0, op.keys)]
    rows, keys = tiles
    mapping = choose(op, Hardware(lines=LINES, sorted_lists=True), schedule)
    for kind in (SDDMM, SPMM):
        coded = coded_tile(mapping, 0, rows, keys, kind)
        made = coded.assignment
        pieces = [
            (int(p["line"]), int(p["vector"]),
             made.entries["operand"][p["first"] : p["first"] + p["length"]].tolist())
            for p in made.pieces if p["round"] >= 0
        ]  # fmt: skip
        held, order = stage_index(mapping, kind, 0, rows, keys, pieces)
        assert coded.held_bytes == held
        assert coded.stream_bits == sum(bits for *_, bits in order)
        if order:
            assert coded.streamed == len(order) == len(made.entries)
            assert made.entries["size"].sum() == coded.stream_bytes
        widths = mapping.widths
        assert all(bits <= widths.entry_bits + 8 * mapping.address_bytes for *_, bits in order)
        starts = made.starts * widths.start_bits + widths.stage_bits
        assert 8 * held < starts + 8
