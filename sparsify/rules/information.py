"""The rules "information" and "quota": a row's largest entries until their sum reaches theta.

ViTCoD, HPCA 2023, section IV-B. With a sparsity, the one theta is found whose mask comes
nearest to it: for all heads ("information"), or for each head ("quota").
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from ...workload import AttentionMask
from .arguments import Layers, RuleArguments, force_prefix, in_range

WARN_OFF_BY = 0.001
"""A reached sparsity further than this from the one asked for is a warning."""


def information(layers: Layers, asked: RuleArguments) -> AttentionMask:
    """By ``theta`` (one, or one a layer), or by the ``sparsity`` of the whole mask."""
    asked.only("information", ("theta", "sparsity"), ("released", "granularity"))
    prefix, block = asked.prefix_tokens, asked.granularity
    if asked.theta is None:
        return at_sparsity(layers, asked.one_sparsity, prefix, block)
    return at_theta(layers, _thetas(asked.theta, len(layers)), prefix, asked.released, block)


def quota(layers: Layers, asked: RuleArguments) -> AttentionMask:
    """``sparsity[layer][head]``, or one number for each head alike."""
    asked.only("quota", ("sparsity",))
    sparsity = asked.sparsity
    if sparsity is None or isinstance(sparsity, (int, float, np.number)):
        sparsity = [[asked.one_sparsity] * len(layer) for layer in layers]
    return at_sparsities(layers, sparsity, asked.prefix_tokens)


def _thetas(theta: float | Sequence[float], layers: int) -> tuple[float, ...]:
    values = np.atleast_1d(np.asarray(theta, dtype=np.float64))
    if values.ndim != 1 or values.size not in (1, layers):
        raise ValueError(f"theta is one number or one for each of {layers} layers, got {theta!r}")
    if not np.all((values > 0.0) & (values <= 1.0)):
        raise ValueError(f"theta must be in (0, 1], got {theta!r}")
    return tuple(np.broadcast_to(values, layers).tolist())


def mass_before(
    layer: np.ndarray, granularity: tuple[int, int] = (1, 1), prefix_tokens: int = 0
) -> np.ndarray:
    """For each entry, the sum in float64 of the entries of its row that go before it,
    largest first, ties by the lower index. float64 [heads, queries, keys].

    An entry is kept by "information" exactly when this is below theta: the entry that
    makes the sum reach theta is the last one kept, and a row that never reaches it
    keeps all. With a ``granularity`` the row is a row of blocks: the mean of its queries'
    rows, its blocks in order of mass an entry. Blocks are laid from the first token after
    the prefix, each prefix token is a block of its own, the last block may be smaller.
    """
    if granularity == (1, 1):
        values = np.ascontiguousarray(layer)
        return _sum_before(values, -values)
    rows, columns = (
        _edges(tokens, size, prefix_tokens)
        for tokens, size in zip(layer.shape[1:], granularity, strict=True)
    )
    heights, widths = (
        np.diff([*edges, tokens])
        for edges, tokens in zip((rows, columns), layer.shape[1:], strict=True)
    )
    sums = np.add.reduceat(layer.astype(np.float64), rows, axis=1)
    sums = np.add.reduceat(sums, columns, axis=2) / heights[:, None]
    before = _sum_before(sums, -sums / widths)
    return np.repeat(np.repeat(before, heights, axis=1), widths, axis=2)


def _edges(tokens: int, size: int, prefix_tokens: int) -> np.ndarray:
    """Where blocks begin."""
    return np.concatenate((np.arange(prefix_tokens), np.arange(prefix_tokens, tokens, size)))


def _sum_before(values: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Sums along rows of the ``values`` that go before each, in ascending ``rank``."""
    order = np.argsort(rank, axis=-1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=-1).astype(np.float64)
    before = np.zeros_like(ordered)
    np.cumsum(ordered[..., :-1], axis=-1, out=before[..., 1:])
    result = np.empty_like(before)
    np.put_along_axis(result, order, before, axis=-1)
    return result


