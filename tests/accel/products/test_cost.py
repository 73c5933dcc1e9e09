"""The cost of dense products and of vector work: bytes by tensor, partial sums, the encoder; and
whole networks, with the figures of earlier schedules."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import numpy as np
import pytest

from sievit.accel import OpCost, Schedule, presets, simulate
from sievit.accel.products import Results, array_cycles, as_product, laid_out, op_cost, product_cost
from sievit.accel.simulators.sanger import Sanger
from sievit.models import create, trace
from sievit.workload import (
    Attention,
    AttentionMask,
    Conv,
    Elementwise,
    Gemm,
    Unknown,
    Unused,
)

VITCOD = presets["vitcod"]
OLD = Schedule(
    dense_dataflow="os",
    dense_orientation="tokens_on_lines",
    vector_fusion="apart",
    scratchpad="fixed",
    on_chip="nothing",
)


def bytes_at(cost: OpCost, level: str) -> int:
    return sum(row.total_bytes for row in cost.traffic if row.level == level)


def test_a_product_moves_each_operand_once_where_it_fits():
    op = Gemm("fc", 197, 192, 768, bias=True)
    cost = product_cost(op, VITCOD, schedule=OLD)
    assert bytes_at(cost, "dram") == op.elements_read + op.elements_written
    assert cost.macs == op.macs == 197 * 192 * 768
    assert cost.cycles >= op.macs / VITCOD.macs
    batched = product_cost(op, VITCOD, batch=2, schedule=OLD)
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
    assert (
        bytes_at(product_cost(op, small, schedule=OLD), "dram") == min(expected, other) + 197 * 768
    )


def test_a_convolution_is_its_patches():
    op = Conv("patch", 3, 192, (224, 224), (14, 14), (16, 16), (16, 16), bias=True)
    cost = op_cost(op, VITCOD, schedule=OLD)
    assert cost.macs == op.macs
    assert cost.busy["MAC lines"] == array_cycles(196, 192, 768, VITCOD, OLD)
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


# ---------------------------------------------------------------- partial sums


@pytest.mark.parametrize("dataflow", ["ws", "is"])
def test_partial_sums_take_buffer_bytes_and_beyond_the_buffer_dram_and_time(dataflow):
    op, schedule = Gemm("fc", 197, 768, 192), replace(OLD, dense_dataflow=dataflow)
    sums = laid_out(197, 192, 768, VITCOD, schedule)
    fits = product_cost(op, VITCOD, schedule=schedule)
    at = {(row.tensor, row.level): row for row in fits.traffic}
    assert sums.partial_sums == 12 * 197 * 192  # 768 on 64 lines
    held = at["partial sums", "buffer"]
    assert held.read_bytes == held.written_bytes == 4 * sums.partial_sums
    assert ("partial sums", "dram") not in at
    small = replace(VITCOD, output_buffer_bytes=1024, dram_bytes_per_s=10**9)
    spilled = product_cost(op, small, schedule=schedule)
    at = {(row.tensor, row.level): row for row in spilled.traffic}
    over = (sums.live_sums - 256) / sums.live_sums
    dram = at["partial sums", "dram"]
    assert dram.read_bytes == dram.written_bytes
    assert dram.read_bytes == pytest.approx(4 * 11 * 197 * 192 * over, rel=1e-6)
    more = small.dram_cycles(bytes_at(spilled, "dram"))
    assert spilled.busy["DRAM"] == more > spilled.busy["MAC lines"]
    assert spilled.cycles == more + small.dram_latency_cycles


def test_best_never_spills():
    small = replace(VITCOD, output_buffer_bytes=64)
    for shape in ((197, 576, 192), (12544, 96, 27), (1, 1000, 1280)):
        cost = product_cost(Gemm("fc", shape[0], shape[2], shape[1]), small)
        assert ("partial sums", "dram") not in {(row.tensor, row.level) for row in cost.traffic}


def test_partial_sums_take_room_from_the_operands_of_a_shared_scratchpad():
    """1,100 rows of 8 accumulators take 35 KB: weights that fitted beside inputs do not."""
    op = Gemm("fc", 1100, 600, 600)
    shared = replace(OLD, scratchpad="shared")
    out, weight = (
        product_cost(op, VITCOD, schedule=replace(shared, dense_dataflow=flow))
        for flow in ("os", "ws")
    )
    least = op.elements_read + op.elements_written
    live = 4 * laid_out(1100, 600, 600, VITCOD, Schedule(dense_dataflow="ws")).live_sums
    space = VITCOD.sram_bytes - VITCOD.index_buffer_bytes
    stripes = 2 * 8 * 600
    for held, cost in ((1024, out), (live, weight)):
        fits = 600 * 600 + stripes <= space - held
        assert (bytes_at(cost, "dram") == least) == fits


# ---------------------------------------------------------------- the encoder


def test_the_encoders_weights_and_macs_take_time():
    op = Gemm("qkv", 16, 8, 8)
    plain = product_cost(op, VITCOD)
    coded = product_cost(op, VITCOD, results=Results(encoder_macs=640, encoder_bytes=10_000))
    weights = [row for row in coded.traffic if row.tensor == "codec weights"]
    assert [(row.level, row.read_bytes) for row in weights] == [
        ("dram", 10_000),
        ("buffer", 10_000),
    ]
    moved = bytes_at(plain, "dram") + 10_000
    assert coded.busy["DRAM"] == VITCOD.dram_cycles(moved)
    assert coded.cycles == coded.busy["DRAM"] + VITCOD.dram_latency_cycles
    assert coded.busy["encoder"] == 640 // VITCOD.encoder_macs
    assert coded.codec_macs == 640
    assert coded.macs == plain.macs + 640


def test_results_that_are_saved_are_not_stored():
    op = Gemm("qkv", 197, 192, 576)
    plain, kept = (
        product_cost(op, VITCOD, results=Results(saved, saved)) for saved in (0, 3 * 12_608)
    )
    assert bytes_at(plain, "dram") - bytes_at(kept, "dram") == 3 * 12_608


# ---------------------------------------------------------------- whole networks


@pytest.fixture(scope="module")
def tiny():
    return trace(create("deit_tiny"))


@pytest.fixture(scope="module")
def masked(tiny, golden):
    return tiny.with_attention(AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy")))


def test_deit_tiny_on_the_released_mask(masked):
    """5.76 ms with tokens on lines and vector work apart."""
    report = simulate(masked, VITCOD, "vitcod_no_codec")
    assert report.seconds <= 4.4e-3
    dense = [op for op in report.ops if op.kind == "dense"]
    cycles, ideal = sum(op.busy["MAC lines"] for op in dense), sum(op.macs for op in dense) / 512
    assert ideal <= cycles <= 1.01 * ideal
    apart = simulate(masked, VITCOD, "vitcod_no_codec", schedule=Schedule(vector_fusion="apart"))
    assert apart.attention_cycles == report.attention_cycles
    assert report.dram_bytes(False) < 0.75 * apart.dram_bytes(False)
    assert report.cycles < apart.cycles


@pytest.mark.parametrize(
    ("fill", "dataflow", "cycles"),
    [
        ("back_to_back", "os", 3_369_966),
        ("per_tile", "os", 4_435_296),
        ("back_to_back", "ws", 2_695_619),
        ("per_tile", "ws", 4_408_831),
        ("back_to_back", "is", 2_710_394),
        ("per_tile", "is", 4_181_848),
    ],
)
def test_the_earlier_schedule_has_its_earlier_cycles(tiny, fill, dataflow, cycles):
    """On a systolic array, whose attention took all of each layer's last softmax."""
    before = replace(OLD, dense_dataflow=dataflow, dense_fill=fill, scratchpad="shared")
    assert simulate(tiny, VITCOD, "systolic", schedule=before).cycles == cycles


