"""Vector operations fused with the product before them: which are, what is then moved, and how
long it takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sievit.accel import OpCost, Schedule, energy, presets, simulate
from sievit.accel.products import epilogue, group_costs, spare_bytes, vector_cost
from sievit.accel.products.operands import as_product, layout_of
from sievit.models import create, trace
from sievit.workload import Attention, Conv, Elementwise, Gemm, HeadCodec, Unknown, Workload

VITCOD = presets["vitcod"]
APART = Schedule(vector_fusion="apart")
TOKENS, WIDTH = 197, 192
SIZE = TOKENS * WIDTH

PROJ = Gemm("proj", TOKENS, WIDTH, WIDTH, bias=True)
ADD = Elementwise("add", "add", 2 * SIZE, SIZE)
NORM = Elementwise("norm", "layer_norm", SIZE, SIZE, 2 * WIDTH)
FC1 = Gemm("fc1", TOKENS, WIDTH, 4 * WIDTH, bias=True)
GELU = Elementwise("act", "gelu", 4 * SIZE, 4 * SIZE)


def dram(*costs: OpCost) -> int:
    return sum(cost.dram_bytes for cost in costs)


def names(fused) -> list[str]:
    return [op.name for op in fused.ops]


def test_an_activation_takes_results_as_they_leave():
    product, act = group_costs(FC1, (GELU,), VITCOD)
    assert dram(product) == SIZE + FC1.params + 4 * SIZE
    assert dram(act) == 0
    assert act.details["fused_into"] == "fc1"
    assert product.details["fused"] == "act"
    alone = vector_cost(GELU, VITCOD)
    assert act.details["apart_cycles"] == alone.cycles
    assert act.details["apart_dram_bytes"] == alone.dram_bytes == 8 * SIZE
    assert act.cycles == VITCOD.macs // VITCOD.vector_lanes  # the last tile
    assert product.busy["vector"] + act.cycles == alone.busy["vector"]


def test_a_residual_add_and_a_norm_behind_it():
    """The residual is loaded, the sum is stored for the next residual and passed on."""
    product, add, norm = group_costs(PROJ, (ADD, NORM), VITCOD)
    assert dram(add, norm) == 0
    at = {row.tensor: row for row in product.traffic if row.level == "dram"}
    assert at["activations"].read_bytes == SIZE + SIZE
    assert at["weights"].read_bytes == PROJ.params + NORM.params
    assert at["output"].written_bytes == 2 * SIZE
    apart = sum(dram(cost) for cost in (vector_cost(ADD, VITCOD), vector_cost(NORM, VITCOD)))
    alone = group_costs(PROJ, (), VITCOD)[0]
    assert dram(alone) + apart - dram(product) == 3 * SIZE  # a store and two loads
    layout = layout_of(as_product(PROJ, 1), VITCOD, Schedule())
    assert norm.cycles == layout.stripe * WIDTH // VITCOD.vector_lanes


def test_what_a_norm_or_activation_reads_of_the_product_itself_is_not_stored():
    for other in (NORM, replace(NORM, kind="relu", params=0)):
        fused = epilogue(PROJ, (other,), VITCOD)
        assert names(fused) == ["norm"]
        assert fused.stored_elements == SIZE
    relu = Elementwise("relu", "relu", SIZE, SIZE)
    assert epilogue(PROJ, (ADD, relu), VITCOD).stored_elements == SIZE


@pytest.mark.parametrize(
    "other",
    [
        Elementwise("half", "silu", SIZE // 2, SIZE // 2),
        Elementwise("mean", "mean", SIZE, WIDTH),
        Elementwise("copy", "copy", SIZE, SIZE),
        Elementwise("odd", "fourier", SIZE, SIZE),
        Elementwise("wider", "add", SIZE, 2 * SIZE),
        Elementwise("group", "group_norm", SIZE, SIZE),
    ],
)
def test_what_does_not_take_the_results_runs_apart_and_all_behind_it(other):
    assert names(epilogue(PROJ, (other, ADD), VITCOD)) == []
    assert names(epilogue(PROJ, (ADD, other, ADD), VITCOD)) == ["add"]
    workload = Workload("w", (PROJ, ADD, other, Unknown("u", "fft", 10, 10), GELU, FC1, GELU))
    report = simulate(workload, VITCOD, "systolic")
    assert [op.name for op in report.ops] == [op.name for op in workload.ops]
    fused = [op.name for op in report.ops if "fused_into" in op.details]
    assert fused == ["add", "act"]  # the first activation stands behind no product


def test_a_norm_needs_room_for_its_rows():
    """Where weights do not stay, rows end together: all results wait, and where they do not fit
    the norm runs apart."""
    wide = 768
    size = TOKENS * wide
    norm = Elementwise("norm", "layer_norm", size, size, 2 * wide)
    proj = Gemm("proj", TOKENS, wide, wide)  # 576 KB of weights, 148 KB of results
    assert proj.params > VITCOD.sram_bytes
    assert names(epilogue(proj, (norm,), VITCOD)) == []
    large = replace(VITCOD, output_buffer_bytes=256 * 1024)
    waiting = epilogue(proj, (norm,), large)
    assert (waiting.waiting_elements, waiting.room_bytes) == ((size,), size)
    huge = replace(VITCOD, output_buffer_bytes=10**6)
    rows = epilogue(proj, (norm,), huge)
    stripe = layout_of(as_product(proj, 1), huge, Schedule()).stripe
    assert (rows.waiting_elements, rows.room_bytes) == ((stripe * wide,), 2 * stripe * wide)
    tiny = replace(VITCOD, output_buffer_bytes=1024)
    assert names(epilogue(PROJ, (ADD, NORM), tiny)) == ["add"]


def test_room_that_the_attention_behind_takes_is_not_used_twice():
    free = epilogue(PROJ, (NORM,), VITCOD)
    assert free.room_bytes
    spare = spare_bytes(PROJ, VITCOD, 1, Schedule())
    fits = epilogue(PROJ, (NORM,), VITCOD, kept_bytes=spare - free.room_bytes)
    assert names(fits) == ["norm"]
    assert names(epilogue(PROJ, (NORM,), VITCOD, kept_bytes=spare - 1)) == []


def test_rows_of_a_grouped_convolution_end_with_the_last_group():
    op = Conv("dw", 96, 96, (14, 14), (14, 14), (3, 3), groups=96)
    size = op.elements_written
    norm = Elementwise("norm", "layer_norm", size, size, 192)
    fused = epilogue(op, (norm,), VITCOD)
    assert fused.waiting_elements == (size,)
    assert names(epilogue(op, (norm,), replace(VITCOD, output_buffer_bytes=size - 1))) == []


def chain(generator) -> Workload:
    """Products and vector operations, some of which may be fused."""
    ops = []
    for number in range(int(generator.integers(1, 5))):
        m, n, k = (int(2 ** generator.uniform(0, 9)) for _ in range(3))
        size = m * n
        ops.append(Gemm(f"p{number}", m, k, n))
        for _ in range(int(generator.integers(0, 5))):
            kind = str(generator.choice(["add", "gelu", "layer_norm", "mean", "softmax", "copy"]))
            name = f"{kind}{len(ops)}"
            if kind == "mean":
                ops.append(Elementwise(name, kind, size, n))
                break
            ops.append(Elementwise(name, kind, size * (1 + (kind == "add")), size))
    return Workload("chain", tuple(ops))


def test_fused_is_never_slower_never_moves_more_and_works_as_much():
    generator = np.random.default_rng(0)
    fusions = 0
    for _ in range(300):
        workload, batch = chain(generator), int(generator.integers(1, 4))
        hardware = replace(
            VITCOD,
            vector_lanes=int(2 ** generator.integers(0, 8)),
            output_buffer_bytes=int(2 ** generator.uniform(6, 20)),
            q_buffer_bytes=int(2 ** generator.uniform(6, 18)),
            dram_bytes_per_s=int(10 ** generator.uniform(8, 11.5)),
        )
        usual = Schedule(scratchpad=str(generator.choice(["shared", "fixed"])))
        fused, apart = (
            simulate(workload, hardware, "systolic", batch, schedule=schedule)
            for schedule in (usual, replace(usual, vector_fusion="apart"))
        )
        assert [op.name for op in fused.ops] == [op.name for op in workload.ops]
        assert fused.cycles <= apart.cycles
        assert fused.dram_bytes(False) <= apart.dram_bytes(False)
        assert fused.busy(False).get("vector", 0) == apart.busy(False).get("vector", 0)
        assert fused.macs == apart.macs
        for op, alone in zip(fused.ops, apart.ops, strict=True):
            assert all(busy <= op.cycles for busy in op.busy.values())
            assert op.cycles >= op.dram_bytes / hardware.dram_bytes_per_cycle
            if "fused_into" in op.details:
                fusions += 1
                assert op.dram_bytes == 0
                assert op.cycles <= alone.cycles == op.details["apart_cycles"]
                assert op.details["apart_dram_bytes"] == alone.dram_bytes
        for tensor in ("activations", "weights"):  # what DRAM gives is written to a buffer
            rows = [row for row in fused.traffic(False) if row.tensor == tensor]
            at = {row.level: row for row in rows}
            assert at["buffer"].written_bytes == at["dram"].read_bytes
    assert fusions > 100


def test_slow_lanes_are_waited_for_as_a_walk_over_the_tiles_finds():
    """Lanes take a tile when the array has made it; the product's rows and those behind it sum to
    the time of that walk, but for a tile's rounding and the array's skew."""
    for lanes in (1, 3, 8, 64):
        hardware = replace(VITCOD, vector_lanes=lanes, dram_bytes_per_s=10**12)
        product, act = group_costs(FC1, (GELU,), hardware)
        layout = layout_of(as_product(FC1, 1), hardware, Schedule())
        tiles = -(-4 * SIZE // VITCOD.macs)
        made = through = 0.0
        for tile in range(tiles):
            made = layout.stream_cycles * (tile + 1) / tiles
            through = max(through, made) + min(VITCOD.macs, 4 * SIZE - tile * VITCOD.macs) / lanes
        rounding = layout.end_cycles + VITCOD.macs / lanes + layout.stream_cycles / tiles + 2
        took = product.cycles + act.cycles - hardware.dram_latency_cycles
        assert abs(took - through) <= rounding


@pytest.mark.parametrize("simulator", ["vitcod", "vitcod_dense", "systolic", "sanger", "spatten"])
def test_every_machine_fuses_and_its_report_keeps_every_operation(simulator):
    block = (
        NORM,
        Gemm("qkv", TOKENS, WIDTH, 3 * WIDTH),
        Attention("attn", 3, TOKENS, TOKENS, 64, 64),
    )
    workload = Workload("block", (*block, PROJ, ADD, NORM, FC1, GELU))
    fused, apart = (
        simulate(workload, VITCOD, simulator, schedule=schedule) for schedule in (Schedule(), APART)
    )
    assert [op.name for op in fused.ops] == [op.name for op in workload.ops]
    into = {op.name: op.details["fused_into"] for op in fused.ops if "fused_into" in op.details}
    assert into == {"add": "proj", "norm": "proj", "act": "fc1"}
    assert fused.ops[0].dram_bytes == vector_cost(NORM, VITCOD).dram_bytes  # behind no product
    assert apart.dram_bytes(False) - fused.dram_bytes(False) == (3 + 2 * 4) * SIZE
    assert energy(fused).total_pj(False) < energy(apart).total_pj(False)
    assert not any("does not count" in line for line in energy(fused).not_charged)


def test_results_for_attention_are_saved_once_whatever_is_fused_with_their_product():
    """An activation between the product of Q, K and V and their attention stores what is left."""
    qkv = Gemm("qkv", TOKENS, WIDTH, 3 * WIDTH)
    act = Elementwise("act", "gelu", 3 * SIZE, 3 * SIZE)
    call = Attention("attn", 3, TOKENS, TOKENS, 64, 64, codec=HeadCodec(3, 2))
    for simulator in ("vitcod", "vitcod_no_codec", "systolic"):
        plain, fused = (
            simulate(Workload("w", ops), VITCOD, simulator)
            for ops in ((qkv, call), (qkv, act, call))
        )
        stored = [
            next(r.written_bytes for r in report.ops[0].traffic if r.tensor == "output")
            for report in (plain, fused)
        ]
        assert stored[0] == stored[1] < 3 * SIZE
        assert fused.ops[1].dram_bytes == 0
        assert fused.ops[2].dram_bytes == plain.ops[1].dram_bytes


def test_deit_tiny_loses_a_third_of_its_bytes():
    network = trace(create("deit_tiny"))
    fused, apart = (
        simulate(network, VITCOD, "systolic", schedule=schedule) for schedule in (Schedule(), APART)
    )
    vector = [op for op in fused.ops if op.kind == "vector"]
    together = [op for op in vector if "fused_into" in op.details]
    # All but the first norm, and what makes the CLS token and joins it to the patches.
    assert len(vector) - len(together) == 3
    assert fused.dram_bytes(False) < 0.72 * apart.dram_bytes(False)
    assert fused.cycles < 0.97 * apart.cycles
