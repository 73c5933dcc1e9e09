"""Bank conflicts of gathered rows against walks over words and groups."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from sievit.accel import presets, simulate
from sievit.accel.products import layouts
from sievit.accel.products.array import Array
from sievit.accel.schedule import Schedule
from sievit.accel.simulators import banks
from sievit.accel.simulators.held import PackedCall
from sievit.workload import Attention, Workload, polarize_head

VITCOD = presets["vitcod"]


def walked(tokens, banks_there, words):
    """Cycles in which each bank gives the words of its tokens, one a cycle."""
    left = Counter(int(token) % banks_there for token in tokens for _ in range(words))
    cycles = 0
    while left:
        left = Counter({bank: count - 1 for bank, count in left.items() if count > 1})
        cycles += 1
    return cycles


def test_the_fullest_bank_against_a_walk():
    generator = np.random.default_rng(0)
    for _ in range(60):
        groups, tokens, count = (int(generator.integers(1, high)) for high in (6, 90, 40))
        taken = generator.random((groups, tokens)) < generator.random()
        found = banks.fullest(taken, count)
        assert found.tolist() == [walked(np.flatnonzero(row), count, 1) for row in taken]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_tiles_wait_for_their_slower_side(turned, seed):
    """A product of 31 gathered rows and 22 gathered columns, tile by tile."""
    generator = np.random.default_rng(seed)
    hardware = replace(VITCOD, lines=16, macs_per_line=4)
    side = "features_on_lines" if turned else "tokens_on_lines"
    array = Array.of(hardware, Schedule(dense_orientation=side))
    rows, columns = (np.sort(generator.permutation(90)[:n]) for n in (31, 22))
    there, words, steps = (int(generator.integers(2, 9)), 8), 3, 10
    seen = set()
    for layout in layouts(31, 22, steps, array):
        got = banks.tiles_wait(layout, (rows, columns), there, hardware, words, steps)
        if layout.dataflow != "os":
            assert got == 0
            continue
        wide, high = min(4, 31 if turned else 22), layout.stripe
        if turned:
            high, wide = layout.stripe, layout.tile_results // min(4, 31)
        expected = 0
        for i in range(0, 31, high):
            for j in range(0, 22, wide):
                slowest = max(
                    walked(rows[i : i + high], there[0], words),
                    walked(columns[j : j + wide], there[1], words),
                )
                expected += max(slowest - -(-steps // layout.parts), 0)
        assert got == expected
        seen.add(expected)
    assert len(seen) > 2


def test_values_are_gathered_token_by_token():
    """64 tokens of which every 8th is kept: all of them in one bank of eight."""
    hardware = replace(VITCOD, lines=8, macs_per_line=4, v_banks=8)
    plain = Schedule(dense_dataflow="os", dense_orientation="tokens_on_lines")
    (layout,) = layouts(8, 12, 64, Array.of(hardware, plain))
    spread, one_bank = np.arange(64), np.arange(0, 512, 8)
    assert banks.streams_wait(layout, 8, spread, 12, hardware) == 0
    assert banks.streams_wait(layout, 8, one_bank, 12, hardware) == 0  # a token a cycle
    half = replace(layout, parts=2)
    assert banks.streams_wait(half, 8, spread, 12, hardware) == 0
    assert banks.streams_wait(half, 8, one_bank, 12, hardware) == 3 * (64 - 32)


# ---------------------------------------------------------------- packed rows


def packed_rows(keep, width):
    """[[(query, key)]] of the array rows of one head: long rows split, remainders best fit."""
    rows = []
    for query, kept in enumerate(keep):
        keys = np.flatnonzero(kept).tolist()
        while len(keys) >= width:
            rows.append([(query, key) for key in keys[:width]])
            keys = keys[width:]
        if keys:
            fits = [(width - len(row), i) for i, row in enumerate(rows)]
            fits = [(free, i) for free, i in fits if free >= len(keys)]
            if not fits:
                rows.append([])
            rows[min(fits)[1] if fits else -1].extend((query, key) for key in keys)
    return rows


@pytest.mark.parametrize("heads_a_unit", [1, 2, 3])
@pytest.mark.parametrize("lines", [4, 32])
def test_packed_groups_against_a_walk(heads_a_unit, lines):
    """Cycles, reads and waits of all groups, Q, K and V of a unit's heads behind each other."""
    keep = np.random.default_rng(lines).random((3, 37, 53)) < 0.3
    masks = tuple(polarize_head(head, 0.5) for head in keep)
    op = Attention("a", 3, 37, 53, 24, 20, masks=masks)
    hardware = replace(VITCOD, lines=lines, q_banks=4, k_banks=3, v_banks=2)
    call = PackedCall(op, hardware, Schedule(dense_dataflow="os"), 2, 37, heads_a_unit)
    held = call.held()
    units = {1: [[0], [1], [2]], 2: [[0, 1], [2]], 3: [[0, 1, 2]]}[heads_a_unit]
    groups = waited = queries_read = keys_read = 0
    for heads in units:
        rows = []
        for slot, head in enumerate(heads):
            for row in packed_rows(keep[head], 8):
                rows.append([(query + 37 * slot, key + 53 * slot) for query, key in row])
        for start in range(0, len(rows), lines):
            entries = [entry for row in rows[start : start + lines] for entry in row]
            queries, keys = ({entry[side] for entry in entries} for side in (0, 1))
            scored = max(walked(queries, 4, 3), walked(keys, 3, 3))
            waited += max(scored - 24, 0) + max(walked(keys, 2, 3) - 20, 0)
            groups += 1
            queries_read += len(queries)
            keys_read += len(keys)
    skew = (lines + 8 - 2) * len(units)
    assert (held.sddmm, held.spmm) == (2 * (24 * groups + skew), 2 * (20 * groups + skew))
    assert held.waited == 2 * waited > 0
    assert (held.query_reads, held.key_reads) == (2 * queries_read, 2 * keys_read)


@pytest.mark.parametrize("simulator", ["sanger", "spatten"])
def test_conflicts_are_charged_and_more_banks_take_them_away(simulator):
    keep = np.zeros((1, 128, 128), dtype=bool)
    keep[0, :, ::32] = keep[0, ::32] = True
    mask = polarize_head(keep[0], "none")
    op = Attention("a", 1, 128, 128, 64, 64, masks=(mask,))
    work = Workload("w", (op,))
    few = replace(VITCOD, q_banks=2, k_banks=2, v_banks=2)
    how = Schedule(on_chip="nothing", dense_dataflow="os")
    waits = [
        simulate(work, hardware, simulator, schedule=how).attention[0].phases.get("gather", 0)
        for hardware in (few, replace(few, q_banks=512, k_banks=512, v_banks=512))
    ]
    assert waits[0] > waits[1] == 0