def test_so_has_sanger_but_for_what_its_array_waits_for(masked):
    """3,008,675 cycles before: Sanger no longer waits to pack and to softmax whole heads, and
    waits for banks. SpAtten's network runs over the tokens left, on the earlier schedule too."""
    before = replace(OLD, scratchpad="shared")
    method = Sanger(mac_split="subword_parallel")
    sanger = simulate(masked, VITCOD, "sanger", schedule=before, parameters=method)
    assert sanger.cycles == 2_997_715
    whole = sum(cost.cycles for cost in sanger.ops if cost.kind != "attention")
    spatten = simulate(masked, VITCOD, "spatten", schedule=before)
    assert sum(cost.cycles for cost in spatten.ops if cost.kind != "attention") < 0.4 * whole


@pytest.mark.parametrize(("name", "milliseconds"), [("deit_small", 17.4), ("deit_base", 68.0)])
def test_larger_networks_beside_attention(name, milliseconds):
    report = simulate(trace(create(name)), VITCOD, "systolic")
    rest = VITCOD.seconds(report.cycles - report.attention_cycles)
    assert rest <= 1e-3 * milliseconds
    dense = [op for op in report.ops if op.kind == "dense"]
    assert sum(op.macs for op in dense) / 512 <= sum(op.busy["MAC lines"] for op in dense)


def test_a_classifier_loads_its_weights_no_longer_than_dram_takes():
    """EfficientNet-B0's took 160,095 cycles."""
    head = simulate(trace(create("efficientnet_b0")), VITCOD, "systolic").ops[-1]
    assert head.name == "head.fc"
    assert head.cycles == VITCOD.dram_cycles(head.dram_bytes) + VITCOD.dram_latency_cycles == 8_380


def test_more_lines_and_more_bandwidth_are_never_slower():
    generator = np.random.default_rng(3)
    for _ in range(300):
        m, n, k = (int(2 ** generator.uniform(0, 11)) for _ in range(3))
        lines, width = (int(x) for x in generator.integers(1, 100, 2))
        hardware = replace(
            VITCOD,
            lines=lines,
            macs_per_line=width,
            dram_bytes_per_s=int(10 ** generator.uniform(8, 12)),
        )
        op = Gemm("fc", m, k, n, batch=int(generator.integers(1, 4)))
        cycles = product_cost(op, hardware).cycles
        for field in ("lines", "dram_bytes_per_s"):
            doubled = replace(hardware, **{field: 2 * getattr(hardware, field)})
            assert product_cost(op, doubled).cycles <= 1.03 * cycles, (op, hardware, field)
