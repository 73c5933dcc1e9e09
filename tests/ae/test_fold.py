"""The rotation of the heads folded into the model's projections."""

from __future__ import annotations

import pytest
import torch
from codec_cases import tiny_vit

from sievit.ae import (
    attach_codec,
    fit_codecs,
    fold,
    head_moments,
)
from sievit.models import create, features


def test_fold_moves_the_rotation_into_the_projections():
    model = tiny_vit()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    fitted = fit_codecs(head_moments(model, [images]), rotation=True)
    with torch.no_grad():
        plain = features(model, images)
        with attach_codec(model, fitted.codecs):
            carried = features(model, images)
        fold(model, fitted.codecs)
        assert all(c.rotation is None and c.key_shift is None for c in fitted.codecs)
        assert (features(model, images) - plain).abs().max() < 1e-4
        with attach_codec(model, fitted.codecs):
            folded = features(model, images)
    assert (folded - carried).abs().max() < 1e-4


def test_fold_refuses_a_model_without_key_bias():
    model = create(
        "vit_tiny", image_size=32, patch_size=8, dim=32, depth=1, heads=4, qkv_bias=False
    )
    images = torch.randn(2, 3, 32, 32)
    fitted = fit_codecs(head_moments(model, [images]), rotation=True)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn"):
        fold(model, fitted.codecs)
