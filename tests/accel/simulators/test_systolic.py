"""The dense systolic array: bytes, softmax row by row against a walk, heads that stay on chip."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sievit.accel import Schedule, compare, presets, simulate
from sievit.accel.producers import room_bytes
from sievit.accel.products import laid_out
from sievit.accel.simulators.overlap import WALKED_HEADS, softmax_beyond
from sievit.accel.simulators.residence import Kept, kept_heads
from sievit.accel.simulators.systolic import attention_cost
from sievit.models import create, trace
from sievit.workload import Attention, Elementwise, Gemm, Workload

VITCOD = presets["vitcod"]
TOKENS = Schedule(dense_orientation="tokens_on_lines")
CALL = Attention("attn", 3, 197, 197, 64, 64)
BLOCK = Workload("block", (Gemm("qkv", 197, 192, 576), CALL, Gemm("proj", 197, 192, 192)))


@pytest.mark.parametrize("dataflow", ["os", "ws", "is"])
def test_systolic_attention_counts_every_tensor_at_every_level(dataflow):
    """Operand reads against a walk over the tiles."""
    machine = replace(VITCOD, lines=4, macs_per_line=3)
    schedule = replace(TOKENS, dense_dataflow=dataflow)
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


# ---------------------------------------------------------------- time


def test_dense_deit_tiny():
    """524,064 cycles before; its MACs take 349,281."""
    network = trace(create("deit_tiny"))
    ours, engine = compare(network, VITCOD, ("systolic", "vitcod_dense"))
    assert 12 * 3 * 2 * 197 * 197 * 64 / 512 <= ours.attention_cycles <= 375_000
    assert ours.attention_cycles <= 1.03 * engine.attention_cycles
    named = [simulate(network, VITCOD, f"systolic_{flow}") for flow in ("os", "ws", "is")]
    assert ours.cycles <= 1.01 * min(report.cycles for report in named)
    assert ours.attention_cycles <= min(report.attention_cycles for report in named)


def walked(queries, keys, heads, scores, values, hardware):
    """Cycles from the first scores to the last values: the array makes the scores of head h + 1,
    then the values of head h, row by row; softmax takes a row when all of its stripe are made."""

    def row_ends(cycles, stripe):
        """Of each row: when all of its stripe are made, from the first on."""
        ends = [min((row // stripe + 1) * stripe, queries) for row in range(queries)]
        return [-(-cycles * end // queries) for end in ends]

    softmax_cycles = -(-queries * keys // hardware.softmax_lanes)
    in_scores = row_ends(scores.stream_cycles, scores.stripe)
    in_softmax = row_ends(softmax_cycles, scores.stripe)
    in_values = row_ends(values.stream_cycles, values.stripe)
    through = {}  # (head, row) -> when softmax is through with it
    softmax = array = 0

    def make_scores(head):
        nonlocal softmax, array
        for row in range(queries):
            first = row % scores.stripe == 0
            took = in_softmax[row] - (in_softmax[row - 1] if row else 0) if first else 0
            softmax = max(softmax, array + in_scores[row]) + took
            through[head, row] = softmax + hardware.softmax_latency_cycles
        array += scores.stream_cycles

    def make_values(head):
        nonlocal array
        before = 0
        for row in range(0, queries, values.stripe):
            stripe = range(row, min(row + values.stripe, queries))
            array = max(array, *(through[head, r] for r in stripe)) + in_values[row] - before
            before = in_values[row]

    make_scores(0)
    for head in range(heads):
        if head + 1 < heads:
            make_scores(head + 1)
        make_values(head)
    return array


def test_softmax_row_by_row_against_a_walk():
    """Of few heads the same cycles; of many, whose walk is not gone to its end, nearly."""
    generator = np.random.default_rng(0)
    hidden = shown = 0
    for _ in range(300):
        queries, keys = (int(x) for x in generator.integers(1, 300, 2))
        dim, heads = int(generator.integers(1, 100)), int(generator.integers(1, 9))
        hardware = replace(
            VITCOD,
            softmax_lanes=int(2 ** generator.integers(0, 7)),
            lines=int(generator.integers(4, 80)),
            softmax_latency_cycles=int(generator.integers(0, 40)),
        )
        schedule = Schedule(dense_dataflow=str(generator.choice(["best", "os", "ws", "is"])))
        scores = laid_out(queries, keys, dim, hardware, schedule)
        values = laid_out(queries, dim, keys, hardware, schedule)
        array = heads * (scores.stream_cycles + values.stream_cycles)
        beyond = softmax_beyond(queries, keys, heads, scores, values, hardware)
        walk = walked(queries, keys, heads, scores, values, hardware)
        if heads <= WALKED_HEADS:
            assert array + beyond == walk
        assert array + beyond == pytest.approx(walk, rel=0.002)
        hidden += beyond == 0
        shown += beyond > 0
    assert min(hidden, shown) > 50


def test_the_last_heads_softmax_is_waited_for_where_vector_work_is_apart():
    fused, apart = (
        attention_cost(CALL, VITCOD, schedule, 1)
        for schedule in (Schedule(), Schedule(vector_fusion="apart"))
    )
    assert apart.phases["softmax"] == -(-197 * 197 // 8) + VITCOD.softmax_latency_cycles
    assert "softmax" not in fused.phases
    assert apart.cycles - fused.cycles == apart.phases["softmax"]


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 64])
def test_slow_softmax_bounds_attention(lanes):
    hardware = replace(VITCOD, softmax_lanes=lanes)
    cost = attention_cost(CALL, hardware, Schedule(), 1)
    assert sum(cost.phases.values()) == cost.cycles
    assert all(busy <= cost.cycles for busy in cost.busy.values())
    assert cost.busy["softmax"] == 3 * -(-197 * 197 // lanes)


# ---------------------------------------------------------------- what stays on chip


def test_heads_that_fit_are_neither_stored_nor_loaded():
    room = room_bytes(BLOCK.ops, 1, VITCOD, 1, Schedule())
    assert room >= 3 * 3 * 197 * 64
    for simulator in ("systolic", "sanger", "spatten"):
        kept, moved = (
            simulate(BLOCK, VITCOD, simulator, schedule=schedule)
            for schedule in (Schedule(), Schedule(on_chip="nothing"))
        )
        qkv = 3 * 197 * 192
        assert moved.ops[0].dram_bytes - kept.ops[0].dram_bytes == qkv
        loads = {r.tensor: r.read_bytes for r in kept.ops[1].traffic if r.level == "dram"}
        assert loads == {"Q": 0, "K": 0, "V": 0, "output": 0}
        assert kept.ops[1].cycles <= moved.ops[1].cycles
        for op in (kept.ops[1], moved.ops[1]):
            at = {(row.tensor, row.level): row for row in op.traffic}
            for tensor in "QKV":
                written = at[tensor, "buffer"].written_bytes
                assert (
                    written
                    == {(r.tensor, r.level): r for r in moved.ops[1].traffic}[
                        tensor, "buffer"
                    ].written_bytes
                )


def test_kept_heads_by_hand():
    """A head of Q, K or V is 12,608 bytes."""
    shared, fixed = Schedule(), Schedule(scratchpad="fixed")
    head = 197 * 64
    assert kept_heads(CALL, VITCOD, shared, 1, 10**9) == Kept(3, 3, 3)
    assert kept_heads(CALL, VITCOD, shared, 1, 4 * head) == Kept(1, 2, 1)
    assert kept_heads(CALL, VITCOD, shared, 1, head - 1) == Kept()
    assert kept_heads(CALL, VITCOD, shared, 2, 10**9) == Kept(5, 5, 5)  # 192 KB hold 15
    small = replace(VITCOD, q_buffer_bytes=head)
    assert kept_heads(CALL, small, fixed, 1, 10**9) == Kept(1, 3, 3)
    again = replace(VITCOD, k_buffer_bytes=head - 1)  # K is loaded for each tile of queries
    assert kept_heads(CALL, again, shared, 1, 10**9) == Kept()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", [{}, {"v_buffer_bytes": 13_000}, {"output_buffer_bytes": 30_000}])
def test_what_leaves_the_projection_is_what_attention_finds(batch, sizes):
    """Stored and kept are all of Q, K and V; so are loaded and kept."""
    hardware = replace(VITCOD, **sizes)
    whole = 3 * 197 * 192 * batch
    report = simulate(BLOCK, hardware, "systolic", batch)
    room = room_bytes(BLOCK.ops, 1, hardware, batch, Schedule())
    kept = kept_heads(CALL, hardware, Schedule(), batch, room).elements(CALL)
    at = [{(row.tensor, row.level): row for row in op.traffic} for op in report.ops]
    assert at[0]["output", "dram"].written_bytes == whole - kept
    assert sum(at[1][t, "dram"].read_bytes for t in "QKV") == whole - kept
    assert kept > 0


def test_no_more_stays_than_the_products_make():
    """The last product before a call is taken for its own where sizes tell nothing."""
    ops = (Gemm("small", 10, 10, 10), Elementwise("copy", "copy", 5, 5), CALL)
    assert room_bytes(ops, 2, VITCOD, 1, Schedule()) == 100
    report = simulate(Workload("w", ops), VITCOD, "systolic")
    assert sum(r.read_bytes for r in report.ops[2].traffic if r.level == "dram") == 9 * 197 * 64
