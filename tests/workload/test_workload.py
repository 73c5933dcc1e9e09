"""The waist: what operations and workloads count."""

from __future__ import annotations

import pickle
from dataclasses import asdict
from typing import get_args

import numpy as np
import pytest

from sievit.workload import (
    Attention,
    AttentionMask,
    Conv,
    Deform,
    Elementwise,
    Gemm,
    HeadCodec,
    Op,
    Unknown,
    Unused,
    Workload,
    polarize_head,
)


@pytest.mark.parametrize(("heads", "latent", "total"), [(3, 2, 408), (6, 3, 1080), (12, 6, 3888)])
def test_codec_parameters_of_deit(heads, latent, total):
    assert 12 * 2 * HeadCodec(heads, latent).params_per_side == total


def test_a_grouped_codec_drops_the_weights_between_blocks():
    whole, blocks = HeadCodec(12, 6), HeadCodec(12, 6, groups=3)
    assert whole.params_per_side - blocks.params_per_side == 2 * 12 * 6 * 2 // 3
    assert blocks.macs(10, 64) * 3 == whole.macs(10, 64) == 10 * 64 * 72


@pytest.mark.parametrize("arguments", [(6, 0), (6, 7), (6, 3, 2), (6, 4, 4), (6, 3, 0)])
def test_codec_shapes_that_cannot_be(arguments):
    with pytest.raises(ValueError, match=str(arguments[-1])):
        HeadCodec(*arguments)


def test_gemm_counts():
    linear = Gemm("fc", rows=5, inner=3, cols=7, bias=True)
    assert (linear.macs, linear.params) == (105, 28)
    assert (linear.elements_read, linear.elements_written) == (15 + 28, 35)
    product = Gemm("mm", rows=5, inner=3, cols=7, batch=2, weight=False)
    assert (product.macs, product.params, product.elements_read) == (210, 0, 2 * (15 + 21))


def test_conv_counts():
    patch = Conv("patch", 3, 8, (28, 28), (2, 2), (14, 14), (14, 14), bias=True)
    assert patch.params == 8 * (3 * 196 + 1)
    assert patch.macs == 8 * 4 * 3 * 196
    depthwise = Conv("dw", 6, 6, (5, 5), (5, 5), (3, 3), groups=6)
    assert (depthwise.macs, depthwise.params) == (6 * 25 * 9, 54)


OPERATIONS = {
    "gemm": (Gemm("x", 5, 3, 7, bias=True), (105, 28, 35, 43, 35)),
    "conv": (Conv("x", 2, 3, (4, 4), (4, 4), (1, 1)), (96, 6, 48, 38, 48)),
    "deform": (Deform("x", 4, 2, 9, (4, 4), 16), (2880, 0, 0, 64 + 864, 64)),
    "elementwise": (Elementwise("x", "layer_norm", 8, 8, params=4), (0, 4, 0, 12, 8)),
    "unknown": (Unknown("x", "fft", 8, 6), (0, 0, 0, 8, 6)),
    "unused": (Unused("x", 3), (0, 3, 0, 0, 0)),
    "attention": (Attention("x", 1, 2, 2, 3, 5), (32, 0, 4 + 10, 12 + 10, 10)),
}


def test_every_operation_is_an_op():
    assert {type(op) for op, _ in OPERATIONS.values()} == set(get_args(Op))
    assert all(isinstance(op, Op) for op, _ in OPERATIONS.values())


@pytest.mark.parametrize("kind", OPERATIONS)
def test_every_operation_answers_all_that_an_op_does(kind):
    op, expected = OPERATIONS[kind]
    got = (op.macs, op.params, op.activations, op.elements_read, op.elements_written)
    assert (op.name, got) == ("x", expected)
    assert pickle.loads(pickle.dumps(op)) == op


@pytest.mark.parametrize("kind", OPERATIONS)
def test_only_the_description_of_an_operation_is_a_field(kind):
    op, _ = OPERATIONS[kind]
    assert asdict(op) == vars(op)


def attention(**changes) -> Attention:
    fields = {"heads": 2, "queries": 6, "keys": 6, "key_dim": 4, "value_dim": 8}
    return Attention("attn", **(fields | changes))


def test_attention_macs_follow_the_kept_entries():
    assert attention().macs == 2 * 36 * 12
    keep = np.random.default_rng(0).random((2, 6, 6)) < 0.4
    masks = tuple(polarize_head(head, 2) for head in keep)
    assert attention(masks=masks).macs == keep.sum() * 12
    assert attention(masks=masks, windows=3).macs == 3 * keep.sum() * 12


def test_a_codec_halves_q_and_k_and_adds_products():
    plain, coded = attention(), attention(codec=HeadCodec(2, 1))
    assert plain.elements_read - coded.elements_read == 6 * 2 * 4 - coded.params
    assert coded.macs - plain.macs == 2 * 2 * 6 * 4 * 2 * 1


@pytest.mark.parametrize("bad", [{"codec": HeadCodec(3, 2)}, {"masks": ()}])
def test_attention_refuses_what_does_not_fit(bad):
    with pytest.raises(ValueError, match="attn"):
        attention(**bad)


def network() -> Workload:
    ops = (Gemm("in", 6, 4, 4), attention(), Elementwise("add", "add", 96, 48), attention())
    return Workload("net", ops)


def test_masks_go_to_the_calls_in_order():
    keep = tuple(np.random.default_rng(i).random((2, 6, 6)) < 0.5 for i in range(2))
    masked = network().with_attention(AttentionMask(keep), HeadCodec(2, 1), global_threshold=3)
    assert [type(op) for op in masked.ops] == [type(op) for op in network().ops]
    for op, layer in zip(masked.attention, keep, strict=True):
        assert np.array_equal(np.stack([m.dense() for m in op.masks]), layer)
        assert op.codec == HeadCodec(2, 1)
    assert network().with_attention() == network()


def test_misfits_are_named():
    one = np.ones((2, 6, 6), bool)
    with pytest.raises(ValueError, match="has 2 attention layers, the mask has 1"):
        network().with_attention(AttentionMask((one,)))
    with pytest.raises(ValueError, match=r"layer 1 of net .*\(2, 6, 5\)"):
        network().with_attention(AttentionMask((one, one[:, :, :5])))
    with pytest.raises(ValueError, match="1 codecs"):
        network().with_attention(codec=[HeadCodec(2, 1)])
