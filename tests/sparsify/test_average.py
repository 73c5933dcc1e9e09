"""Averaged attention against its naive twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sparse_cases import photos, tiny

from sievit.sparsify import (
    average_attention,
)


def naive_maps(model, images) -> list[np.ndarray]:
    """Each block's softmax, written out, one image at a time."""
    sums = [0.0] * len(model.blocks)
    for image in images:
        tokens = model._embed(image[None])
        for layer, block in enumerate(model.blocks):
            normed = block.norm1(tokens)
            qkv = block.attn.qkv(normed)[0].double().reshape(17, 3, 4, 8)
            for head in range(4):
                q, k = qkv[:, 0, head], qkv[:, 1, head]
                rows = torch.softmax(q @ k.T / 8**0.5, dim=-1).detach().numpy()
                sums[layer] = sums[layer] + np.eye(4)[head][:, None, None] * rows
            tokens = block(tokens)
    return [s / len(images) for s in sums]


def test_average_attention_equals_its_naive_twin_in_any_batching():
    model, images = tiny(), photos(5)
    model.train()
    whole = average_attention(model, [images])
    parts = average_attention(model, ([b, "label"] for b in images.split(2)))
    assert model.training
    for got, again, expected in zip(whole, parts, naive_maps(model.eval(), images), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=2e-6)
        np.testing.assert_allclose(got, again, atol=1e-6)
        np.testing.assert_allclose(got.sum(-1), 1.0, atol=1e-5)


def test_averaging_leaves_the_model_and_tells_progress():
    model, images, seen = tiny(), photos(4), []
    before = model(images)
    average_attention(model, images.split(2), progress=seen.append)
    assert seen == [2, 4]
    assert torch.equal(model(images), before)


def test_averaging_refuses_nothing_and_nan():
    model = tiny()
    with pytest.raises(ValueError, match="at least one image"):
        average_attention(model, [])
    model.blocks[1].attn.qkv.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="attention of layer 1 is not finite"):
        average_attention(model, [photos(1)])
    with pytest.raises(ValueError, match="no call of softmax attention"):
        average_attention(torch.nn.Conv2d(3, 4, 8), [photos(1)])
