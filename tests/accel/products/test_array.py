"""Dense products on the array: published closed forms, stepped arrays, and what "best" finds."""

from __future__ import annotations

from dataclasses import replace
from itertools import product as every
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.accel import Hardware, presets
from sievit.accel.products import array_cycles, laid_out, layouts
from sievit.accel.products.array import NEAR, Array, _parts, _split_k
from sievit.accel.schedule import DATAFLOWS, FILLS, ORIENTATIONS, Schedule

VITCOD = presets["vitcod"]
OLD = Schedule(dense_dataflow="os", dense_orientation="tokens_on_lines", vector_fusion="apart")
QUICK = settings(derandomize=True, deadline=None, max_examples=150)
SIZES = st.one_of(st.integers(1, 40), st.integers(1, 900))


def machine(
    height: int, width: int, dataflow: str, fill: str = "per_tile"
) -> tuple[Hardware, Schedule]:
    hardware = replace(VITCOD, lines=height, macs_per_line=width)
    return hardware, replace(OLD, dense_dataflow=dataflow, dense_fill=fill)


def test_published_closed_forms_on_random_shapes():
    generator = np.random.default_rng(0)
    for _ in range(200):
        m, n, k = (int(x) for x in generator.integers(1, 900, 3))
        h, w = (int(x) for x in generator.choice([4, 8, 16, 32, 64], 2))
        expected = {
            "os": ceil(m / h) * ceil(n / w) * (k + h + w - 2),
            "ws": ceil(k / h) * ceil(n / w) * (m + 2 * h + w - 2),
            "is": ceil(k / h) * ceil(m / w) * (n + 2 * h + w - 2),
        }
        for dataflow, cycles in expected.items():
            assert array_cycles(m, n, k, *machine(h, w, dataflow)) == cycles


# ---------------------------------------------------------------- the array, stepped


def fed(stream, at):
    """(tile, step, number) of what a stream feeds, number -1 before its begin and after its end."""
    return (*stream[at], at) if 0 <= at < len(stream) else ((0, 0), 0, -1)


def stepped(left, right, height, width, tiles):
    """An array of PEs stepped cycle by cycle; returns (cycles, product).

    Output-stationary: PE (i, j) adds up what passes it, rows of ``left`` coming from the left
    and columns of ``right`` from above, each lane one cycle behind the one before; ``tiles``
    are walked one after the other without a gap.
    """
    m, k, n = *left.shape, right.shape[1]
    product = np.zeros((m, n), dtype=np.int64)
    row_in, col_in = (np.zeros((height, width), dtype=np.int64) for _ in range(2))
    tags = np.full((height, width), -1)  # which step of the stream is in each PE
    stream = [(tile, step) for tile in tiles for step in range(k)]
    done, cycle = 0, 0
    while done < len(tiles) * k * height * width:
        row_in[:, 1:], col_in[1:] = row_in[:, :-1].copy(), col_in[:-1].copy()
        tags[:, 1:] = tags[:, :-1].copy()
        for lane in range(height):
            (top, _), step, tags[lane, 0] = fed(stream, cycle - lane)
            inside = tags[lane, 0] >= 0 and top + lane < m
            row_in[lane, 0] = left[top + lane, step] if inside else 0
        for lane in range(width):
            (_, left_col), step, tag = fed(stream, cycle - lane)
            inside = tag >= 0 and left_col + lane < n
            col_in[0, lane] = right[step, left_col + lane] if inside else 0
        for i, j in np.argwhere(tags >= 0):
            (top, left_col), _ = stream[tags[i, j]]
            if top + i < m and left_col + j < n:
                product[top + i, left_col + j] += row_in[i, j] * col_in[i, j]
            done += 1
        cycle += 1
    return cycle, product


def held(moving, stays, height, width, tiles):
    """An array that holds ``stays`` [k, n] tile by tile while ``moving`` [m, k] passes.

    A tile's weights move down one row a cycle into a second register of each PE; a tile
    starts when the last ones are down, its rows enter lane i one cycle after lane i - 1, and
    sums leave at the foot of a column. The next weights start down when the tile starts.
    """
    (m, k), n = moving.shape, stays.shape[1]
    product, down, last = np.zeros((m, n), dtype=np.int64), height, 0
    entry = 0  # the first cycle in which lane 0 may take a row of the next tile
    for top, first in tiles:
        start = max(down, entry)
        down = start + height  # the next tile's weights, behind the switch of each row
        weights = np.zeros((height, width), dtype=np.int64)
        part = stays[top : top + height, first : first + width]
        weights[: part.shape[0], : part.shape[1]] = part
        for row in range(m):
            for column in range(width):
                total = 0
                for lane in range(height):  # the sum meets lane i at start + row + i + column
                    x = moving[row, top + lane] if top + lane < k else 0
                    total += int(x) * int(weights[lane, column])
                if first + column < n:
                    product[row, first + column] += total
                last = max(last, start + row + height - 1 + column + 1)
        entry = start + m
    return last, product


