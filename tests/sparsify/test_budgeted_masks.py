"""Masks of most value within a budget: exact at a price, within budget, better than plain."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.accel.kernels import plan_attention
from sievit.sparsify import budgeted_masks, polarize, threshold
from sievit.sparsify.budgeted_masks import (
    accelerator,
    block_orders,
    grid_order,
    kept_mass,
    tile_area,
    tiles,
)
from sievit.workload import AttentionMask


def softmaxed(seed: int, heads: int, queries: int, keys: int, sharp: float = 2.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    scores = sharp * generator.normal(size=(heads, queries, keys))
    scores += 2 * generator.normal(size=(heads, 1, keys))  # some keys matter to all
    maps = np.exp(scores)
    return (maps / maps.sum(-1, keepdims=True)).astype(np.float32)


def engine_cost(keep: np.ndarray, sparser: float) -> float:
    """Cost of one head: every key global or not, whichever is cheaper for what it keeps."""
    counts = keep.sum(axis=0)
    return float(np.minimum(keep.shape[0], sparser * counts).sum())


@pytest.mark.parametrize("price", [0.01, 0.05, 0.2])
def test_the_choice_at_a_price_is_the_best_of_all_masks(price):
    values = softmaxed(0, 1, 3, 3)[0].astype(np.float64)
    kept = accelerator(1.25)(values, price)

    def worth(keep):
        return values[keep].sum() - price * engine_cost(keep, 1.25)

    every = (np.array(bits).reshape(3, 3) for bits in itertools.product([False, True], repeat=9))
    assert worth(kept) == pytest.approx(max(worth(keep) for keep in every), abs=1e-12)


@pytest.mark.parametrize("price", [0.02, 0.1])
def test_tiles_choose_the_best_tile_columns_and_order(price):
    values = softmaxed(1, 1, 4, 3)[0].astype(np.float64)
    order = np.array([0, 2, 1, 3])
    kept = tiles(2, [order])(values, price)

    def best(order):
        found = 0.0
        for start in (0, 2):
            sums = values[order[start : start + 2]].sum(axis=0)
            found += sum(max(0.0, s - price * 2) for s in sums)
        return found

    area = min(
        2 * sum(kept[rows[start : start + 2]].any(axis=0).sum() for start in (0, 2))
        for rows in (np.arange(4), order)
    )
    assert values[kept].sum() - price * area == pytest.approx(
        max(best(np.arange(4)), best(order)), abs=1e-12
    )


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    st.integers(0, 1000),
    st.integers(1, 3),
    st.tuples(st.integers(5, 24), st.integers(5, 24)),
    st.integers(0, 2),
    st.floats(0.3, 0.9),
)
def test_the_budget_is_kept_and_no_row_is_empty(seed, heads, shape, prefix, share):
    maps = [softmaxed(seed, heads, *shape)]

    def cost(mask):
        return sum(engine_cost(head, 1.25) for layer in mask.keep for head in layer)

    whole = heads * shape[0] * shape[1]
    try:
        found = budgeted_masks(maps, cost, share * whole, prefix_tokens=prefix)
    except ValueError as error:
        if "always kept alone cost" not in str(error):
            raise
        return
    assert found.cost <= share * whole
    assert cost(found.mask) == found.cost
    assert found.mask.keep[0].any(axis=-1).all()
    assert found.mask.keep[0][:, :prefix].all()
    assert found.mask.keep[0][:, :, :prefix].all()
    assert found.mass == pytest.approx(kept_mass(maps, found.mask))


def test_more_mass_than_the_plain_rule_at_equal_cost():
    maps = [softmaxed(seed, 4, 64, 64) for seed in range(3)]

    def cost(mask):
        return sum(engine_cost(head, 1.25) for layer in mask.keep for head in layer)

    for sparsity in (0.6, 0.8, 0.9):
        plain = threshold(maps, sparsity=sparsity)
        found = budgeted_masks(maps, cost, cost(plain))
        assert found.cost <= cost(plain)
        assert found.mass > kept_mass(maps, plain)


def alone(values, price):
    """A solver without global keys."""
    return values > price


def test_more_fairness_leaves_no_row_behind():
    flat, steep = (softmaxed(2, 4, 24, 48, sharp=sharp) for sharp in (0.5, 2.0))
    maps = [np.concatenate((flat, steep), axis=1)]
    budget = 0.1 * 4 * 48 * 48

    def cost(mask):
        return float(sum(layer.sum() for layer in mask.keep))

    least, mass = [], []
    for fairness in (0.0, 0.5, 1.0, 2.0, 4.0):
        found = budgeted_masks(
            maps, cost, budget, alone, fairness=fairness, prefix_tokens=0, tolerance=0.001
        )
        rows = np.where(found.mask.keep[0], maps[0], 0).sum(-1)
        least.append(np.quantile(rows, 0.05))
        mass.append(found.mass)
    assert least == sorted(least)
    assert least[-1] > least[0] + 0.05
    assert mass == sorted(mass, reverse=True)


@pytest.mark.parametrize("fairness", [0.5, 1.0, 3.0])
def test_every_row_keeps_what_is_worth_its_price(fairness):
    """Without global keys rows are independent: against the best count of each, by trying."""
    maps = [softmaxed(4, 2, 50, 60, sharp=1.5)]

    def cost(mask):
        return float(sum(layer.sum() for layer in mask.keep))

    found = budgeted_masks(
        maps, cost, 0.15 * 2 * 50 * 60, alone, fairness=fairness, prefix_tokens=0
    )
    mass = np.sort(maps[0], axis=-1)[..., ::-1].cumsum(-1)
    worth = np.log(mass) if fairness == 1 else mass ** (1 - fairness) / (1 - fairness)
    best = (worth - found.price / 60 * np.arange(1, 61)).argmax(-1) + 1
    kept = found.mask.keep[0].sum(-1)
    assert np.abs(kept - best).max() <= 1
    assert (kept == best).mean() > 0.5
    assert len(np.unique(best)) > 5


def test_whole_columns_are_what_polarize_calls_global():
    maps = [softmaxed(3, 2, 40, 40)]

    def cost(mask):
        return sum(engine_cost(head, 1.25) for layer in mask.keep for head in layer)

    found = budgeted_masks(maps, cost, 0.6 * 2 * 40 * 40)
    for head, parts in zip(found.mask.keep[0], polarize(found.mask, 39)[0], strict=True):
        assert parts.num_global == (head.sum(axis=0) == 40).sum() > 2


def test_tile_masks_fill_their_tiles():
    maps = [softmaxed(4, 2, 65, 65)]
    orders = block_orders([65, 65, 51], 16)
    assert [order.tolist() for order in orders] == [grid_order((8, 8), (4, 4)).tolist()]
    cost, solver = tile_area(16), tiles(16, orders, 1)
    budget = 0.4 * 2 * 65 * 65
    found = budgeted_masks(maps, cost, budget, solver)
    plain = threshold(maps, sparsity=0.8)
    tight = budgeted_masks(maps, cost, cost(plain), solver)
    assert found.cost <= budget
    assert tight.mass > kept_mass(maps, plain) + 0.03
    for head in tight.mask.keep[0]:  # CLS apart, the patches by fours of tiles
        wanted = min(
            sum(head[1:][rows][at : at + 16].any(axis=0).sum() for at in range(0, 64, 16))
            for rows in (np.arange(64), orders[0][1:] - 1)
        )
        planned = tile_area(16)(AttentionMask((head[None],)))
        assert planned <= 1.05 * 16 * (wanted + 65)


def test_the_area_is_what_the_kernel_is_planned_to_compute():
    mask = threshold([softmaxed(5, 2, 33, 33)], sparsity=0.7)
    plan = plan_attention(mask.keep[0], tile=16)
    assert tile_area(16)(mask) == 16 * len(plan.by_query.columns) == plan.computed
    with pytest.raises(ValueError, match="tile must be one of 16, 32, 64, got 8"):
        tile_area(8)(mask)


def test_grid_order_walks_blocks_of_the_grid():
    assert grid_order((2, 4), (2, 2)).tolist() == [0, 1, 2, 5, 6, 3, 4, 7, 8]
    for grid, block in (((5, 7), (2, 3)), ((3, 3), (4, 4))):
        order = grid_order(grid, block, prefix_tokens=2)
        assert sorted(order) == list(range(grid[0] * grid[1] + 2))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"budget": 0.0}, "budget must be above 0"),
        ({"budget": 10.0, "fairness": -1.0}, "fairness at least 0"),
        ({"budget": 1.0}, "always kept alone cost"),
        ({"budget": 1e5, "prefix_tokens": 99}, "prefix_tokens must be in"),
    ],
)
def test_bad_arguments_are_named(arguments, match):
    maps = [softmaxed(0, 1, 8, 8)]
    with pytest.raises(ValueError, match=match):
        budgeted_masks(maps, lambda mask: float(mask.keep[0].sum()), **arguments)
    with pytest.raises(ValueError, match="at least 1 row"):
        tiles(0)
    with pytest.raises(ValueError, match="must be above 0"):
        accelerator(0.0)
