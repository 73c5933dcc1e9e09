"""Every mask rule of `RULES`, held to what all rules promise."""

from __future__ import annotations

import numpy as np
import pytest

from sievit.sparsify import RULES, synthetic_maps, threshold
from sievit.sparsify.rules import rule_named
from sievit.sparsify.rules.arguments import RuleArguments

SHAPES = [(3, 50, 50), (2, 50, 50)]  # one prefix token and 7 x 7 patches


def maps(prefix: int = 1):
    return synthetic_maps(SHAPES, prefix_tokens=prefix, seed=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_a_rule_reaches_its_sparsity(rule, sparsity):
    """ "ratio" keeps the prefix beside its share, so prunes a little less."""
    mask = threshold(maps(), rule, sparsity=sparsity)
    assert mask.shapes == tuple(SHAPES)
    assert mask.sparsity == pytest.approx(sparsity, abs=0.04)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_keeps_the_rows_and_columns_of_the_prefix(rule):
    for layer in threshold(maps(), rule, sparsity=0.8).keep:
        assert layer[:, 0].all()
        assert layer[:, :, 0].all()
        assert not layer[:, 1].all()


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_repeats(rule):
    first, again = (threshold(maps(), rule, sparsity=0.7, seed=3) for _ in range(2))
    assert first == again
    if rule != "information":
        assert first != threshold(maps(), "information", sparsity=0.7)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_refuses_what_it_does_not_take(rule):
    with pytest.raises(ValueError, match=f"rule '{rule}' takes .*got neither"):
        RULES[rule](maps(), RuleArguments())
    unknown = {"released": True, "granularity": (2, 1)}
    if rule != "information":
        for name, value in unknown.items():
            with pytest.raises(ValueError, match=f"takes no {name}"):
                threshold(maps(), rule, sparsity=0.5, **{name: value})


def test_one_number_is_a_quota_for_each_head():
    each = [[0.7] * shape[0] for shape in SHAPES]
    assert threshold(maps(), "quota", sparsity=0.7) == threshold(maps(), "quota", sparsity=each)


def test_a_window_takes_its_rows_from_information_and_its_grid_from_the_tokens():
    learned = threshold(maps(), theta=0.6)
    wanted = threshold(maps(), "window", like=learned, grid=(7, 7))
    assert threshold(maps(), "window", theta=0.6) == wanted
    layer = np.full((1, 7, 7), 1 / 7, np.float32)
    with pytest.raises(ValueError, match=r"needs grid=.*6 are no square"):
        threshold([layer], "window", theta=0.6)


def test_an_unknown_rule_is_told_the_others():
    with pytest.raises(ValueError, match=f"{', '.join(RULES)}, got 'best'"):
        rule_named("best")
