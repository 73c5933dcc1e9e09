"""More latent heads where heads agree least: one number for the network, shared out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..workload import HeadCodec
from .closed_form import HeadMoments, agreeing_rotation, principal_components

REACH = 2
"""Groups of latent heads that a layer may have more or fewer than the mean."""


def latent_heads_by_layer(
    moments: Sequence[tuple[HeadMoments, HeadMoments]], mean: float, groups: int = 1
) -> tuple[int, ...]:
    """Latent heads of each layer, ``mean`` a layer on average, for `fit_codecs`.

    Of all ways to share them out, within `REACH` steps of ``groups`` from the mean, the one
    that explains most: the sum over layers of the shares of Q's and of K's variance, each with
    heads rotated for it. A layer gets fewer than all its heads: with all it would need no codec.

    moments  (Q, K) a layer, from `head_moments`

    Raises ValueError where ``mean`` is below ``groups`` or not below a layer's heads.
    """
    heads = [len(q.first) for q, _ in moments]
    if not moments or any(count % groups for count in heads):
        raise ValueError(f"groups must divide the heads of every layer, {heads}, got {groups}")
    if not groups <= mean <= min(heads) - groups:
        raise ValueError(
            f"latent heads a layer on average must be in {groups}..{min(heads) - groups} for "
            f"layers of {min(heads)} heads in {groups} groups, got {mean}"
        )
    explained = [_explained(pair, mean, groups) for pair in moments]
    return _most(explained, round(len(moments) * mean / groups) * groups)


def _most(gains: Sequence[dict[int, float]], total: int) -> tuple[int, ...]:
    """One key of each of ``gains``, their sum ``total`` at most, of the largest sum of values."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # spent: (value, keys)
    for layer in gains:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (value, keys) in best.items():
            for key, gain in layer.items():
                found = (value + gain, (*keys, key))
                if spent + key <= total and found > longer.get(spent + key, (-np.inf, ())):
                    longer[spent + key] = found
        best = longer
    return max(best.values())[1]


def _explained(pair: tuple[HeadMoments, HeadMoments], mean: float, groups: int) -> dict[int, float]:
    """Latent heads -> shares of Q's plus K's variance explained."""
    q, k = pair[0], pair[1].shifted(pair[1].mean)
    heads, found = len(q.first), {}
    for latent in range(groups, heads, groups):
        if abs(latent - mean) <= REACH * groups:
            shape = HeadCodec(heads, latent, groups)
            rotation = agreeing_rotation(q, k, shape)
            covariances = (m.rotated(rotation).head_covariance()[0] for m in (q, k))
            found[latent] = sum(principal_components(c, shape)[1] for c in covariances)
    return found
