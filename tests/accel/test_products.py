"""Dense products in closed form, their bytes, and whole networks on every machine."""

from __future__ import annotations

import numpy as np
import pytest

from sievit.accel import OpCost, Traffic, compare, presets, simulate
from sievit.accel.simulators.registry import SIMULATORS
from sievit.accel.vitcod.simulate import encoded_products
from sievit.workload import (
    Attention,
    AttentionMask,
    Elementwise,
    Gemm,
    HeadCodec,
    Unknown,
    Workload,
)

VITCOD = presets["vitcod"]


def bytes_at(cost: OpCost, level: str) -> int:
    return sum(row.total_bytes for row in cost.traffic if row.level == level)


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
