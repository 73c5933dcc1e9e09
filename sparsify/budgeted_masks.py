"""Masks that know the hardware: the most attention kept within a budget of its time.

Beyond ViTCoD, whose masks are chosen by attention alone and then polarized. Here every
entry has a price, and a head's mask maximises

    sum over kept entries of (value - price * cost),

which falls apart into independent choices, so that it is solved exactly for each price; the
price is then bisected until the cost of the whole mask meets the budget. Two cost models:

- `accelerator`: an entry costs 1 in the denser engine and ``sparser`` in the sparser one; a
  key is global (its whole column is computed, so kept) where that is worth more than its
  best entries alone;
- `tiles`: a GPU kernel gathers, for ``rows`` queries at once, every key that one of them
  keeps: such a tile column costs ``rows``, so is kept or pruned as one. The order of the
  queries decides what can share a tile: the best of several orders is taken for each head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..accel.kernels import plan_layers
from ..workload import AttentionMask
from .rules.arguments import Maps, checked_maps

Solver = Callable[[np.ndarray, float], np.ndarray]
"""(values [queries, keys], price) -> what to keep, bool [queries, keys]."""
Cost = Callable[[AttentionMask], float]

WEIGHINGS = 10
"""Bisection steps on the rows' weights."""
LEAST_MASS = 1e-4
"""Rows that keep less weigh no more."""
TRIALS = 24
"""Bisection steps on the price."""


@dataclass(frozen=True, eq=False)
class HardwareMask:
    """A mask, its ``cost``, its share of the attention ``mass``, and the ``price`` that
    made it."""

    mask: AttentionMask
    cost: float
    mass: float
    price: float


def budgeted_masks(
    maps: Maps,
    cost: Cost,
    budget: float,
    solver: Solver | None = None,
    *,
    prefix_tokens: int = 1,
    fairness: float = 1.0,
    tolerance: float = 0.01,
) -> HardwareMask:
    """The mask of most value whose ``cost`` is at most ``budget``.

    maps       averaged attention, float [heads, queries, keys] a layer
    cost       of a whole mask: simulated cycles, or `tile_area`
    solver     `accelerator` (the default) or `tiles`, with their parameters
    fairness   what a row is worth grows with the mass m that it keeps at the rate
               m ** -fairness: by m itself at 0, which starves rows, by its logarithm at 1;
               in the limit all rows keep the same, which is the rule "information"
    tolerance  the search ends when the cost is within this share below the budget

    Rows and columns of the first ``prefix_tokens`` and the largest entry of each row are
    always kept. Raises ValueError where these alone cost more than the budget.
    """
    layers = checked_maps(maps, prefix_tokens)
    if budget <= 0 or fairness < 0:
        raise ValueError(
            f"budget must be above 0 and fairness at least 0, got {budget} and {fairness}"
        )
    solve = accelerator() if solver is None else solver
    best: HardwareMask | None = None
    low, high = 0.0, 1.0  # prices between which the budget is met
    while (found := _at_price(layers, high, solve, prefix_tokens, fairness, cost)).cost > budget:
        low, high = high, high * 8
        if high > 1e6:
            raise ValueError(
                f"the entries that are always kept alone cost {found.cost:.6g}, more than the "
                f"budget of {budget:.6g}"
            )
    best = found
    for _ in range(TRIALS):
        if best.cost >= budget * (1.0 - tolerance):
            break
        price = (low * high) ** 0.5 if low > 0 else high / 16
        found = _at_price(layers, price, solve, prefix_tokens, fairness, cost)
        if found.cost > budget:
            low = price
        else:
            high, best = price, max(best, found, key=lambda one: one.cost)
            if low == 0 and price < 1e-9:
                break
    return best


def accelerator(sparser: float = 1.25) -> Solver:
    """For denser and sparser engines.

    ``sparser`` is what a kept entry costs there beside one in the denser engine: an index
    read and waits for banks.
    """
    if sparser <= 0:
        raise ValueError(f"the cost of a sparser entry must be above 0, got {sparser}")

    def solve(values: np.ndarray, price: float) -> np.ndarray:
        gains = values - price * sparser
        keep = gains > 0
        alone = np.where(keep, gains, 0.0).sum(axis=0)
        whole = values.sum(axis=0) - price * values.shape[0]
        keep[:, whole > alone] = True
        return keep

    return solve


