"""The Pareto front against its definition, and what a front must obey."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from sievit.accel.explore.pareto import pareto_front


def naive_front(costs):
    """A point is on the front when no other is <= everywhere and < somewhere."""
    out = []
    for point in costs:
        beaten = any(
            all(a <= b for a, b in zip(other, point, strict=True))
            and any(a < b for a, b in zip(other, point, strict=True))
            for other in costs
        )
        out.append(not beaten)
    return out


costs = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12).map(
        lambda s: (s[0], s[1] % 4 + 1)
    ),
    elements=st.integers(0, 4).map(float),  # few values: many ties
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(costs)
def test_front_is_the_definition(points):
    assert pareto_front(points).tolist() == naive_front(points.tolist())


@settings(derandomize=True, deadline=None, max_examples=100)
@given(costs, st.randoms(use_true_random=False))
def test_front_does_not_depend_on_order_and_covers_all(points, random):
    on_front = pareto_front(points)
    order = list(range(len(points)))
    random.shuffle(order)
    assert (pareto_front(points[order]) == on_front[order]).all()
    assert on_front.any()
    front = points[on_front]
    for point in points:  # each point is met or beaten by one of the front
        assert (front <= point).all(axis=1).any()
    assert pareto_front(front).all()  # the front of a front is itself


def test_many_points():
    points = np.random.default_rng(0).normal(size=(700, 3))
    assert pareto_front(points).tolist() == naive_front(points.tolist())


def test_one_objective_is_the_minimum_with_its_ties():
    assert pareto_front(np.array([[3.0], [1.0], [2.0], [1.0]])).tolist() == [
        False,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("bad", [np.array([[1.0, np.nan]]), np.array([[np.inf, 1.0]])])
def test_figures_must_be_finite(bad):
    with pytest.raises(ValueError, match="finite"):
        pareto_front(bad)


def test_shape_is_checked():
    with pytest.raises(ValueError, match="points, objectives"):
        pareto_front(np.zeros(3))
    assert pareto_front(np.zeros((0, 3))).tolist() == []
