"""Dense products in closed form, their bytes, and whole networks on every machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sievit.accel import OpCost, Traffic, compare, presets, simulate
from sievit.accel.producers import producers
from sievit.accel.schedule import Schedule
from sievit.accel.simulators.registry import SIMULATORS
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
    loaded = Schedule(on_chip="nothing", latents="fill")
    plain, coded = compare(network(), simulators=("vitcod_no_codec", "vitcod"), schedule=loaded)
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
    "one for all": ([product("qkv", 3 * WIDTH)], {0: "qkv"}),
    "three": ([product(name, WIDTH) for name in "qkv"], {0: "q", 1: "k", 2: "v"}),
    "q, then k and v": ([product("q", WIDTH), product("kv", 2 * WIDTH)], {0: "q", 1: "kv"}),
    "k and v, then q": ([product("kv", 2 * WIDTH), product("q", WIDTH)], {0: "kv", 1: "q"}),
    "a product before": ([product("mlp", 7), product("qkv", 3 * WIDTH)], {1: "qkv"}),
    "one on q after": ([product("qkv", 3 * WIDTH), product("dw", WIDTH)], {0: "qkv"}),
    "sizes tell nothing": ([product("a", 5), product("b", 50)], {1: "qkv"}),
    "no product": ([], {}),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_the_products_that_make_q_k_and_v_are_found(name):
    products, expected = PROJECTIONS[name]
    ops = [Gemm("first", 40, 8, 8), Attention("a", 2, 40, 40, 16, 16), *products, ATTENTION]
    found = [made for made in producers(ops) if made.attention == len(ops) - 1]
    assert {made.product - 2: made.sides for made in found} == expected


def test_the_encoder_is_charged_alike_however_q_and_k_are_made():
    """MACs of the encoder, its weights and the bytes it saves, summed over the products."""
    sums = []
    for name in ("one for all", "three", "q, then k and v", "k and v, then q"):
        ops = (*PROJECTIONS[name][0], ATTENTION)
        loaded = {"schedule": Schedule(on_chip="nothing")}
        report = simulate(Workload("w", ops), **loaded)
        plain = simulate(Workload("w", ops), simulator="vitcod_no_codec", **loaded)
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
    assert {made.product: made.sides for made in producers([kv, q, op])} == {0: "kv", 1: "q"}


def dram(op, tensor):
    """(read, written) bytes."""
    rows = [row for row in op.traffic if row.level == "dram" and row.tensor == tensor]
    return sum(row.read_bytes for row in rows), sum(row.written_bytes for row in rows)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("latents", ["fill", "resident"])
@pytest.mark.parametrize("codec", [None, HeadCodec(4, 2)])
@pytest.mark.parametrize("name", ["one for all", "three", "q, then k and v", "k and v, then q"])
def test_what_stays_on_chip_is_neither_stored_nor_loaded(name, codec, latents, batch):
    """Byte by byte: what the products do not store is what attention does not load. Of this
    small call all of every image stays, but latents on their way to the decoder."""
    products, _ = PROJECTIONS[name]
    ops = (*products, replace(ATTENTION, heads=4, key_dim=8, value_dim=8, codec=codec))
    kept, loaded = (
        simulate(Workload("w", ops), batch=batch, schedule=Schedule(on_chip=how, latents=latents))
        for how in ("fitting", "nothing")
    )
    tensors = ("Q", "K", "V", "latent Q and K")
    attention = [
        sum(dram(report.ops[-1], tensor)[0] for tensor in tensors) for report in (kept, loaded)
    ]
    stored = [sum(dram(op, "output")[1] for op in report.ops[:-1]) for report in (kept, loaded)]
    saved = attention[1] - attention[0]
    assert stored[1] - stored[0] == saved
    values = batch * 40 * 32
    if codec is None:
        assert saved == 3 * values
    elif latents == "resident":
        assert saved == batch * 2 * 40 * 2 * 8 + values
    else:
        assert saved == values
    assert [op.macs for op in kept.ops] == [op.macs for op in loaded.ops]


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