def tiles(rows: int = 32, orders: Sequence[np.ndarray] = (), prefix_tokens: int = 0) -> Solver:
    """For kernels that gather keys for ``rows`` queries at once.

    orders         orders of the queries to choose from beside the natural one, each a
                   permutation; see `block_orders`
    prefix_tokens  the first queries, which are kept whole, in a tile of their own
    """
    if rows < 1:
        raise ValueError(f"a tile has at least 1 row, got {rows}")

    def solve(values: np.ndarray, price: float) -> np.ndarray:
        queries = values.shape[0]
        candidates = [order for order in orders if len(order) == queries]
        starts = [*([0] if prefix_tokens else []), *range(prefix_tokens, queries, rows)]
        heights = np.diff([*starts, queries])
        best, kept = -np.inf, np.zeros(values.shape, dtype=bool)
        for order in (np.arange(queries), *candidates):
            sums = np.add.reduceat(values[order], starts, axis=0)
            gains = sums - price * rows
            worth = float(np.where(gains > 0, gains, 0.0).sum())
            if worth > best:
                keep = np.empty(values.shape, dtype=bool)
                keep[order] = np.repeat(gains > 0, heights, axis=0)
                best, kept = worth, keep
        return kept

    return solve


def grid_order(grid: tuple[int, int], block: tuple[int, int], prefix_tokens: int = 1) -> np.ndarray:
    """Queries in blocks of the token grid (rows, columns), prefix tokens first."""
    height, width = grid
    y, x = np.divmod(np.arange(height * width), width)
    keys = (x % block[1], y % block[0], x // block[1], y // block[0])
    patches = np.lexsort(keys) + prefix_tokens
    return np.concatenate((np.arange(prefix_tokens), patches))


def block_orders(
    lengths: Sequence[int], rows: int = 32, prefix_tokens: int = 1
) -> tuple[np.ndarray, ...]:
    """`grid_order` in blocks of ``rows`` patches for each number of queries that is a square
    grid behind its prefix tokens: 32 in blocks of 4 x 8."""
    height = 1 << (rows.bit_length() - 1) // 2
    sides = {length: math.isqrt(length - prefix_tokens) for length in dict.fromkeys(lengths)}
    return tuple(
        grid_order((side, side), (height, rows // height), prefix_tokens)
        for length, side in sides.items()
        if side and side * side + prefix_tokens == length
    )


def tile_area(rows: int = 32) -> Cost:
    """Entries that a GPU's forward computes with tiles of ``rows`` queries (16, 32 or 64),
    as `sievit.accel.kernels.plan_layers` lays them out."""

    def cost(mask: AttentionMask) -> float:
        return float(sum(plan.computed for plan in plan_layers(mask, tile=rows)))

    return cost


def kept_mass(maps: Maps, mask: AttentionMask) -> float:
    """Share of the averaged attention that ``mask`` keeps, mean over heads and queries."""
    kept = [np.where(k, m, 0.0).sum(-1).mean(1) for m, k in zip(maps, mask.keep, strict=True)]
    return float(np.concatenate(kept).mean())


def _at_price(
    layers: Sequence[np.ndarray],
    price: float,
    solve: Solver,
    prefix: int,
    fairness: float,
    cost: Cost,
) -> HardwareMask:
    scaled = price / float(np.mean([layer.shape[-1] for layer in layers]))  # 1: the mean entry
    mask = AttentionMask(
        tuple(
            np.stack([_head(head, scaled, solve, prefix, fairness) for head in layer])
            for layer in layers
        )
    )
    return HardwareMask(mask, float(cost(mask)), kept_mass(layers, mask), price)


def _head(
    values: np.ndarray, price: float, solve: Solver, prefix: int, fairness: float
) -> np.ndarray:
    """One head's mask at a price, its rows weighted by what they keep.

    A row keeps more the more it weighs, and should weigh less the more it keeps: where the
    two meet is bracketed for all rows at once.
    """
    values = values.astype(np.float64)
    least = _kept_by_row(values, _with_forced(np.zeros(values.shape, dtype=bool), values, prefix))
    low, high = np.ones(len(values)), _weight(least, fairness)
    for _ in range(WEIGHINGS if fairness else 0):
        weights = np.sqrt(low * high)
        keep = _with_forced(solve(values * weights[:, None], price), values, prefix)
        heavy = weights > _weight(_kept_by_row(values, keep), fairness)
        low, high = np.where(heavy, low, weights), np.where(heavy, weights, high)
    return _with_forced(solve(values * high[:, None], price), values, prefix)


def _weight(mass: np.ndarray, fairness: float) -> np.ndarray:
    """What rows that keep ``mass`` should weigh."""
    return np.maximum(mass, LEAST_MASS) ** -fairness


def _kept_by_row(values: np.ndarray, keep: np.ndarray) -> np.ndarray:
    return np.where(keep, values, 0.0).sum(axis=-1)


def _with_forced(keep: np.ndarray, values: np.ndarray, prefix: int) -> np.ndarray:
    """``keep`` with the entries that are always kept."""
    keep[np.arange(len(keep)), values.argmax(axis=-1)] = True
    keep[:prefix] = True
    keep[:, :prefix] = True
    return keep
