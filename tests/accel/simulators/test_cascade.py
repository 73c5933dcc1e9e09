"""SpAtten's cascade: which tokens stay, and what of the network around attention they leave."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sievit.accel import presets, simulate
from sievit.accel.schedule import Schedule
from sievit.accel.simulators import cascade, overlap
from sievit.models import create, trace
from sievit.workload import Attention, Conv, Elementwise, Gemm, Workload, polarize_head

VITCOD = presets["vitcod"]


def call(keep, windows=1, name="attn"):
    heads, queries, keys = keep.shape
    masks = tuple(polarize_head(head, 0.4) for head in keep)
    return Attention(name, heads, queries, keys, 8, 8, windows, masks)


def of_columns(counts, heads=2):
    """A mask whose key j is kept by counts[j] queries in every head."""
    n = len(counts)
    keep = np.arange(n)[:, None] < np.array(counts)[None, :]
    return np.stack([keep] * heads)


def test_kept_entries_of_each_key_in_the_original_order():
    keep = np.random.default_rng(0).random((23, 31)) < 0.3
    keep[:, 5] = True
    for head in (keep, keep[:, :23]):
        assert np.array_equal(overlap.kept_by_key(polarize_head(head, 0.4)), head.sum(axis=0))


def test_tokens_that_are_kept_most_stay_and_none_comes_back():
    first = of_columns([9, 0, 9, 1, 0, 9, 0, 9, 0])  # 37 of 81: keeps 6 of 9
    second = of_columns([0, 9, 1, 1, 0, 4, 0, 2, 1])  # 18 of 81: keeps 4; 1 would be first
    one, two = cascade.prunings((call(first), call(second)), 1.0)
    assert (one.before.keys, one.now.keys, two.before.keys, two.now.keys) == (9, 6, 6, 4)
    assert one.keys.tolist() == [0, 1, 2, 3, 5, 7]  # 9 9 9 9 1, and the first of those with 0
    # In all: token 0 has 9, 1 has 9, 2 has 10, 3 has 2, 5 has 13, 7 has 11 (times two heads).
    assert two.keys.tolist() == [0, 2, 4, 5]
    assert np.array_equal(one.queries, one.keys)
    assert one.prunes
    assert two.prunes


def test_a_network_that_pools_starts_anew():
    large, small = of_columns([8, 1, 8, 1, 8, 1, 8, 1]), of_columns([0, 4, 0, 4])
    down = np.repeat(of_columns([8, 8, 8, 8, 0, 0, 0, 0]), 1, axis=0)[:, :4]
    layers = cascade.prunings((call(large), call(down), call(small)), 1.0)
    assert [len(layer.keys) for layer in layers] == [layer.now.keys for layer in layers]
    assert [len(layer.queries) for layer in layers] == [layer.now.queries for layer in layers]
    for layer in layers:
        for places, count in (
            (layer.keys, layer.before.keys),
            (layer.queries, layer.before.queries),
        ):
            assert np.all(np.diff(places) > 0)
            assert places[0] >= 0
            assert places[-1] < count
    assert layers[2].before.keys <= 4


def network(first, second, tokens, windows=1):
    """Two blocks on ``tokens``, and what does not work on tokens."""
    rows = tokens * windows
    ops = (
        Conv("stem", 3, 16, (8, 8), (4, 4), (2, 2)),
        Gemm("qkv0", rows, 16, 48),
        call(first, windows, "attn0"),
        Gemm("proj", rows, 16, 16),
        Elementwise("add", "add", 2 * rows * 16, rows * 16, 5),
        Elementwise("other", "add", 2 * rows * 7, rows * 7),
        Gemm("product", rows, 16, rows, weight=False),
        Conv("depthwise", 16, 16, (4, 4), (4, 4), (3, 3), groups=16),
        Gemm("qkv1", rows, 16, 48),
        call(second, windows, "attn1"),
        Gemm("proj1", rows, 16, 16),
        Gemm("head", 1, 16, 10),
        Elementwise("softmax", "softmax", 10, 10),
    )
    return Workload("two blocks", ops)


@pytest.mark.parametrize("windows", [1, 3])
def test_products_behind_a_pruning_layer_have_fewer_rows(windows):
    first, second = of_columns([9, 0, 9, 1, 0, 9, 0, 9, 0]), of_columns([0, 9, 1, 1, 0, 4, 0, 2, 1])
    work = network(first, second, 9, windows)
    layers = cascade.prunings(work.attention, 1.0)
    left = cascade.without_pruned(work.ops, layers)
    for before, after in zip(work.ops, left, strict=True):
        if isinstance(before, Attention):
            assert after == replace(before, queries=after.queries, keys=after.keys, masks=None)
            assert (after.queries, after.keys) == ((9, 9) if after.name == "attn0" else (6, 6))
        elif before.name in ("proj", "qkv1", "proj1"):
            assert after == replace(before, rows=windows * (4 if before.name == "proj1" else 6))
        elif before.name == "add":
            assert after == replace(before, inputs=2 * windows * 96, outputs=windows * 96)
        else:  # the stem, products of activations, other widths, convolutions, the classifier
            assert after == before


def test_the_network_of_spatten_is_one_of_the_tokens_left():
    """Every operation behind attention costs what it costs with the rows left."""
    work = network(of_columns([9] * 3 + [0] * 6), of_columns([9] * 3 + [0] * 6), 9)
    how = Schedule(on_chip="nothing")
    report, whole = (simulate(work, VITCOD, name, schedule=how) for name in ("spatten", "systolic"))
    for cost, dense in zip(report.ops, whole.ops, strict=True):
        assert cost.name == dense.name
        if cost.kind == "dense":
            smaller = cost.name in ("proj", "qkv1", "proj1")
            assert (cost.macs < dense.macs) == smaller
            assert (cost.macs == dense.macs) == (not smaller)
    five = simulate(
        Workload("w", (Gemm("proj", 5, 16, 16),)), VITCOD, "systolic", schedule=how
    ).ops[0]
    (proj,) = (cost for cost in report.ops if cost.name == "proj")
    assert proj.macs == five.macs
    plain = work.with_polarized([None, None], [None, None])
    dense = [cost.macs for cost in whole.ops if cost.kind == "dense"]
    kept = simulate(plain, VITCOD, "spatten", schedule=how).ops
    assert [cost.macs for cost in kept if cost.kind == "dense"] == dense


@pytest.mark.parametrize("name", ["deit_tiny", "levit_128s"])
def test_whole_networks_run_with_their_tokens_pruned(name):
    traced = trace(create(name))
    masks = tuple(
        np.random.default_rng(i).random((op.heads, op.queries, op.keys)) < 0.1
        for i, op in enumerate(traced.attention)
    )
    polarized = [tuple(polarize_head(head, 0.5) for head in layer) for layer in masks]
    work = traced.with_polarized(polarized, [None] * len(masks))
    report, dense = (simulate(work, VITCOD, name) for name in ("spatten", "systolic"))
    assert [cost.name for cost in report.ops] == [cost.name for cost in dense.ops]
    assert report.cycles < dense.cycles
    for cost, whole in zip(report.ops, dense.ops, strict=True):
        if cost.kind == "dense":
            assert cost.macs <= whole.macs