def tiles_of(rows, columns, height, width):
    return [(i, j) for i in range(0, rows, height) for j in range(0, columns, width)]


@pytest.mark.parametrize("dataflow", ["os", "ws", "is"])
def test_closed_forms_are_those_of_a_stepped_array(dataflow):
    """200 random shapes: both fill policies, and the array's product is the product."""
    generator = np.random.default_rng(5)
    for _ in range(200):
        m, n, k = (int(x) for x in generator.integers(1, 10, 3))
        h, w = (int(x) for x in generator.integers(1, 5, 2))
        left, right = generator.integers(-9, 9, (m, k)), generator.integers(-9, 9, (k, n))
        if dataflow == "os":
            tiles = tiles_of(m, n, h, w)
            walk = lambda some: stepped(left, right, h, w, some)  # noqa: B023, E731
        elif dataflow == "ws":
            tiles = tiles_of(k, n, h, w)
            walk = lambda some: held(left, right, h, w, some)  # noqa: B023, E731
        else:  # the left operand stays: the same array on the transposed product
            tiles = tiles_of(k, m, h, w)
            walk = lambda some: held(right.T, left.T, h, w, some)  # noqa: B023, E731
        cycles, product = walk(tiles)
        wanted = left @ right
        assert np.array_equal(product, wanted.T if dataflow == "is" else wanted)
        assert array_cycles(m, n, k, *machine(h, w, dataflow, "back_to_back")) == cycles
        apart = sum(walk([tile])[0] for tile in tiles)
        assert array_cycles(m, n, k, *machine(h, w, dataflow)) == apart


@pytest.mark.parametrize(
    ("shape", "dataflow", "reported"),
    [
        ((197, 576, 192), "os", 75_455),
        ((197, 197, 64), "os", 13_399),
        ((197, 64, 197), "ws", 10_591),
        ((197, 192, 192), "is", 24_449),
        ((197, 192, 768), "os", 80_447),
    ],
)
def test_a_peers_printed_cycles(shape, dataflow, reported):
    """SCALE-Sim prints the index of the last cycle: one less than their number."""
    assert array_cycles(*shape, *machine(64, 8, dataflow)) - 1 == reported


@pytest.mark.parametrize("dataflow", ["os", "ws", "is"])
def test_tiles_back_to_back_are_between_the_ideal_and_the_skewed(dataflow):
    generator = np.random.default_rng(1)
    for _ in range(50):
        m, n, k = (int(x) for x in generator.integers(1, 600, 3))
        tight = array_cycles(m, n, k, *machine(64, 8, dataflow, "back_to_back"))
        assert m * n * k / 512 <= tight <= array_cycles(m, n, k, *machine(64, 8, dataflow))


# ---------------------------------------------------------------- orientation


def test_features_on_lines_is_the_transposed_product():
    turned = replace(OLD, dense_orientation="features_on_lines")
    for m, n, k in ((197, 576, 192), (20, 4096, 32), (1, 1000, 1280)):
        assert array_cycles(m, n, k, VITCOD, turned) == array_cycles(n, m, k, VITCOD, OLD)
        either = replace(OLD, dense_orientation="best")
        sides = array_cycles(m, n, k, VITCOD, OLD), array_cycles(n, m, k, VITCOD, OLD)
        assert min(sides) <= array_cycles(m, n, k, VITCOD, either) <= NEAR * min(sides)
    for dataflow in ("ws", "is"):  # K lies on their lines, whatever the orientation
        made = {
            array_cycles(30, 50, 70, VITCOD, Schedule(dense_dataflow=dataflow, dense_orientation=o))
            for o in ORIENTATIONS
        }
        assert len(made) == 1


# ---------------------------------------------------------------- split-K


def array_of(lines, width, adds, words, room=10**6, per_tile=False) -> Array:
    return Array(lines, width, adds, words, 1, 4, room, "best", "best", per_tile)


