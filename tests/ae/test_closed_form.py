"""The best linear codec in closed form, and the free rotation of the heads."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from codec_cases import random_qk, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.ae import (
    HeadMoments,
    fit_closed_form,
    fit_codecs,
    head_moments,
)
from sievit.ae.closed_form import agreeing_rotation
from sievit.workload import HeadCodec

quick = settings(derandomize=True, deadline=None, max_examples=15)


def test_all_heads_kept_is_the_identity():
    q, k = random_qk(2)
    codec, explained = fit_closed_form(HeadMoments.of(q), HeadMoments.of(k), HeadCodec(4, 4))
    for got, expected in zip(codec.double()(q, k), (q, k), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert explained.q == pytest.approx(1.0)


@quick
@given(seed=st.integers(0, 999), latent=st.integers(1, 4), groups=st.sampled_from([1, 2]))
def test_closed_form_is_the_best_linear_codec(seed, latent, groups):
    if latent % groups:
        latent = groups
    q, k = random_qk(seed)
    shape = HeadCodec(4, latent, groups)
    codec, explained = fit_closed_form(HeadMoments.of(q), HeadMoments.of(k), shape)
    rows = q.permute(0, 2, 3, 1).reshape(-1, 4).numpy()
    error = (codec.double()(q, k)[0] - q).square().mean().item()
    assert error == pytest.approx(_svd_error(rows, latent, groups), rel=1e-4, abs=1e-9)
    variance = rows.var(axis=0).mean()
    assert 1 - error / variance == pytest.approx(explained.q, abs=1e-5)


def _svd_error(rows: np.ndarray, latent: int, groups: int) -> float:
    """Mean squared error of keeping the leading singular directions, block by block."""
    total = 0.0
    for block in np.split(rows - rows.mean(axis=0), groups, axis=1):
        total += (np.linalg.svd(block, compute_uv=False)[latent // groups :] ** 2).sum()
    return total / rows.size


def test_moments_stream():
    q, _ = random_qk(3)
    whole, parts = HeadMoments.of(q), HeadMoments.of(q[:1]) + HeadMoments.of(q[1:])
    assert whole.count == parts.count
    np.testing.assert_allclose(whole.second, parts.second, rtol=1e-12)
    shift = np.random.default_rng(0).standard_normal((4, 6))
    moved = HeadMoments.of(q - torch.from_numpy(shift)[:, None])
    np.testing.assert_allclose(whole.shifted(shift).second, moved.second, atol=1e-9)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 6, 6)))[0]
    rotated = HeadMoments.of(q @ torch.from_numpy(rotation))
    np.testing.assert_allclose(whole.rotated(rotation).second, rotated.second, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_rotation_is_free_and_makes_heads_agree(groups):
    q, k = random_qk(4)
    moments = HeadMoments.of(q), HeadMoments.of(k)
    shape = HeadCodec(4, 2, groups)
    _, plain = fit_closed_form(*moments, shape)
    codec, rotated = fit_closed_form(*moments, shape, rotation=True)
    rotation = codec.rotation.double()
    identity = torch.eye(6, dtype=torch.float64).expand(4, 6, 6)
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), identity, rtol=1e-5, atol=1e-5)
    new_q, new_k = codec.double().in_basis(q, k)
    before = (q @ k.transpose(-2, -1)).softmax(-1)
    after = (new_q @ new_k.transpose(-2, -1)).softmax(-1)
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-5)
    assert rotated.q + rotated.k > plain.q + plain.k + (0.3 if groups == 1 else 0.1)


def test_agreeing_rotation_never_lowers_the_explained_energy(monkeypatch):
    q, k = (HeadMoments.of(x) for x in random_qk(5))
    shape = HeadCodec(4, 2)
    shares = []
    for sweeps in (0, 1, 2, 5, 15):
        monkeypatch.setattr("sievit.ae.closed_form.ROTATION_SWEEPS", sweeps)
        rotation = agreeing_rotation(q, k, shape)
        energies = [np.einsum("higi->hg", m.rotated(rotation).second) for m in (q, k)]
        shares.append(sum(np.linalg.eigvalsh(e)[-2:].sum() / np.trace(e) for e in energies))
    assert all(b >= a - 1e-9 for a, b in pairwise(shares))
    assert shares[-1] > shares[0] + 0.3


def test_moments_and_fit_through_a_model():
    model = tiny_vit()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moments = head_moments(model, [images[:2], images[2:]])
    assert [q.count for q, _ in moments] == [3 * 17, 3 * 17]
    fitted = fit_codecs(moments)
    assert fitted.shapes == (HeadCodec(4, 2),) * 2
    assert [k.q <= 1 and k.k <= 1 for k in fitted.explained] == [True, True]
    with pytest.raises(ValueError, match="got none"):
        head_moments(model, [])
    with pytest.raises(ValueError, match=r"1\.\.4, got 7"):
        fit_codecs(moments, latent_heads=7)