def at_theta(
    layers: Sequence[np.ndarray],
    thetas: Sequence[float],
    prefix_tokens: int,
    released: bool = False,
    granularity: tuple[int, int] = (1, 1),
) -> AttentionMask:
    """Keep each row's largest entries until their sum reaches its layer's theta."""
    if released and granularity != (1, 1):
        raise ValueError(f"the released rule keeps single entries, got granularity={granularity}")
    masks = []
    for layer, theta in zip(layers, thetas, strict=True):
        if released:
            keep = _kept_as_released(layer, theta)
        else:
            keep = mass_before(layer, granularity, prefix_tokens) < theta
        masks.append(force_prefix(keep, prefix_tokens))
    return AttentionMask(tuple(masks))


def _kept_as_released(layer: np.ndarray, theta: float) -> np.ndarray:
    order = np.argsort(layer, axis=-1)[..., ::-1]  # the script's: ascending, then reversed
    ordered = np.take_along_axis(layer, order, axis=-1).astype(np.float64)
    below = np.cumsum(ordered, axis=-1) < theta
    count = np.minimum(below.sum(axis=-1, keepdims=True) + 2, layer.shape[-1])
    keep = np.empty(layer.shape, dtype=bool)
    np.put_along_axis(keep, order, np.arange(layer.shape[-1]) < count, axis=-1)
    return keep


def at_sparsity(
    layers: Sequence[np.ndarray],
    sparsity: float,
    prefix: int,
    granularity: tuple[int, int] = (1, 1),
) -> AttentionMask:
    """The one theta for all heads whose mask comes nearest to ``sparsity``."""
    before = [mass_before(layer, granularity, prefix) for layer in layers]
    theta = _theta_at([b[:, prefix:, prefix:].ravel() for b in before], layers, sparsity)
    mask = AttentionMask(tuple(force_prefix(b < theta, prefix) for b in before))
    _warn_if_far(mask.sparsity, sparsity)
    return mask


def _theta_at(free: Sequence[np.ndarray], layers: Sequence[np.ndarray], sparsity: float) -> float:
    """Theta such that, forced entries included, the pruned share is nearest ``sparsity``.

    ``free``: mass before each entry that is not forced. Sorted once, the sums are the
    steps of kept(theta), so the nearest step is read off.
    """
    steps = np.sort(np.concatenate(free))
    entries = sum(layer.size for layer in layers)
    forced = entries - steps.size
    wanted = int(np.clip(round((1.0 - sparsity) * entries) - forced, 1, max(steps.size, 1)))
    if steps.size == 0:
        return 1.0
    low, high = (np.searchsorted(steps, steps[wanted - 1], side=side) for side in ("left", "right"))
    kept = low if low > 0 and wanted - low < high - wanted else high
    return 1.0 if kept == steps.size else min(1.0, float(steps[kept]))


def _warn_if_far(reached: float, asked: float) -> None:
    if abs(reached - asked) > WARN_OFF_BY:
        warnings.warn(
            f"sparsity {asked:.4f} cannot be reached; the nearest is {reached:.4f} "
            "(kept prefix rows and columns and the largest entry of each row set a limit)",
            stacklevel=4,
        )


def at_sparsities(
    layers: Sequence[np.ndarray], sparsity: Sequence[Sequence[float]], prefix_tokens: int
) -> AttentionMask:
    """As "information" at a sparsity, separately for each head: ``sparsity[layer][head]``."""
    wanted = [np.asarray(row, dtype=np.float64) for row in sparsity]
    shapes = [row.shape for row in wanted]
    if shapes != [layer.shape[:1] for layer in layers]:
        raise ValueError(
            f"sparsity gives one number for each head: {[layer.shape[0] for layer in layers]} "
            f"heads by layer, got shapes {shapes}"
        )
    return AttentionMask(
        tuple(
            np.concatenate(
                [
                    at_sparsity([head[None]], in_range(float(share)), prefix_tokens).keep[0]
                    for head, share in zip(layer, row, strict=True)
                ]
            )
            for layer, row in zip(layers, wanted, strict=True)
        )
    )
