"""Synthetic maps: rows sum to one, and their masks look like the published ones."""

from __future__ import annotations

import numpy as np
import pytest

from sievit.accel import simulate
from sievit.sparsify import polarize, synthetic_maps, threshold
from sievit.workload import (
    PUBLISHED_GLOBAL_THRESHOLD,
    Attention,
    AttentionMask,
    Workload,
)

DEIT_TINY = ((3, 197, 197),) * 12


def test_rows_sum_to_one_and_a_seed_repeats():
    shapes = ((2, 50, 50), (3, 17, 50))
    first, again, other = (synthetic_maps(shapes, seed=seed) for seed in (0, 0, 1))
    for layer, shape, same, not_same in zip(first, shapes, again, other, strict=True):
        assert layer.shape == shape
        assert layer.dtype == np.float32
        assert np.allclose(layer.sum(axis=-1), 1, atol=1e-5)
        assert (layer > 0).all()
        assert np.array_equal(layer, same)
        assert not np.array_equal(layer, not_same)


def test_a_query_looks_at_its_surroundings_in_early_layers():
    """Without a prefix the most looked-at place of a strided query is its own."""
    (layer,) = synthetic_maps(((64, 49, 196),), prefix_tokens=0)
    own = np.array([[2 * row * 14 + 2 * column for column in range(7)] for row in range(7)])
    mean = layer.mean(axis=0)
    assert (mean.argmax(axis=1) == own.ravel()).all()


@pytest.mark.parametrize(("queries", "keys"), [(50, 51), (48, 50), (1, 50)])
def test_tokens_must_be_a_square_grid(queries, keys):
    with pytest.raises(ValueError, match=f"{queries - 1} queries and {keys - 1} keys"):
        synthetic_maps(((1, queries, keys),))


def shape_of(mask: AttentionMask) -> dict[str, float]:
    heads = [head for layer in polarize(mask, PUBLISHED_GLOBAL_THRESHOLD) for head in layer]
    dense = sum(head.kept - head.sparser_kept for head in heads)
    density = [1 - x for layer in mask.sparsity_by_head() for x in layer]
    ops = tuple(
        Attention(f"attn{index}", 3, 197, 197, 64, 64, masks=layer)
        for index, layer in enumerate(polarize(mask, PUBLISHED_GLOBAL_THRESHOLD))
    )
    return {
        "dense share": dense / mask.kept,
        "dense fill": dense / sum(head.num_global * head.queries for head in heads),
        "global keys": sum(head.num_global for head in heads),
        "spread": float(np.std(np.log(density))),
        "cycles": simulate(Workload("deit", ops)).attention_cycles,
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_masks_are_near_the_published_one(golden, seed):
    published = AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy"))
    made = threshold(synthetic_maps(DEIT_TINY, seed=seed), sparsity=published.sparsity)
    ours, theirs = shape_of(made), shape_of(published)
    assert ours["cycles"] == pytest.approx(theirs["cycles"], rel=0.05)
    assert ours["dense share"] == pytest.approx(theirs["dense share"], abs=0.08)
    assert ours["dense fill"] == pytest.approx(theirs["dense fill"], abs=0.08)
    assert ours["global keys"] == pytest.approx(theirs["global keys"], rel=0.25)
    assert 0.5 < ours["spread"] / theirs["spread"] < 1.1
