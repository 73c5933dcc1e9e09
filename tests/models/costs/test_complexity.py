"""Sums of a workload, and the memory accesses of each operation under three caches."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.models import complexity, create, trace
from sievit.models.costs.accesses import no_cache, unlimited_cache, with_cache
from sievit.workload import (
    Attention,
    AttentionMask,
    Conv,
    Deform,
    Elementwise,
    Gemm,
    HeadCodec,
    Unknown,
    Unused,
    Workload,
)


def test_published_activations_and_macs():
    with torch.device("meta"):
        model = create("efficientnet_b0")
    cost = complexity(model)
    assert cost.activations == 6_748_036  # with the classifier and squeeze-excite
    assert cost.params == 5_288_548
    assert cost.macs == cost.macs_without_attention == 385_814_752
    cost = complexity(create("deit_tiny"), 224)
    assert (cost.macs, cost.macs_without_attention) == (1_253_683_200, 1_074_851_328)
    tokens, dim = 197, 192
    assert cost.activations == 196 * dim + 12 * tokens * dim * (3 + 1 + 4 + 1) + 1000


SMALL = Workload(
    "small",
    (
        Conv("stem.conv", 3, 4, (8, 8), (4, 4), (3, 3), (2, 2), bias=True),
        Elementwise("stem.act", "gelu", 64, 64),
        Gemm("blocks.0.qkv", 16, 4, 12, bias=True),
        Attention("blocks.0", 2, 16, 16, 2, 2),
        Gemm("blocks.0.mix", 16, 4, 4, weight=False),
        Unknown("blocks.1.odd", "odd", 10, 20),
        Unused("blocks.1.spare", 7),
    ),
)


def test_layers_by_hand():
    cost = complexity(SMALL, element_bytes=2, cache_bytes=10**6)
    stem, act, qkv, attention, mix, odd, spare = cost.layers
    assert (stem.kind, stem.macs, stem.params, stem.activations) == ("conv", 1728, 112, 64)
    assert stem.bytes_unlimited_cache == 2 * (192 + 112 + 64)
    assert stem.bytes_no_cache == 2 * (2 * 1728 + 64 + 64)
    assert (act.bytes_no_cache, act.bytes_unlimited_cache) == (256, 256)
    assert (qkv.kind, qkv.macs, qkv.activations) == ("linear", 768, 192)
    assert attention.macs == attention.attention_macs == 2 * 16 * 16 * 4
    assert attention.activations == 0
    assert (mix.kind, mix.macs, mix.attention_macs, mix.activations) == ("matmul", 256, 0, 0)
    assert (odd.kind, odd.macs, odd.bytes_no_cache) == ("odd", 0, 60)
    assert (spare.params, spare.bytes_no_cache, spare.intensity) == (7, 0, 0.0)
    assert qkv.intensity == 768 / qkv.bytes_with_cache


def test_sums_by_hand():
    cost = complexity(SMALL, element_bytes=2, cache_bytes=10**6)
    assert cost.unknown == ("blocks.1.odd",)
    assert cost.macs == 1728 + 768 + 2048 + 256 == SMALL.macs
    assert cost.macs_without_attention == cost.macs - 2048
    assert cost.params == SMALL.params == 112 + 60 + 7
    assert cost.total.bytes_no_cache == sum(layer.bytes_no_cache for layer in cost.layers)
    assert cost.total.bytes_with_cache == cost.total.bytes_unlimited_cache


def test_groups_keep_the_sums():
    cost = complexity(SMALL)
    by_module = cost.by_module(2)
    assert [layer.name for layer in by_module] == [
        "stem.conv", "stem.act", "blocks.0", "blocks.1",
    ]  # fmt: skip
    assert [layer.name for layer in cost.by_module(1)] == ["stem", "blocks"]
    assert by_module[2].kind == "several"
    for groups in (by_module, cost.by_kind()):
        assert sum(group.macs for group in groups) == cost.macs
        assert sum(group.bytes_no_cache for group in groups) == cost.total.bytes_no_cache
    assert cost.by_kind()[0].name == "attention"
    with pytest.raises(ValueError, match="depth is at least 1, got 0"):
        cost.by_module(0)


def test_rows_and_json():
    cost = complexity(SMALL, cache_bytes=4096)
    assert len(cost.rows()) == len(SMALL.ops) + 1
    assert cost.rows()[-1][:3] == ("small", "total", cost.macs)
    stored = json.loads(json.dumps(cost.to_dict()))
    assert stored["total"]["macs"] == cost.macs
    assert stored["layers"][2]["name"] == "blocks.0.qkv"
    assert stored["cache_bytes"] == 4096
    assert complexity(SMALL).total.bytes_with_cache is None


def test_masks_and_codecs_count():
    model = create("deit_tiny", depth=1)
    workload = trace(model)
    keep = np.zeros((3, 197, 197), dtype=bool)
    keep[:, :, 0] = True
    sparse = workload.with_attention(AttentionMask((keep,)), HeadCodec(3, 2))
    dense, cut = complexity(workload), complexity(sparse)
    saved = 3 * (197 * 197 - 197) * 128
    codec = 2 * 2 * 197 * 64 * 3 * 2
    assert dense.macs - cut.macs == saved - codec
    assert dense.macs_without_attention == cut.macs_without_attention
    assert cut.params - dense.params == 34


def test_sampling_has_the_published_limits():
    """DCNv4 paper, section 3, 3 x 3: 2 HWC + 27 HWG, and 64 HWC without a cache."""
    hw, channels, groups = 56 * 56, 128, 8
    op = Deform("dcn", channels, groups, 9, (56, 56), hw)
    assert unlimited_cache(op) == 2 * hw * channels + 27 * hw * groups
    assert no_cache(op) == 64 * hw * channels
    assert with_cache(op, hw) == unlimited_cache(op)
    assert with_cache(op, hw - 1) == (36 + 1) * hw * channels + 27 * hw * groups


# ------------------------------------------------------------------- caches


def counted_product(op: Gemm, cache: int) -> int | None:
    """The best tiling of all, counted fetch by fetch."""
    best = None
    for tile_rows, tile_cols in itertools.product(range(1, op.rows + 1), range(1, op.cols + 1)):
        if tile_rows * tile_cols + tile_rows + tile_cols > cache:
            continue
        accesses = 0
        for row in range(0, op.rows, tile_rows):
            for col in range(0, op.cols, tile_cols):
                rows, cols = min(tile_rows, op.rows - row), min(tile_cols, op.cols - col)
                for _ in range(op.inner):
                    accesses += rows + cols
                accesses += rows * cols + (cols if op.bias else 0)
        best = accesses if best is None else min(best, accesses)
    return best


sizes = st.integers(1, 9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=sizes, inner=sizes, cols=sizes, bias=st.booleans(), cache=st.integers(1, 150))
def test_a_tiled_product_against_all_tilings(rows, inner, cols, bias, cache):
    op = Gemm("g", rows, inner, cols, bias=bias)
    counted, got = counted_product(op, cache), with_cache(op, cache)
    if counted is None:
        assert got == no_cache(op)
    else:
        assert got >= min(counted, no_cache(op))  # a family of tilings holds at best the best
        assert got <= 1.35 * counted


def counted_convolution(op: Conv, cache: int) -> int | None:
    """Tiles of pixels and channels as they are, inputs by their coordinates."""
    outs, ins = op.out_channels // op.groups, op.in_channels // op.groups
    best = None
    for height, width, channels in itertools.product(
        range(1, op.out_size[0] + 1), range(1, op.out_size[1] + 1), range(1, outs + 1)
    ):
        sides = [
            (tile - 1) * stride + kernel
            for tile, stride, kernel in zip((height, width), op.stride, op.kernel, strict=True)
        ]
        under = min(sides[0], op.in_size[0]) * min(sides[1], op.in_size[1])
        if height * width * channels + under + channels > cache:
            continue
        accesses = 0
        for _ in range(0, op.out_size[0], height):
            for _ in range(0, op.out_size[1], width):
                for first in range(0, outs, channels):
                    wide = min(channels, outs - first)
                    accesses += ins * (under + wide * op.kernel[0] * op.kernel[1])
                    accesses += wide if op.bias else 0
        accesses = op.groups * accesses + op.elements_written
        best = accesses if best is None else min(best, accesses)
    return best


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    out=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    groups=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    bias=st.booleans(),
    cache=st.integers(2, 200),
)
def test_a_tiled_convolution_against_all_tilings(
    out, channels, groups, kernel, stride, bias, cache
):
    size = tuple((o - 1) * stride + kernel for o in out)
    op = Conv(
        "c", channels[0] * groups, channels[1] * groups, size, out, (kernel, kernel),
        (stride, stride), groups, bias,
    )  # fmt: skip
    counted, got = counted_convolution(op, cache), with_cache(op, cache)
    if counted is None:
        assert got == no_cache(op)
    else:
        assert got >= min(counted, no_cache(op))
        assert got <= max(1.6 * counted, unlimited_cache(op))


OPS = [
    Gemm("g", 197, 192, 768, bias=True),
    Gemm("g", 10, 20, 30, batch=4, weight=False),
    Conv("c", 64, 128, (28, 28), (14, 14), (3, 3), (2, 2)),
    Conv("c", 32, 32, (28, 28), (28, 28), (5, 5), groups=32, bias=True),
    Conv("c", 8, 4, (8, 8), (16, 16), (4, 4), (2, 2), transposed=True),
    Attention("a", 3, 197, 197, 64, 64),
    Attention("a", 4, 49, 196, 16, 32, windows=4, bias_params=100),
    Deform("d", 64, 4, 9, (28, 28), 784),
    Elementwise("e", "add", 20, 10),
]


@pytest.mark.parametrize("op", OPS, ids=lambda op: type(op).__name__)
def test_a_larger_cache_never_moves_more(op):
    curve = [with_cache(op, 2**power) for power in range(28)]
    assert curve == sorted(curve, reverse=True)
    assert curve[0] == no_cache(op)
    assert curve[-1] == unlimited_cache(op)
    if not isinstance(op, Elementwise):
        assert curve[0] > 2 * curve[-1]


def test_attention_with_a_cache_streams_keys_and_values():
    op = Attention("a", 2, 100, 60, 16, 8)
    cache = 24 + 26 * 30  # 30 queries with their sums, and one key with its value
    expected = 2 * (4 * 60 * 24 + 100 * 24)
    assert with_cache(op, cache) == expected
    assert with_cache(op, 24 + 26 * 100) == unlimited_cache(op)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="got 0 and None"):
        complexity(SMALL, element_bytes=0)
    with pytest.raises(ValueError, match="got 4 and 3"):
        complexity(SMALL, cache_bytes=3)
