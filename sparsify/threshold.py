"""Averaged attention maps -> fixed masks (ViTCoD, HPCA 2023, section IV-B, "prune").

A map is a float array [heads, queries, keys], non-negative, its rows softmax averages
that sum to one. Every rule answers, for a whole model, which entries stay. The controls,
random and window masks, stand in `controls`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from ..workload import AttentionMask
from .controls import random_mask, window_mask

Maps = Sequence[np.ndarray]
WARN_OFF_BY = 0.001
"""A reached sparsity further than this from the one asked for is a warning."""


def threshold(
    maps: Maps,
    rule: str = "information",
    *,
    theta: float | Sequence[float] | None = None,
    sparsity: float | Sequence[Sequence[float]] | None = None,
    prefix_tokens: int = 1,
    released: bool = False,
    granularity: tuple[int, int] = (1, 1),
    like: AttentionMask | None = None,
    grid: tuple[int, int] | None = None,
    seed: int = 0,
) -> AttentionMask:
    """Learn a fixed mask from averaged attention maps.

    maps           float [heads, queries, keys] a layer; a torch tensor is taken as it is
    rule           "information": a row's entries, largest first, until their sum reaches
                   ``theta``; with ``sparsity`` instead, the one theta whose mask comes
                   nearest to it. "ratio": the same share of every row. "quota": as
                   "information", with ``sparsity[layer][head]`` for each head.
                   "random", "window": controls that ignore the maps' values
    theta          in (0, 1]; one number or one a layer
    sparsity       in [0, 1): pruned over all entries, forced ones included
    prefix_tokens  rows and columns of the first tokens (CLS, distillation, registers)
                   that are kept whole; 0 for models without
    released       keep one entry a row more, as ViTCoD's published script does
    granularity    (queries, keys) of a block that is kept or pruned as one by
                   "information"; see `mass_before`
    like           the mask whose row counts "random" and "window" take over
    grid, seed     token grid (rows, columns) of "window"; seed of "random"

    Raises ValueError, naming the value, for maps with NaN or negative entries and for
    arguments outside their range or that the rule does not take.
    """
    layers = checked_maps(maps, prefix_tokens)
    block = _block(granularity)
    _check_arguments(
        rule,
        theta=theta,
        sparsity=sparsity,
        like=like,
        grid=grid,
        released=released,
        granularity=block != (1, 1),
    )
    if rule == "information":
        if theta is None:
            return _at_sparsity(layers, _in_range(sparsity), prefix_tokens, block)
        thetas = _thetas(theta, len(layers))
        return information(layers, thetas, prefix_tokens, released=released, granularity=block)
    if rule == "ratio":
        return ratio(layers, _in_range(sparsity), prefix_tokens)
    if rule == "quota":
        return quota(layers, sparsity, prefix_tokens)
    shapes = tuple(layer.shape for layer in layers)
    if rule == "random":
        asked = None if sparsity is None else _in_range(sparsity)
        return random_mask(
            shapes, sparsity=asked, like=like, prefix_tokens=prefix_tokens, seed=seed
        )
    return window_mask(like, grid, prefix_tokens)


_TAKES = {  # rule: (exactly one of these, other arguments allowed)
    "information": (("theta", "sparsity"), ("released", "granularity")),
    "ratio": (("sparsity",), ()),
    "quota": (("sparsity",), ()),
    "random": (("sparsity", "like"), ()),
    "window": (("like",), ("grid",)),
}


def _check_arguments(rule: str, **given: object) -> None:
    if rule not in _TAKES:
        raise ValueError(f"rule must be one of {', '.join(_TAKES)}, got {rule!r}")
    one_of, others = _TAKES[rule]
    names = [name for name, value in given.items() if value is not None and value is not False]
    if sum(name in one_of for name in names) != 1:
        wanted = " or ".join(one_of)
        raise ValueError(f"rule {rule!r} takes {wanted}, got {', '.join(names) or 'neither'}")
    stray = [name for name in names if name not in one_of + others]
    if stray:
        raise ValueError(f"rule {rule!r} takes no {', '.join(stray)}")
    if rule == "window" and given["grid"] is None:
        raise ValueError("rule 'window' needs grid=(rows, columns) of the patch tokens")


def checked_maps(maps: Maps, prefix_tokens: int) -> tuple[np.ndarray, ...]:
    """The maps as arrays; ValueError where they are no attention of so many prefix tokens."""
    layers = tuple(np.asarray(layer) for layer in maps)
    if not layers:
        raise ValueError("maps needs at least one layer, got none")
    for index, layer in enumerate(layers):
        if layer.ndim != 3 or not np.issubdtype(layer.dtype, np.floating):
            raise ValueError(
                f"maps[{index}] is float [heads, queries, keys], "
                f"got {layer.dtype} {list(layer.shape)}"
            )
        bad = ~np.isfinite(layer) | (layer < 0)
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"maps[{index}] holds {layer[place]} at (head, query, key) = {place}; "
                "attention is finite and not negative"
            )
        if not 0 <= prefix_tokens <= min(layer.shape[1:]):
            raise ValueError(
                f"prefix_tokens must be in 0..{min(layer.shape[1:])}, got {prefix_tokens}"
            )
    return layers


def _in_range(sparsity: object) -> float:
    if not isinstance(sparsity, (int, float, np.number)) or not 0.0 <= float(sparsity) < 1.0:
        raise ValueError(f"sparsity must be one number in [0, 1), got {sparsity!r}")
    return float(sparsity)


def _thetas(theta: float | Sequence[float], layers: int) -> tuple[float, ...]:
    values = np.atleast_1d(np.asarray(theta, dtype=np.float64))
    if values.ndim != 1 or values.size not in (1, layers):
        raise ValueError(f"theta is one number or one for each of {layers} layers, got {theta!r}")
    if not np.all((values > 0.0) & (values <= 1.0)):
        raise ValueError(f"theta must be in (0, 1], got {theta!r}")
    return tuple(np.broadcast_to(values, layers).tolist())


def _block(granularity: tuple[int, int]) -> tuple[int, int]:
    if len(granularity) != 2 or any(not isinstance(n, int) or n < 1 for n in granularity):
        raise ValueError(
            f"granularity is (queries, keys) of a block, both at least 1, got {granularity!r}"
        )
    return tuple(granularity)


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


def _force_prefix(keep: np.ndarray, prefix_tokens: int) -> np.ndarray:
    keep[..., :prefix_tokens, :] = True
    keep[..., :, :prefix_tokens] = True
    return keep


def information(
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
        masks.append(_force_prefix(keep, prefix_tokens))
    return AttentionMask(tuple(masks))


def _kept_as_released(layer: np.ndarray, theta: float) -> np.ndarray:
    order = np.argsort(layer, axis=-1)[..., ::-1]  # the script's: ascending, then reversed
    ordered = np.take_along_axis(layer, order, axis=-1).astype(np.float64)
    below = np.cumsum(ordered, axis=-1) < theta
    count = np.minimum(below.sum(axis=-1, keepdims=True) + 2, layer.shape[-1])
    keep = np.empty(layer.shape, dtype=bool)
    np.put_along_axis(keep, order, np.arange(layer.shape[-1]) < count, axis=-1)
    return keep


def _at_sparsity(
    layers: Sequence[np.ndarray],
    sparsity: float,
    prefix: int,
    granularity: tuple[int, int] = (1, 1),
) -> AttentionMask:
    """The one theta for all heads whose mask comes nearest to ``sparsity``."""
    before = [mass_before(layer, granularity, prefix) for layer in layers]
    theta = _theta_at([b[:, prefix:, prefix:].ravel() for b in before], layers, sparsity)
    mask = AttentionMask(tuple(_force_prefix(b < theta, prefix) for b in before))
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


def quota(
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
                    _at_sparsity([head[None]], _in_range(float(share)), prefix_tokens).keep[0]
                    for head, share in zip(layer, row, strict=True)
                ]
            )
            for layer, row in zip(layers, wanted, strict=True)
        )
    )


def ratio(layers: Sequence[np.ndarray], sparsity: float, prefix_tokens: int) -> AttentionMask:
    """Prune, in each row, the entries whose ascending rank is below sparsity * keys."""
    masks = []
    for layer in layers:
        rank = np.argsort(np.argsort(layer, axis=-1, kind="stable"), axis=-1, kind="stable")
        masks.append(_force_prefix(rank >= sparsity * layer.shape[-1], prefix_tokens))
    return AttentionMask(tuple(masks))
