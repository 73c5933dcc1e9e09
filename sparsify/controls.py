"""Masks that ignore the attention: what a learned mask must beat at equal sparsity.

A random mask of equal sparsity belongs beside every learned one: at 50 % sparsity even
random masks keep most of a ViT's features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..workload import AttentionMask


def random_mask(
    shapes: Sequence[tuple[int, int, int]],
    *,
    sparsity: float | None = None,
    like: AttentionMask | None = None,
    prefix_tokens: int = 1,
    seed: int = 0,
) -> AttentionMask:
    """Random keys: uniform over all free entries, or with ``like``'s count in each row.

    shapes  (heads, queries, keys) a layer; rows and columns of the first
            ``prefix_tokens`` tokens are kept and count in the sparsity
    The uniform form (``sparsity``) is the stronger control: like's counts starve the rows
    that a learned mask could afford to prune hard.
    """
    generator = np.random.default_rng(seed)
    scores = [generator.random(shape) for shape in shapes]
    for layer in scores:
        layer[:, :prefix_tokens, :] = -1.0  # before any free entry, so kept first
        layer[:, :, :prefix_tokens] = -1.0
    if like is not None:
        _check_like(shapes, like)
        pairs = zip(scores, like.keep, strict=True)
        made = tuple(_smallest(layer, keep.sum(axis=-1)) for layer, keep in pairs)
        return AttentionMask(made, like.global_threshold)
    if sparsity is None:
        raise ValueError("random_mask needs either sparsity or like, got neither")
    flat = np.concatenate([layer.ravel() for layer in scores])
    forced = int(np.count_nonzero(flat < 0))
    kept = max(round((1.0 - sparsity) * flat.size), forced)
    cut = np.partition(flat, kept - 1)[kept - 1] if kept else -math.inf
    return AttentionMask(tuple(layer <= cut for layer in scores))


def window_mask(
    like: AttentionMask, grid: tuple[int, int], prefix_tokens: int = 1
) -> AttentionMask:
    """The nearest keys on the token grid, as many in each row as ``like`` keeps.

    grid  (rows, columns) of the patch tokens that follow the prefix; a layer with fewer
          queries than keys (LeViT) is taken as the grid subsampled by a whole stride
    """
    distances = {shape[1:]: _distance(shape, grid, prefix_tokens) for shape in like.shapes}
    return AttentionMask(
        tuple(
            _smallest(np.broadcast_to(distances[keep.shape[1:]], keep.shape), keep.sum(axis=-1))
            for keep in like.keep
        ),
        like.global_threshold,
    )


def _check_like(shapes: Sequence[tuple[int, int, int]], like: AttentionMask) -> None:
    if tuple(map(tuple, shapes)) != like.shapes:
        raise ValueError(f"like has layers {like.shapes}, the maps {tuple(map(tuple, shapes))}")


def _smallest(layer: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """bool: the ``counts`` smallest entries of each row, ties by the lower index."""
    order = np.argsort(layer, axis=-1, kind="stable")
    keep = np.empty(layer.shape, dtype=bool)
    np.put_along_axis(keep, order, np.arange(layer.shape[-1]) < counts[..., None], axis=-1)
    return keep


def _distance(shape: tuple[int, int, int], grid: tuple[int, int], prefix: int) -> np.ndarray:
    """Squared grid distance of each query to each key [queries, keys]; -1 for the prefix."""
    _, queries, keys = shape
    rows, columns = grid
    if rows * columns + prefix != keys:
        raise ValueError(
            f"grid {rows} x {columns} and {prefix} prefix tokens make {rows * columns + prefix} "
            f"tokens, a layer of the mask has {keys} keys"
        )
    key_places = _places(rows, columns, 1)
    strides = (s for s in range(1, max(rows, columns) + 1))
    stride = next((s for s in strides if len(_places(rows, columns, s)) == queries - prefix), None)
    if stride is None:
        raise ValueError(f"{queries} queries are no subsampling of a {rows} x {columns} grid")
    query_places = _places(rows, columns, stride)
    distance = np.full((queries, keys), -1, dtype=np.int64)
    offset = query_places[:, None, :] - key_places[None, :, :]
    distance[prefix:, prefix:] = (offset**2).sum(axis=-1)
    return distance


def _places(rows: int, columns: int, stride: int) -> np.ndarray:
    """(row, column) of every stride-th token, row by row: int [tokens, 2]."""
    return np.stack(
        np.meshgrid(np.arange(0, rows, stride), np.arange(0, columns, stride), indexing="ij"),
        axis=-1,
    ).reshape(-1, 2)
