"""Synthetic averaged attention maps, for use without a trained model.

Each head looks partly at its query's surroundings on the token grid and partly at keys that
all queries like, the latter more in later layers, as trained vision transformers do. The
constants were chosen so that `threshold` makes of these maps masks like the one that
ViTCoD's authors released for DeiT-Tiny at 95 % (share of kept entries in global keys,
spread of density over heads, cycles of a machine). They stand for no trained model: a result
from them is about a machine, never about accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt, log

import numpy as np

REACH = (0.35, 1.6)
"""Standard deviation of the surroundings, in tokens: log-uniform over the heads."""

LOCAL_SHARE = (0.9, 0.3)
"""Mean share of the surroundings in the first and in the last layer; a beta distribution
over the heads, of concentration 4."""

LIKING = (1.0, 2.5)
"""Spread of the logarithm of how much a key is liked: uniform over the heads."""

UNEVENNESS = 0.6
"""Spread of the logarithm of each single entry."""


def synthetic_maps(
    shapes: Sequence[tuple[int, int, int]], prefix_tokens: int = 1, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """float32 [heads, queries, keys] a layer of ``shapes``, rows sum to 1.

    Tokens behind the prefix are a square grid; fewer queries than keys are the grid taken
    by strides. Prefix tokens are looked at, and look, evenly. The same seed gives the same
    maps. Raises ValueError for tokens that are no square grid.
    """
    generator = np.random.default_rng(seed)
    last = max(len(shapes) - 1, 1)
    return tuple(
        _layer(shape, prefix_tokens, index / last, generator) for index, shape in enumerate(shapes)
    )


def _layer(
    shape: tuple[int, int, int], prefix: int, depth: float, generator: np.random.Generator
) -> np.ndarray:
    heads, queries, keys = shape
    distance = _squared_distance(queries - prefix, keys - prefix)
    maps = np.full(shape, 1 / keys)
    for head in range(heads):
        seen = _head(distance, depth, generator)
        maps[head, prefix:, prefix:] = seen * (1 - prefix / keys)
    return maps.astype(np.float32)


def _head(distance: np.ndarray, depth: float, generator: np.random.Generator) -> np.ndarray:
    """One head over patch tokens [queries, keys], rows sum to 1."""
    reach = np.exp(generator.uniform(log(REACH[0]), log(REACH[1])))
    local = np.exp(-distance / (2 * reach**2))
    liked = np.exp(generator.uniform(*LIKING) * generator.standard_normal(distance.shape[1]))
    mean = LOCAL_SHARE[0] + (LOCAL_SHARE[1] - LOCAL_SHARE[0]) * depth
    share = generator.beta(4 * mean, 4 * (1 - mean))
    seen = share * local / local.sum(axis=1, keepdims=True) + (1 - share) * liked / liked.sum()
    seen *= np.exp(UNEVENNESS * generator.standard_normal(seen.shape))
    return seen / seen.sum(axis=1, keepdims=True)


def _squared_distance(queries: int, keys: int) -> np.ndarray:
    """[queries, keys] on the grid, in tokens of the keys."""
    sides = [isqrt(count) for count in (queries, keys)]
    if [side**2 for side in sides] != [queries, keys] or not queries:
        raise ValueError(f"{queries} queries and {keys} keys behind the prefix are no square grids")
    stride = -(-sides[1] // sides[0])
    rows = [np.stack(np.divmod(np.arange(side**2), side), axis=1) for side in sides]
    offset = rows[0][:, None] * stride - rows[1][None]
    return (offset**2).sum(axis=-1)