def walked(left, right, height, array, parts_of):
    """A product computed tile by tile by groups of lines, each with a part of K; returns (cycles,
    product, partial sums). A second set of accumulators holds a tile's partial sums while they
    are added and the next tile streams: a line takes a third tile when the first is added up."""
    (rows, k), columns = left.shape, right.shape[1]
    product = np.zeros((rows, columns), dtype=np.int64)
    cycle = adder_free = sums = last = 0
    added: list[int] = []  # when the sums of each tile are added
    for first, top in every(range(0, columns, array.width), range(0, rows, height)):
        high, wide = min(height, rows - top), min(array.width, columns - first)
        parts = parts_of(high, min(array.width, columns))
        assert parts * high <= array.height
        assert parts <= array.words_per_cycle
        if len(added) > 1:
            cycle = max(cycle, added[-2])
        steps = ceil(k / parts)
        partial = np.zeros((parts, high, wide), dtype=np.int64)
        for step, part in every(range(steps), range(parts)):
            at = part * steps + step
            if at < k:
                partial[part] += np.outer(
                    left[top : top + high, at], right[at, first : first + wide]
                )
        cycle += steps
        product[top : top + high, first : first + wide] = partial.sum(axis=0)
        skew = high + min(array.width, columns) - 2
        words = parts * high if parts > 1 else 0
        sums += parts * high * wide if parts > 1 else 0
        adder_free = max(adder_free, cycle) + ceil(words / array.adds_per_cycle)
        added.append(adder_free)
        last = max(last, adder_free + skew, cycle + skew)
    return last, product, sums


@QUICK
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40)),
    st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(1, 5), st.integers(1, 12)),
    st.integers(1, 12),
)
def test_split_k_against_a_walk_over_groups_of_lines(shape, sizes, height):
    """The product is right and no line works for two; the closed form promises no less time than
    the walk takes, and the same where all tiles are alike."""
    m, n, k = shape
    array = array_of(*sizes)
    height = min(height, array.height, m)
    generator = np.random.default_rng(m + 10 * n + 100 * k)
    left, right = generator.integers(-9, 9, (m, k)), generator.integers(-9, 9, (k, n))
    chosen = lambda high, wide: _parts(high, wide, k, array)[0]  # noqa: E731
    cycles, product, sums = walked(left, right, height, array, chosen)
    layout = _split_k(m, n, k, False, array, height)
    assert np.array_equal(product, left @ right)
    assert layout.partial_sums == sums
    assert cycles <= layout.cycles()
    if m % height == 0:
        assert cycles == layout.cycles()
    assert layout.cycles() * array.height * array.width >= m * n * k
    turned = _split_k(m, n, k, True, array, height)
    assert turned.cycles() == layout.cycles()
    assert (turned.left_reads, turned.right_reads) == (layout.right_reads, layout.left_reads)


@QUICK
@given(
    st.integers(1, 30),
    st.integers(1, 300),
    st.tuples(st.integers(1, 40), st.integers(1, 8), st.integers(1, 9), st.integers(1, 64)),
    st.integers(1, 400),
)
def test_the_parts_of_k_are_those_of_an_exhaustive_search(rows, k, sizes, room):
    array = array_of(*sizes, room=room)
    wide = array.width
    allowed = [
        parts
        for parts in range(1, k + 1)
        if parts == 1
        or (
            parts * rows <= array.height
            and parts <= array.words_per_cycle
            and 2 * parts * rows * wide <= room
        )
    ]

    def slot(parts: int) -> int:
        adds = ceil(parts * rows / array.adds_per_cycle) if parts > 1 else 0
        return max(ceil(k / parts), adds)

    parts, cycles, adds = _parts(rows, wide, k, array)
    assert parts in allowed
    assert (cycles, max(cycles, adds)) == (ceil(k / parts), slot(parts))
    assert max(cycles, adds) == min(map(slot, allowed))


# ---------------------------------------------------------------- what "best" finds


@QUICK
@given(SIZES, SIZES, SIZES, st.sampled_from(FILLS), st.sampled_from([(64, 8), (16, 4), (5, 3)]))
def test_best_is_no_slower_than_any_dataflow_and_no_faster_than_its_macs(m, n, k, fill, array):
    hardware = replace(VITCOD, lines=array[0], macs_per_line=array[1])
    best = laid_out(m, n, k, hardware, Schedule(dense_fill=fill))
    for dataflow, orientation in every(DATAFLOWS[1:], ORIENTATIONS):
        asked = Schedule(dense_dataflow=dataflow, dense_orientation=orientation, dense_fill=fill)
        named = laid_out(m, n, k, hardware, asked)
        assert best.cycles() <= NEAR * named.cycles() or named.live_sums > 27_648
    assert best.cycles() * hardware.macs >= m * n * k
    assert best.left_reads >= m * k
    assert best.right_reads >= k * n
    assert best.live_sums * VITCOD.accumulator_bytes <= VITCOD.output_buffer_bytes


