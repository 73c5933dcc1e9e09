"""Dense products in closed form, their bytes, and whole networks on every machine."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import numpy as np
import pytest

from sievit.accel import Hardware, OpCost, Traffic, compare, presets, simulate
from sievit.accel.products import array_cycles, as_product, op_cost, product_cost
from sievit.accel.schedule import Schedule
from sievit.accel.simulators.registry import SIMULATORS
from sievit.accel.vitcod.simulate import encoded_products
from sievit.workload import (
    Attention,
    AttentionMask,
    Conv,
    Elementwise,
    Gemm,
    HeadCodec,
    Unknown,
    Unused,
    Workload,
)

VITCOD = presets["vitcod"]


def machine(
    height: int, width: int, dataflow: str, fill: str = "per_tile"
) -> tuple[Hardware, Schedule]:
    hardware = replace(VITCOD, lines=height, macs_per_line=width)
    return hardware, Schedule(dense_dataflow=dataflow, dense_fill=fill)


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


def bytes_at(cost: OpCost, level: str) -> int:
    return sum(row.total_bytes for row in cost.traffic if row.level == level)


def test_a_product_moves_each_operand_once_where_it_fits():
    op = Gemm("fc", 197, 192, 768, bias=True)
    cost = product_cost(op, VITCOD)
    assert bytes_at(cost, "dram") == op.elements_read + op.elements_written
    assert cost.macs == op.macs == 197 * 192 * 768
    assert cost.cycles >= op.macs / VITCOD.macs
    batched = product_cost(op, VITCOD, batch=2)
    weights = {row.tensor: row.read_bytes for row in cost.traffic if row.level == "dram"}
    twice = {row.tensor: row.read_bytes for row in batched.traffic if row.level == "dram"}
    assert twice["weights"] == weights["weights"]
    assert twice["activations"] == 2 * weights["activations"]


def test_a_product_too_large_for_the_buffers_is_loaded_again():
    small = replace(VITCOD, q_buffer_bytes=1024, k_buffer_bytes=1024, v_buffer_bytes=1024)
    op = Gemm("fc", 197, 192, 768)
    panels = ceil(197 * 192 / 1536)
    expected = 197 * 192 + panels * 192 * 768
    other = 192 * 768 + ceil(192 * 768 / 1536) * 197 * 192
    assert bytes_at(product_cost(op, small), "dram") == min(expected, other) + 197 * 768


def test_a_convolution_is_its_patches():
    op = Conv("patch", 3, 192, (224, 224), (14, 14), (16, 16), (16, 16), bias=True)
    cost = op_cost(op, VITCOD)
    assert cost.macs == op.macs
    assert cost.busy["MAC lines"] == array_cycles(196, 192, 768, VITCOD)
    # Neither operand fits half the buffers: one is read twice, the smaller sum of the two.
    image, panel = 3 * 224 * 224, (53 * 1024 * 3) // 2
    assert panel < op.params < image < 2 * panel
    assert bytes_at(cost, "dram") == image + 2 * op.params + op.elements_written


def test_a_transposed_convolution_has_its_macs():
    op = Conv("up", 8, 4, (6, 6), (12, 12), (4, 4), (2, 2), transposed=True)
    product = as_product(op, 1)
    assert product.count * product.m * product.n * product.k == op.macs


def test_vector_work_unknown_and_unused():
    norm = op_cost(Elementwise("n", "layer_norm", 64_000, 64_000, 128), VITCOD)
    assert norm.busy["vector"] == 2 * 64_000 // VITCOD.vector_lanes
    add = op_cost(Elementwise("a", "add", 128_000, 64_000), VITCOD)
    assert bytes_at(add, "dram") == 192_000
    odd = op_cost(Unknown("u", "fft", 1000, 1000), VITCOD)
    assert odd.kind == "unknown"
    assert odd.busy["vector"] == 0
    assert odd.cycles >= 2000 / VITCOD.dram_bytes_per_cycle
    assert op_cost(Unused("p", 10), VITCOD) is None
    with pytest.raises(TypeError, match="but attention, got attn"):
        op_cost(Attention("attn", 1, 4, 4, 8, 8), VITCOD)


def network(tokens: int = 40, heads: int = 2, dim: int = 16) -> Workload:
    width = heads * dim
    ops = (
        Gemm("qkv", tokens, width, 3 * width, bias=True),
        Attention("attn", heads, tokens, tokens, dim, dim),
        Gemm("proj", tokens, width, width, bias=True),
        Elementwise("add", "add", 2 * tokens * width, tokens * width),
        Unknown("odd", "fft", 10, 10),
    )
    generator = np.random.default_rng(0)
    keep = generator.random((heads, tokens, tokens)) < 0.15
    keep[:, 0] = keep[:, :, :3] = True
    return Workload("small", ops).with_attention(
        AttentionMask((keep,)), HeadCodec(heads, heads // 2), global_threshold=20
    )


@pytest.mark.parametrize("simulator", [name for name in SIMULATORS if name != "released"])
def test_every_machine_charges_every_operation(simulator):
    workload = network()
    report = simulate(workload, simulator=simulator)
    assert [op.name for op in report.ops] == [op.name for op in workload.ops]
    assert report.unknown == ("odd",)
    assert report.cycles == sum(op.cycles for op in report.ops)
    assert report.attention_cycles == report.ops[1].cycles
    for cost in report.ops:
        assert sum(cost.phases.values()) == cost.cycles
        assert all(busy <= cost.cycles for busy in cost.busy.values()), cost
        assert cost.macs >= cost.kept_macs
        assert cost.cycles >= bytes_at(cost, "dram") / VITCOD.dram_bytes_per_cycle
    twice = simulate(workload, simulator=simulator, batch=2)
    assert report.cycles < twice.cycles <= 2.05 * report.cycles
    assert twice.macs == 2 * report.macs


def test_executed_macs_follow_the_masks():
    workload = network()
    op = workload.attention[0]
    computed = sum(mask.computed for mask in op.masks)
    plain, dense = compare(workload, simulators=("vitcod_no_codec", "vitcod_dense"))
    assert plain.attention[0].macs == computed * 32
    assert plain.attention[0].kept_macs == op.kept * 32
    assert dense.attention[0].macs == op.entries * 32
    unordered = simulate(workload, simulator="vitcod_plain").attention[0]
    assert unordered.macs == unordered.kept_macs == op.kept * 32


def test_a_codec_keeps_bytes_of_q_and_k_from_dram_on_both_sides():
    plain, coded = compare(network(), simulators=("vitcod_no_codec", "vitcod"))
    stored = [
        next(r.written_bytes for r in report.ops[0].traffic if r.tensor == "output")
        for report in (plain, coded)
    ]
    assert stored[0] - stored[1] == 2 * 40 * 16  # one of two heads, for Q and for K


ATTENTION = Attention("attn", 2, 40, 40, 16, 16, codec=HeadCodec(2, 1))
WIDTH = 32


def product(name, cols, rows=40):
    return Gemm(name, rows, WIDTH, cols)


PROJECTIONS = {
    "one for all": ([product("qkv", 3 * WIDTH)], {0: "qk"}),
    "three": ([product(name, WIDTH) for name in "qkv"], {0: "q", 1: "k"}),
    "q, then k and v": ([product("q", WIDTH), product("kv", 2 * WIDTH)], {0: "q", 1: "k"}),
    "k and v, then q": ([product("kv", 2 * WIDTH), product("q", WIDTH)], {1: "q", 0: "k"}),
    "a product before": ([product("mlp", 7), product("qkv", 3 * WIDTH)], {1: "qk"}),
    "one on q after": ([product("qkv", 3 * WIDTH), product("dw", WIDTH)], {0: "qk"}),
    "sizes tell nothing": ([product("a", 5), product("b", 50)], {1: "qk"}),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_the_products_that_make_q_and_k_are_found(name):
    products, expected = PROJECTIONS[name]
    ops = [Gemm("first", 40, 8, 8), Attention("a", 2, 40, 40, 16, 16), *products, ATTENTION]
    found = encoded_products(ops)
    assert {place - 2: encoded.sides for place, encoded in found.items()} == expected
    assert all(encoded.attention is ATTENTION for encoded in found.values())


def test_the_encoder_is_charged_alike_however_q_and_k_are_made():
    """MACs of the encoder, its weights and the bytes it saves, summed over the products."""
    sums = []
    for name in ("one for all", "three", "q, then k and v", "k and v, then q"):
        ops = (*PROJECTIONS[name][0], ATTENTION)
        report = simulate(Workload("w", ops))
        plain = simulate(Workload("w", ops), simulator="vitcod_no_codec")
        made, bare = report.ops[:-1], plain.ops[:-1]
        written = [sum(r.written_bytes for op in part for r in op.traffic if r.level == "dram")
                   for part in (made, bare)]  # fmt: skip
        weights = sum(
            row.read_bytes
            for op in made
            for row in op.traffic
            if row.tensor == "codec weights" and row.level == "dram"
        )
        macs = sum(op.macs for op in made) - sum(op.macs for op in bare)
        sums.append((written[1] - written[0], weights, macs))
    assert sums == [(2 * 40 * 16, 2 * (2 * 1 + 4), 2 * 40 * 16 * 2)] * 4


def test_other_queries_than_keys_are_told_apart_by_size():
    """A subsampling attention: fewer queries than keys, wider values."""
    op = Attention("sub", 4, 49, 196, 16, 64, codec=HeadCodec(4, 2))
    kv, q = Gemm("kv", 196, 128, 4 * 80), Gemm("q", 49, 128, 64)
    found = encoded_products([kv, q, op])
    assert (found[0].sides, found[0].vectors) == ("k", 196)
    assert (found[1].sides, found[1].vectors) == ("q", 49)


def test_traffic_and_cost_check_themselves():
    with pytest.raises(ValueError, match="'cache'"):
        Traffic("Q", "cache", 0, 0)
    with pytest.raises(ValueError, match="do not sum to 3"):
        OpCost("op", "dense", 3, {"MAC lines": 2}, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"simulator": "abacus"}, "abacus"), ({"batch": 0}, "got 0")]
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(network(), **arguments)


@pytest.mark.parametrize("dataflow", ["os", "ws", "is"])
def test_systolic_attention_counts_every_tensor_at_every_level(dataflow):
    """Operand reads against a walk over the tiles."""
    machine, schedule = replace(VITCOD, lines=4, macs_per_line=3), Schedule(dense_dataflow=dataflow)
    op = Attention("attn", 2, 10, 7, 5, 6)
    (cost,) = simulate(Workload("one", (op,)), machine, "systolic", schedule=schedule).attention
    at = {(row.tensor, row.level): row for row in cost.traffic}

    def walked(m, n, k):
        tall, wide = {"os": (m, n), "ws": (k, n), "is": (k, m)}[dataflow]
        left = right = 0
        for i in range(0, tall, 4):
            for j in range(0, wide, 3):
                high, broad = min(4, tall - i), min(3, wide - j)
                left += {"os": high * k, "ws": high * m, "is": high * broad}[dataflow]
                right += {"os": broad * k, "ws": high * broad, "is": high * n}[dataflow]
        return left, right

    queries, keys = walked(10, 7, 5)
    weights, values = walked(10, 6, 7)
    size = machine.operand_bytes
    for tensor, reads in (("Q", queries), ("K", keys), ("V", values)):
        assert at[tensor, "lines"].read_bytes == 2 * reads * size
        assert at[tensor, "buffer"].read_bytes == 2 * reads * size
        assert at[tensor, "buffer"].written_bytes == at[tensor, "dram"].read_bytes
    scores = 2 * 10 * 7 * machine.score_bytes
    assert at["scores", "lines"].read_bytes == 2 * weights * machine.score_bytes
    assert at["scores", "buffer"].read_bytes == 2 * scores + 2 * weights * machine.score_bytes
    assert at["scores", "buffer"].written_bytes == 2 * scores
    assert at["output", "buffer"].written_bytes == at["output", "dram"].written_bytes == 120 * size
