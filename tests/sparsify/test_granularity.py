"""Masks in vectors: groups of queries keep the same keys, at the sparsity asked for."""

from __future__ import annotations

import numpy as np
import pytest

from sievit.accel.kernels import plan_attention
from sievit.sparsify import synthetic_maps, threshold
from sievit.sparsify.granularity import by_vectors


def test_groups_hold_their_mean():
    layer = np.random.default_rng(0).random((2, 11, 7))
    (grouped,) = by_vectors([layer], rows=4, prefix_tokens=1)
    assert np.array_equal(grouped[:, 0], layer[:, 0].astype(np.float32))
    for begin, end in ((1, 5), (5, 9), (9, 11)):
        for row in range(begin, end):
            assert np.allclose(grouped[:, row], layer[:, begin:end].mean(axis=1), atol=1e-7)


def test_masks_of_vectors_plan_without_waste():
    maps = synthetic_maps([(2, 257, 257)])
    mask = threshold(by_vectors(maps, 32), sparsity=0.9)
    assert mask.sparsity == pytest.approx(0.9, abs=0.005)
    plan = plan_attention(mask.keep[0], granularity=(32, 1))
    entries = threshold(maps, sparsity=0.9)
    assert plan.area < 0.5 * plan_attention(entries.keep[0], tile=32).area
    with pytest.raises(ValueError, match="is finer"):
        plan_attention(entries.keep[0], granularity=(32, 1))


def test_what_makes_no_groups_is_refused():
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        by_vectors([np.ones((1, 4, 4))], rows=0)
    with pytest.raises(ValueError, match="1 queries are not more than 1 prefix tokens"):
        by_vectors([np.ones((1, 1, 4))])
