"""Masks in vectors: groups of queries that keep the same keys, for machines that gather.

A GPU computes a tile of queries against every key that any of them keeps. Where a mask is
learned in vectors of as many queries, nothing of that is in vain: at equal sparsity it is
faster, and keeps less of the attention. Both belong in a report.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def by_vectors(
    maps: Sequence[np.ndarray], rows: int = 32, prefix_tokens: int = 1
) -> tuple[np.ndarray, ...]:
    """Averaged maps in which each group of ``rows`` queries holds the group's mean.

    `threshold` then gives the queries of a group the same keys, and `plan_attention` takes
    the mask with ``granularity=(rows, 1)``. The prefix tokens stay as they are; groups are
    counted behind them, in the order of the tokens. float32 [heads, queries, keys] a layer.
    Raises ValueError for fewer than one row or fewer queries than prefix tokens.
    """
    if rows < 1:
        raise ValueError(f"a vector has at least 1 row, got {rows}")
    return tuple(_grouped(np.asarray(layer), rows, prefix_tokens) for layer in maps)


def _grouped(layer: np.ndarray, rows: int, prefix: int) -> np.ndarray:
    queries = layer.shape[1] - prefix
    if queries < 1:
        raise ValueError(f"{layer.shape[1]} queries are not more than {prefix} prefix tokens")
    starts = np.arange(0, queries, rows)
    sizes = np.minimum(rows, queries - starts)
    sums = np.add.reduceat(layer[:, prefix:], starts, axis=1, dtype=np.float64)
    means = (sums / sizes[:, None]).astype(np.float32)
    grouped = layer.astype(np.float32)
    grouped[:, prefix:] = np.repeat(means, sizes, axis=1)
    return grouped
