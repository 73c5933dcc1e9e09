"""The machine's integers in torch: equal to the plain function, and inside a real model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.accel import Arithmetic, Quantized, integer_attention
from sievit.accel.kernels import Int8Scales, int8_attention
from sievit.images import batches, center_crops, load_folder
from sievit.models import create
from sievit.sparsify import (
    attach,
    attach_int8,
    average_attention,
    calibrate_int8,
    fidelity,
    threshold,
    token_features,
)
from sievit.workload import AttentionMask

QUICK = settings(derandomize=True, deadline=None, max_examples=80)

widths = st.builds(
    Arithmetic,
    operand_bits=st.sampled_from([4, 8, 10]),
    score_bits=st.sampled_from([10, 16]),
    fraction_bits=st.sampled_from([0, 5, 8]),
    term_bits=st.sampled_from([8, 16]),
    probability_bits=st.sampled_from([4, 8, 16]),
    multiplier_bits=st.sampled_from([5, 16]),
)


@QUICK
@given(st.integers(0, 2**16), widths, st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
def test_torch_equals_the_plain_function(seed, arithmetic, density, biased):
    rng = np.random.default_rng(seed)
    batch, heads, queries, keys, dim, value_dim = (int(x) for x in rng.integers(1, 12, 6))
    limit = arithmetic.operand_limit
    q, k, v = (
        rng.integers(-limit, limit + 1, (batch, heads, *shape))
        for shape in ((queries, dim), (keys, dim), (keys, value_dim))
    )
    made = (rng.uniform(0.5, 2.0, heads) / limit * 4 for _ in range(4))
    scales = Int8Scales(*made, rng.integers(0, 4, heads))
    keep = rng.random((heads, queries, keys)) < density
    bias = rng.standard_normal((heads, queries, keys)) if biased else None
    plain = integer_attention(
        Quantized(q, scales.q),
        Quantized(k, scales.k),
        Quantized(v, scales.v),
        keep,
        output_scale=scales.output,
        bias=bias,
        score_shift=scales.score_shift,
        arithmetic=arithmetic,
    )
    made = int8_attention(
        *(torch.from_numpy(x) for x in (q, k, v)),
        scales,
        torch.from_numpy(keep),
        bias=None if bias is None else torch.from_numpy(bias),
        arithmetic=arithmetic,
    )
    assert np.array_equal(made.numpy(), plain.values)
    assert made.dtype == torch.float64


def test_torch_equals_the_plain_function_at_full_size():
    rng = np.random.default_rng(0)
    q, k, v = (rng.integers(-127, 128, (1, 3, 197, 64)) for _ in range(3))
    scales = Int8Scales(*(np.full(3, 0.03) for _ in range(4)))
    keep = rng.random((3, 197, 197)) < 0.1
    plain = integer_attention(*(Quantized(x, 0.03) for x in (q, k, v)), keep, output_scale=0.03)
    made = int8_attention(*(torch.from_numpy(x) for x in (q, k, v)), scales, torch.from_numpy(keep))
    assert np.array_equal(made.numpy(), plain.values)


def random_mask(calls, density=0.4, seed=0):
    rng = np.random.default_rng(seed)
    layers = [rng.random(shape) < density for shape in calls]
    for layer in layers:
        layer[:, 0] = layer[:, :, 0] = True
    return AttentionMask(tuple(layers))


def norm_ratio(made, wanted):
    return float((made - wanted).norm() / wanted.norm())


def test_a_vit_with_the_machines_integers():
    torch.manual_seed(0)
    model = create("vit_tiny", image_size=64, num_classes=0).eval()
    images = torch.randn(3, 3, 64, 64)
    mask = random_mask([(3, 17, 17)] * 12)
    with torch.no_grad():
        plain = model(images)
        with attach(model, mask, backend="dense"):
            masked = model(images)
        scales = calibrate_int8(model, [images[:2], images[2:]], mask)
        with attach_int8(model, mask, scales):
            coarse = model(images)
        with attach_int8(model, mask, scales, Arithmetic(probability_bits=16)):
            finer = model(images)
        assert torch.equal(model(images), plain)
    assert len(scales) == 12
    assert scales[0].output.shape == (3,)
    assert 0 < norm_ratio(coarse, masked) < 0.05
    assert norm_ratio(finer, masked) < norm_ratio(coarse, masked) < norm_ratio(plain, masked)


def test_a_learned_bias_goes_into_the_scores():
    torch.manual_seed(0)
    model = create("levit_128s", num_classes=0).eval()
    for name, parameter in model.named_parameters():
        if "attention_biases" in name:
            parameter.data.normal_(0, 2)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        plain = model(images)
        scales = calibrate_int8(model, [images])
        with attach_int8(model, None, scales, Arithmetic(probability_bits=16)):
            made = model(images)
    assert 0 < norm_ratio(made, plain) < 0.1


def test_what_does_not_fit_is_named():
    model = create("vit_tiny", image_size=32, num_classes=0, depth=2).eval()
    images = torch.randn(1, 3, 32, 32)
    scales = calibrate_int8(model, [images])
    with pytest.raises(ValueError, match="2 calls of attention, got scales for 1"):
        attach_int8(model, None, scales[:1])
    two_heads = Int8Scales(*(np.ones(2) for _ in range(4)))
    with pytest.raises(ValueError, match="layer 0 has 3 heads, its scales 2"):
        attach_int8(model, None, [two_heads] * 2)
    with pytest.raises(ValueError, match=r"\[3, 3\] heads, the mask's layers \[3\]"):
        attach_int8(model, random_mask([(3, 5, 5)]), scales)
    with (
        attach_int8(model, random_mask([(3, 6, 6)] * 2), scales),
        pytest.raises(ValueError, match=r"\(3, 5, 5\), the mask is for \(3, 6, 6\)"),
    ):
        model(images)
    with pytest.raises(ValueError, match="saw none"):
        calibrate_int8(model, [])
    with pytest.raises(ValueError, match="scales of k must be positive"):
        Int8Scales(np.ones(2), np.zeros(2), np.ones(2), np.ones(2))


@pytest.fixture(scope="module")
def small(golden):
    return create("dinov2_small", pretrained=golden("dinov2-vits14/vits14_fp16.safetensors")).eval()


@pytest.mark.parametrize(("sparsity", "least"), [(0.5, 0.99), (0.9, 0.99)])
def test_a_pretrained_vit_keeps_its_features(small, golden, sparsity, least):
    """Patch features under the machine's arithmetic against the same mask in float. Scores of
    this model reach 460 in base 2, so that a head must hold them coarser."""
    photos = load_folder(golden("caltech101/test"), limit=3)
    crops = next(iter(batches(center_crops(photos, 224), 3)))
    mask = threshold(average_attention(small, [crops[:2]]), sparsity=sparsity)
    scales = calibrate_int8(small, [crops[:2]], mask)
    with attach(small, mask, backend="dense"):
        masked = token_features(small, [crops[2:]])
    with attach_int8(small, mask, scales):
        made = token_features(small, [crops[2:]])
    assert least < fidelity(masked, made, 1).patch_cosine < 1
    dense = calibrate_int8(small, [crops[:2]])
    assert max(int(np.max(layer.score_shift)) for layer in dense) > 0
