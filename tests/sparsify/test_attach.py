"""Masks inside models."""

from __future__ import annotations

import pytest
import torch
from sparse_cases import photos, tiny

from sievit.models import features
from sievit.sparsify import (
    attach,
    average_attention,
    threshold,
)
from sievit.workload import AttentionMask


def masked_features(model, mask: AttentionMask, images) -> torch.Tensor:
    """The masked network written out: -inf before softmax."""
    tokens = model._embed(images)
    for block, keep in zip(model.blocks, mask.keep, strict=True):
        normed = block.norm1(tokens)
        q, k, v = block.attn.qkv(normed).view(len(images), -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / 8**0.5
        scores = scores.masked_fill(~torch.from_numpy(keep.copy()), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        tokens = tokens + block.attn.proj(mixed)
        tokens = tokens + block.mlp(block.norm2(tokens))
    return model.norm(tokens)


@torch.no_grad()
def test_attach_is_masked_softmax_and_remove_restores():
    model, images = tiny(), photos(3)
    names, dense = list(model.state_dict()), features(model, images)
    mask = threshold(average_attention(model, [images]), sparsity=0.7)
    with attach(model, mask):
        masked = features(model, images)
        assert list(model.state_dict()) == names
    torch.testing.assert_close(masked, masked_features(model, mask, images), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(masked, dense, atol=1e-3)
    assert torch.equal(features(model, images), dense)


def test_masks_of_another_shape_are_named():
    model = tiny()
    maps = average_attention(model, [photos(2)])
    with pytest.raises(ValueError, match="makes 3 calls of attention, the mask has 2"):
        attach(model, threshold(maps[:2], theta=0.5))
    with pytest.raises(ValueError, match=r"layer 0 .*\(4, 17, 17\).*\(3, 17, 17\)"):
        attach(model, threshold([m[:3] for m in maps], theta=0.5))
    attach(model, threshold(maps, theta=0.5))
    with pytest.raises(ValueError, match=r"\(4, 26, 26\).*another image size"):
        model(photos(1, size=40))
    with pytest.raises(ValueError, match="fastest"):
        attach(model, threshold(maps, theta=0.5), backend="fastest")


@pytest.mark.parametrize(
    ("prefix_tokens", "overrides"), [(2, {"distilled": True}), (3, {"registers": 2})]
)
def test_prefix_tokens_of_other_vits_are_kept(prefix_tokens, overrides):
    model = tiny(**overrides)
    assert model.num_prefix_tokens == prefix_tokens
    maps = average_attention(model, [photos(2)])
    mask = threshold(maps, sparsity=0.6, prefix_tokens=prefix_tokens)
    assert mask.keep[0][:, :prefix_tokens].all()
    with attach(model, mask):
        assert torch.isfinite(model(photos(1))).all()
