"""What a codec loses, layer by layer."""

from __future__ import annotations

import pytest
import torch
from codec_cases import tiny_vit

from sievit.ae import (
    codec_errors,
    fit_codecs,
    head_moments,
)
from sievit.ae.train import relative_error
from sievit.models import AttentionHook, features, find_attention, intercept


def test_errors_of_a_layer_by_hand():
    model = tiny_vit(6)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    codecs = fit_codecs(head_moments(model, [images]), latent_heads=2, rotation=True).codecs
    seen: list = []

    class Recorder(AttentionHook):
        def transform(self, q, k):
            seen.append((q, k))
            return q, k

    calls = find_attention(model, 32)
    with torch.no_grad(), intercept(model, [Recorder() for _ in calls], calls):
        model(images)
        q, k = seen[0]  # nothing is coded before the first layer
        plain, coded = codecs[0].in_basis(q, k), codecs[0](q, k)
        maps = [(a @ b.mT * a.shape[-1] ** -0.5).softmax(-1) for a, b in (plain, coded)]
    found = codec_errors(model, codecs, images.split(2), 32)
    assert len(found) == len(codecs)
    # means over batches of two and of one image, as the errors are
    parts = [(slice(0, 2), 2), (slice(2, 3), 1)]
    for name, one, other in zip("qk", plain, coded, strict=True):
        wanted = sum(n * float(relative_error(other[s], one[s])) for s, n in parts) / 3
        assert getattr(found[0], name) == pytest.approx(wanted, rel=1e-4)
    moved = (maps[0] - maps[1]).abs().sum(-1).mean() / 2
    assert found[0].attention == pytest.approx(float(moved), rel=1e-3)
    assert 0 < found[0].q < 1
    assert 0 < found[0].attention < 1


def test_errors_of_a_lossless_codec_are_none_and_need_images():
    model = tiny_vit(7)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    codecs = fit_codecs(head_moments(model, [images]), latent_heads=4).codecs
    before = features(model, images)
    for row in codec_errors(model, codecs, [images], 32):
        assert max(row.q, row.k, row.attention) < 1e-4
    assert torch.equal(features(model, images), before)
    with pytest.raises(ValueError, match="measured on images"):
        codec_errors(model, codecs, [], 32)