@QUICK
@given(SIZES, SIZES, SIZES, st.integers(1, 300), st.sampled_from(FILLS), st.integers(1, 40))
def test_twice_the_lines_are_never_slower(m, n, k, lines, fill, count):
    one, two = (
        laid_out(m, n, k, replace(VITCOD, lines=h), Schedule(dense_fill=fill), count)
        for h in (lines, 2 * lines)
    )
    assert two.cycles(count) <= 1.03 * one.cycles(count)


@QUICK
@given(SIZES, SIZES, SIZES, st.integers(1, 40))
def test_a_batch_of_products_costs_no_more_than_one_by_one(m, n, k, count):
    one, many = laid_out(m, n, k, VITCOD), laid_out(m, n, k, VITCOD, count=count)
    assert many.cycles(count) <= NEAR * count * one.cycles()
    assert many.cycles(count) * VITCOD.macs >= count * m * n * k


def test_the_fewest_bytes_of_layouts_that_are_about_as_fast():
    array = Array.of(VITCOD, Schedule())
    for m, n, k in ((197, 576, 192), (197, 192, 768), (1, 1000, 1280), (197, 197, 64)):
        found = layouts(m, n, k, array)
        chosen = laid_out(m, n, k, VITCOD)
        fastest = min(one.cycles() for one in found)
        assert chosen.cycles() <= NEAR * fastest

        def moved(one):
            return one.left_reads + one.right_reads + 8 * one.partial_sums

        near = [moved(one) for one in found if one.cycles() <= NEAR * fastest]
        assert moved(chosen) == min(near)


def test_a_row_of_a_classifier_takes_all_lines():
    """EfficientNet-B0's: one line of 64 was busy, for 160,070 cycles."""
    assert array_cycles(1, 1000, 1280, VITCOD, OLD) == 160_070
    layout = laid_out(1, 1000, 1280, VITCOD)
    assert layout.summary == "os, tokens on lines, K in 64 parts"
    assert layout.cycles() == 125 * 20 + 7 + 2  # tiles of 20 cycles, skew, the last adds
    assert layout.partial_sums == 64 * 1000


def test_deit_products_are_near_the_ideal():
    products = ((197, 576, 192), (197, 192, 192), (197, 768, 192), (197, 192, 768))
    total = sum(array_cycles(*shape, VITCOD) for shape in products)
    ideal = sum(m * n * k for m, n, k in products) / VITCOD.macs
    assert total <= 1.005 * ideal


# ---------------------------------------------------------------- partial sums


@pytest.mark.parametrize("dataflow", ["ws", "is"])
def test_partial_sums_against_a_walk_over_slices_of_k(dataflow):
    """Each slice of K but the first finds the sums of the one before; what does not fit the
    output buffer is written to DRAM behind each slice but the last."""
    generator = np.random.default_rng(2)
    for _ in range(100):
        m, n, k = (int(x) for x in generator.integers(1, 30, 3))
        h, w, room = (int(x) for x in generator.integers(1, 9, 3))
        schedule = Schedule(dense_dataflow=dataflow)
        layout = laid_out(m, n, k, replace(VITCOD, lines=h, macs_per_line=w), schedule)
        stays, streams = (n, m) if dataflow == "ws" else (m, n)
        slices = ceil(k / h)
        written = spilled = live = 0
        for first in range(0, stays, w):
            sums = streams * min(w, stays - first)
            for part in range(slices if slices > 1 else 0):
                written += sums
                live = max(live, sums)
                share = max(streams * min(w, stays) - room, 0) / (streams * min(w, stays))
                spilled += sums * share if part < slices - 1 else 0
        assert layout.partial_sums == written
        assert layout.live_sums == live
        assert layout.spilled_sums(room) == pytest.approx(spilled, abs=slices)
        assert layout.spilled_sums(live) == 0


def test_output_stationary_has_none():
    assert laid_out(197, 576, 192, VITCOD, OLD).partial_sums == 0
    one_slice = laid_out(197, 197, 64, VITCOD, Schedule(dense_dataflow="ws"))
    assert one_slice.partial_sums == one_slice.live_sums == 0


@pytest.mark.parametrize(
    ("field", "allowed"),
    [
        ("dense_dataflow", "best, os, ws, is"),
        ("dense_orientation", "best, tokens_on_lines, features_on_lines"),
        ("vector_fusion", "fused, apart"),
    ],
)
def test_an_unknown_policy_is_named(field, allowed):
    with pytest.raises(ValueError, match=f"{field} must be one of {allowed}, got 'rs'"):
        Schedule(**{field: "rs"})
