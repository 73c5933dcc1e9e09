"""More latent heads where heads agree least: one number for the network, shared out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..workload import HeadCodec
from .closed_form import HeadMoments, agreeing_turn, principal_components


def latent_heads_by_layer(
    moments: Sequence[tuple[HeadMoments, HeadMoments]], mean: float, groups: int = 1
) -> tuple[int, ...]:
    """Latent heads of each layer, ``mean`` a layer on average, for `fit_codecs`.

    Each layer has ``groups`` to begin with; ``groups`` more at a time then go where they add
    most to the shares of variance explained, Q's and K's, of heads turned as for ``mean``. A
    layer gets fewer than all its heads: with all it would need no codec.

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
    steps = [1] * len(moments)
    for _ in range(round(len(moments) * mean / groups) - len(moments)):
        gains = [
            shares[step] - shares[step - 1] if step < len(shares) else -1.0
            for shares, step in zip(explained, steps, strict=True)
        ]
        steps[int(np.argmax(gains))] += 1
    return tuple(groups * step for step in steps)


def _explained(pair: tuple[HeadMoments, HeadMoments], mean: float, groups: int) -> list[float]:
    """Shares of Q's plus K's variance that groups, 2 groups, .. latent heads explain."""
    q, k = pair[0], pair[1].shifted(pair[1].mean)
    heads = len(q.first)
    typical = max(groups, round(mean / groups) * groups)
    turn = agreeing_turn(q, k, HeadCodec(heads, typical, groups))
    covariances = [moments.turned(turn).head_covariance()[0] for moments in (q, k)]
    shapes = [HeadCodec(heads, latent, groups) for latent in range(groups, heads, groups)]
    return [sum(principal_components(c, shape)[1] for c in covariances) for shape in shapes]
