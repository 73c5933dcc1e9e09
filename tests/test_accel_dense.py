"""Dense products in closed form, their bytes, and whole networks on every machine."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import numpy as np
import pytest

from sievit.accel import Hardware, OpCost, Traffic, compare, presets, simulate
from sievit.accel.dense import array_cycles, as_product, op_cost, product_cost
from sievit.accel.simulators import SIMULATORS
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


def machine(height: int, width: int, dataflow: str, fill: str = "per_tile") -> Hardware:
    return replace(
        VITCOD, lines=height, macs_per_line=width, dense_dataflow=dataflow, dense_fill=fill
    )


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
            assert array_cycles(m, n, k, machine(h, w, dataflow)) == cycles


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
    assert array_cycles(*shape, machine(64, 8, dataflow)) - 1 == reported


@pytest.mark.parametrize("dataflow", ["os", "ws", "is"])
def test_tiles_back_to_back_are_between_the_ideal_and_the_skewed(dataflow):
    generator = np.random.default_rng(1)
    for _ in range(50):
        m, n, k = (int(x) for x in generator.integers(1, 600, 3))
        tight = array_cycles(m, n, k, machine(64, 8, dataflow, "back_to_back"))
        assert m * n * k / 512 <= tight <= array_cycles(m, n, k, machine(64, 8, dataflow))


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
        AttentionMask((keep,)), HeadCodec(heads, heads // 2), min_kept=20
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
    machine = replace(VITCOD, lines=4, macs_per_line=3, dense_dataflow=dataflow)
    op = Attention("attn", 2, 10, 7, 5, 6)
    (cost,) = simulate(Workload("one", (op,)), machine, "systolic").attention
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
