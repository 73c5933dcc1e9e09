"""InternImage's stacking rules, the search at 30M parameters, and its scaling rule."""

from __future__ import annotations

import pytest
import torch

from sievit.models.families.internimage import MODELS
from sievit.models.families.internimage_scaling import (
    TINY,
    CompoundRule,
    Variant,
    scaled,
    search_space,
)

THIRD_DEPTHS = {  # (C1, C') -> L3 for L1 = 1..5, where a variant exists
    (48, 16): (61, 56, 52, 48, 44),
    (64, 16): (31, 27, 22, 18, 14),
    (80, 16): (17, 13, 9, 4),
    (64, 32): (34, 29, 25, 21, 17),
}


def closed_form_params(variant: Variant) -> int:
    """The published closed form: pre-norm, no layer scale, 3x3 depthwise, 1000 classes."""

    def block(c, g):
        dcn = (9 * c + c) + 2 * c + (c * 18 * g + 18 * g) + (c * 9 * g + 9 * g) + 2 * (c * c + c)
        return dcn + (8 * c * c + 5 * c) + 4 * c

    c1 = variant.channels
    total = 27 * (c1 // 2) + c1 // 2 + c1 + 9 * c1 * c1 // 2 + c1 + 2 * c1
    for stage, (depth, groups) in enumerate(zip(variant.depths, variant.groups, strict=True)):
        c = c1 * 2**stage
        total += depth * block(c, groups) + 2 * c + (18 * c * c + 4 * c if stage < 3 else 0)
    hidden = int(1.5 * 8 * c1)
    return total + 8 * c1 * hidden + 2 * hidden + hidden * 1000 + 1000


def test_tiny_is_the_named_model():
    assert TINY.params == 29918424
    assert TINY.depths == (4, 4, 18, 4)
    assert TINY.groups == (4, 8, 16, 32)
    assert TINY.depth == 30
    with torch.device("meta"):
        named, built = MODELS["internimage_t"](), TINY.build()
    shapes = {name: tensor.shape for name, tensor in named.state_dict().items()}
    assert {name: tensor.shape for name, tensor in built.state_dict().items()} == shapes


def test_published_search_space():
    space = search_space()
    found = {}
    for variant in space.variants:
        key = (variant.channels, variant.group_channels)
        found.setdefault(key, []).append(variant.third_depth)
        assert variant.params == closed_form_params(variant)
        assert variant.outer_depth <= variant.third_depth
        assert variant.params == pytest.approx(30e6, rel=0.1)
    assert {key: tuple(depths) for key, depths in found.items()} == THIRD_DEPTHS
    assert TINY in space.variants
    assert len(space.variants) + len(space.missing) == 30


def test_what_is_missing_says_why():
    reasons = {
        (m.channels, m.group_channels, m.outer_depth): m.reason for m in search_space().missing
    }
    assert len(reasons) == 11
    assert reasons.pop((80, 16, 5)) == (
        "with L1 = 5 the nearest to 30.0M parameters is L3 = 5 with 36.0M"
    )
    for (channels, group, _), reason in reasons.items():
        assert (channels, group) in {(48, 32), (80, 32)}
        assert reason == f"C1 = {channels} is not divisible by C' = 32"


def test_another_budget_gives_other_depths():
    small = search_space(15e6, channels=(48,), group_channels=(16,), outer_depths=(2,))
    (variant,) = small.variants
    block = Variant(48, 16, 2, 3).params - Variant(48, 16, 2, 2).params
    assert abs(variant.params - 15e6) <= block / 2


def test_phi_of_the_named_widths_and_the_depths_it_gives():
    rule = CompoundRule()
    assert rule.doubling == pytest.approx(2.0099, abs=5e-5)
    table = {80: (0.726, 31.9), 112: (1.820, 35.1), 160: (2.980, 38.8)}
    table |= {192: (3.573, 40.8), 320: (5.234, 47.1)}
    for channels, (phi, depth) in table.items():
        found = rule.phi_of_width(TINY, channels)
        assert found == pytest.approx(phi, abs=5e-4)
        assert rule.depth(TINY, found) == pytest.approx(depth, abs=0.05)
        assert rule.width(TINY, found) == pytest.approx(channels)


def test_scaled_variants_keep_the_stacking_rules():
    assert scaled(TINY, 0) == TINY
    for alpha, beta in ((1.03, 1.40), (1.06, 1.38), (1.09, 1.36), (1.12, 1.34), (1.15, 1.32)):
        rule = CompoundRule(alpha, beta)
        assert rule.doubling == pytest.approx(2, rel=0.02)
        for phi in (0.5, 1.0, 2.0, 3.5):
            variant = scaled(TINY, phi, rule)
            assert variant.channels % 16 == 0
            assert abs(variant.channels - rule.width(TINY, phi)) <= 8
            assert abs(variant.depth - rule.depth(TINY, phi)) <= 0.5
    assert scaled(TINY, 2.0).channels == 112


def test_variants_that_break_a_rule_cannot_be_made():
    with pytest.raises(ValueError, match="L3 = 3 must not be below L1 = 4"):
        Variant(64, 16, 4, 3)
    with pytest.raises(ValueError, match="C1 = 48 is not divisible by C' = 32"):
        Variant(48, 32, 4, 18)
    with pytest.raises(ValueError, match=r"at least 1, got 0\.9, 1\.4"):
        CompoundRule(0.9, 1.4)
