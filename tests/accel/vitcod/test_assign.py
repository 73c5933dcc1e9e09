"""Work shared out to the lines: nothing lost, nothing twice, each policy by its own rule."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from sievit.accel.schedule import ASSIGNMENTS
from sievit.accel.vitcod.assign import DENSE_ROUND, assign, denser_length, split_lines


def random_sparse(rng):
    """(indptr, indices) of up to 14 vectors over 20 operands, some empty, one nearly full."""
    keep = rng.random((rng.integers(1, 15), 20)) < rng.choice([0.0, 0.1, 0.5])
    if rng.random() < 0.5:
        keep[rng.integers(len(keep))] = rng.random(20) < 0.95
    lengths = keep.sum(axis=1)
    return np.concatenate(([0], np.cumsum(lengths))), np.nonzero(keep)[1]


def random_case(seed, policy):
    rng = np.random.default_rng(seed)
    indptr, indices = random_sparse(rng)
    dense = (int(rng.integers(0, 7)), int(rng.integers(0, 12)))
    lines, shift = int(rng.integers(1, 9)), int(rng.integers(0, 5))
    made = assign(indptr, indices, *dense, lines, policy, (50, 100, 108)[seed % 3], shift)
    return indptr, indices, dense, lines, shift, made


def by_line(made):
    """Pieces as (round, vector, operands), line by line."""
    lines = []
    for first, last in pairwise(made.line_piece):
        pieces = []
        for piece in made.pieces[first:last]:
            operands = range(piece["first"], piece["first"] + piece["length"])
            if piece["round"] != DENSE_ROUND:
                operands = made.entries["operand"][operands].tolist()
            pieces.append((int(piece["round"]), int(piece["vector"]), list(operands)))
        lines.append(pieces)
    return lines


@pytest.mark.parametrize("policy", ASSIGNMENTS)
@pytest.mark.parametrize("seed", range(40))
def test_every_operand_is_assigned_once(seed, policy):
    indptr, indices, dense, lines, shift, made = random_case(seed, policy)
    times = {"dense": np.zeros(dense, int), "sparse": np.zeros((len(indptr) - 1, 20), int)}
    for line, pieces in enumerate(by_line(made)):
        for turn, vector, operands in pieces:
            assert operands
            if turn == DENSE_ROUND:
                assert line < made.denser_lines
                times["dense"][vector, operands] += 1
            else:
                assert lines == 1 or line >= made.denser_lines
                times["sparse"][vector - shift, operands] += 1
    wanted = np.zeros_like(times["sparse"])
    wanted[np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)), indices] = 1
    assert (times["dense"] == 1).all()
    assert np.array_equal(times["sparse"], wanted)
    assert made.line_entry[-1] == len(made.entries) == len(indices)


@pytest.mark.parametrize("policy", ASSIGNMENTS)
@pytest.mark.parametrize("seed", range(40))
def test_entries_arrive_in_an_order_that_cannot_block(seed, policy):
    """Each line reads its entries in the order of arrival; lockstep: no entry of a later
    round comes before one of an earlier round."""
    *_, made = random_case(seed, policy)
    arrival = made.entries["arrival"]
    assert sorted(arrival) == list(range(len(arrival)))
    rounds = np.empty(len(arrival), int)
    for piece in made.pieces[made.pieces["round"] != DENSE_ROUND]:
        rounds[arrival[piece["first"] : piece["first"] + piece["length"]]] = piece["round"]
    assert (np.diff(rounds) >= 0).all()
    for first, last in pairwise(made.line_entry):
        assert (np.diff(arrival[first:last]) > 0).all()


def naive_balanced(indptr, indices, lines, shift):
    """Longest first to the lightest line, cut at the fair share: the rule in plain words."""
    vectors = [indices[a:b].tolist() for a, b in pairwise(indptr)]
    fair = -(-len(indices) // lines)
    pieces = []
    for number, operands in enumerate(vectors):
        parts = -(-len(operands) // fair)
        for part in range(parts):
            cut = slice(len(operands) * part // parts, len(operands) * (part + 1) // parts)
            pieces.append((number, operands[cut]))
    loads, got = [0] * lines, [[] for _ in range(lines)]
    for number, operands in sorted(pieces, key=lambda piece: -len(piece[1])):
        line = loads.index(min(loads))
        loads[line] += len(operands)
        got[line].append((0, number + shift, operands))
    when = {id(p): max(p[1], p[2][-1]) for line in got for p in line}
    order = {(n + shift, tuple(o)): i for i, (n, o) in enumerate(pieces)}
    return [
        sorted(line, key=lambda p: (when[id(p)], order[p[1], tuple(p[2])])) for line in got
    ], loads


@pytest.mark.parametrize("seed", range(60))
def test_balanced_is_longest_first_to_the_lightest_line(seed):
    indptr, indices, _, _, shift, made = random_case(seed, "balanced")
    if not len(indices):
        assert made.starts == 0
        return
    lines = [[p for p in line if p[0] != DENSE_ROUND] for line in by_line(made)]
    if made.denser_lines and made.sparser_lines and len(lines) > 1:
        lines = lines[made.denser_lines :]
    wanted, loads = naive_balanced(indptr, indices, made.sparser_lines, shift)
    assert [line for line in lines if line] == [line for line in wanted if line]
    fair = -(-len(indices) // made.sparser_lines)
    assert max(loads) < 2 * fair  # Graham's bound with pieces of at most a fair share
    assert made.starts == sum(map(len, lines))


@pytest.mark.parametrize("seed", range(40))
def test_round_robin_keeps_vectors_whole_and_in_turn(seed):
    indptr, indices, _, lines, shift, made = random_case(seed, "round_robin")
    base = made.denser_lines if lines > 1 else 0
    for line, pieces in enumerate(by_line(made)):
        sparser = [(vector - shift, ops) for turn, vector, ops in pieces if turn != DENSE_ROUND]
        for vector, operands in sparser:
            assert line == base + vector % made.sparser_lines
            assert operands == indices[indptr[vector] : indptr[vector + 1]].tolist()
        assert sparser == sorted(sparser)
    assert made.starts == (len(indptr) - 1 if len(indices) else 0)


@pytest.mark.parametrize("seed", range(40))
def test_lockstep_has_one_vector_a_round_spread_evenly(seed):
    indptr, _, _, _, shift, made = random_case(seed, "lockstep")
    lengths = np.diff(indptr)
    of_round = {}
    for pieces in by_line(made):
        for turn, vector, operands in pieces:
            if turn != DENSE_ROUND:
                of_round.setdefault(turn, []).append((vector - shift, len(operands)))
    assert sorted(of_round) == list(range(np.count_nonzero(lengths)))
    for turn, vector in enumerate(np.flatnonzero(lengths)):
        parts = of_round[turn]
        assert {number for number, _ in parts} == {vector}
        assert len(parts) == min(lengths[vector], made.sparser_lines)
        assert max(n for _, n in parts) - min(n for _, n in parts) <= 1


@pytest.mark.parametrize("vectors", [0, 1, 3, 8, 9, 20])
@pytest.mark.parametrize("operands", [1, 2, 7, 30])
@pytest.mark.parametrize("entries", [0, 1, 50, 500])
@pytest.mark.parametrize("percent", [10, 100, 108, 250])
def test_split_ends_first_of_all_splits(vectors, operands, entries, percent):
    """Where an entry of the sparser engine takes ``percent`` of the time of an operand."""
    lines = 8
    nothing = np.zeros(0, dtype=np.int64)

    def slower(denser):
        made = assign(np.zeros(1), nothing, vectors, operands, denser, "balanced", 100)
        loads = [sum(len(ops) for *_, ops in pieces) for pieces in by_line(made)]
        assert max(loads) == denser_length(vectors, operands, denser)
        return max(max(loads), -(-(entries * percent // 100) // (lines - denser)))

    denser, sparser = split_lines(vectors, operands, entries, lines, percent)
    if not vectors:
        assert (denser, sparser) == (0, lines)
    elif not entries:
        assert (denser, sparser) == (lines, 0)
    else:
        lengths = [slower(d) for d in range(1, lines)]
        assert denser == 1 + lengths.index(min(lengths))
        assert sparser == lines - denser


def test_one_line_serves_both_engines():
    assert split_lines(3, 4, 5, 1, 108) == (1, 1)
