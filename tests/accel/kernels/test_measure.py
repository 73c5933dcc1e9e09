"""Attention timed here: what each kernel computes; times themselves are never a test."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sievit.accel.kernels import measure_attention
from sievit.accel.kernels.measure import KERNELS
from sievit.workload import Attention, Workload, polarize_head

HEADS, QUERIES, KEYS = 2, 9, 14


def masked(keep: np.ndarray) -> Attention:
    masks = tuple(polarize_head(head, 4) for head in keep)
    return Attention("attn", *keep.shape, 8, 5, masks=masks)


@pytest.fixture
def keep() -> np.ndarray:
    kept = np.random.default_rng(0).random((HEADS, QUERIES, KEYS)) < 0.4
    kept[..., 3] = True
    return kept


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_is_attention(keep, kernel):
    op = masked(keep)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(3, HEADS, *size, generator=generator, dtype=torch.float64)
        for size in ((QUERIES, 8), (KEYS, 8), (KEYS, 5))
    )
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(8)
    if kernel not in ("eager", "fused"):
        scores = np.where(keep, scores, -np.inf)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bhkd->bhqd", share, v)
    made = KERNELS[kernel](op, torch.device("cpu"))(q, k, v)
    assert np.allclose(made, expected, rtol=1e-9)


def test_all_kernels_are_timed_over_all_layers(keep):
    workload = Workload("two", (masked(keep), masked(~keep | (np.arange(KEYS) == 3))))
    rows = measure_attention(workload, batch=2, kernels=("eager", "masked", "sparse"), passes=3)
    assert [row.kernel for row in rows] == ["eager", "masked", "sparse"]
    for row in rows:
        assert (row.batch, row.passes, row.dtype) == (2, 3, "float32")
        assert 0 < row.fastest_seconds_per_image <= row.seconds_per_image
        assert row.seconds_per_image <= row.slowest_seconds_per_image


def test_what_cannot_be_timed_is_refused():
    dense = Workload("dense", (Attention("attn", 1, 4, 4, 4, 4),))
    for name in ("masked", "sparse"):
        with pytest.raises(ValueError, match=f"'{name}' needs masks, attn has none"):
            measure_attention(dense, kernels=(name,))
    with pytest.raises(ValueError, match=r"kernels are eager, fused, masked, sparse, got 'lazy'"):
        measure_attention(dense, kernels=("lazy",))
    with pytest.raises(ValueError, match="none has no attention"):
        measure_attention(Workload("none", ()))
