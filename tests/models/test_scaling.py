"""Scaling rules and the authors' counter, against their published and recorded figures."""

from __future__ import annotations

import json
from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sievit.models.families.efficientnet import EfficientNetConfig
from sievit.models.families.regnet import RegNetConfig, compatible
from sievit.models.scaling import (
    BASES,
    Counts,
    Factors,
    build,
    count,
    fast_kind,
    fit_line,
    scale,
    scaling_factors,
)

NAMES = {  # the authors' name -> ours
    "EN-B0": "efficientnet_b0",
    "RegNetX-400MF": "regnetx_004",
    "RegNetY-400MF": "regnety_004",
    "RegNetY-600MF": "regnety_006",
    "RegNetY-4.0GF": "regnety_040",
    "RegNetY-16GF": "regnety_160",
    "RegNetZ-500MF": "regnetz_005",
    "RegNetZ-4GF": "regnetz_040_h",
    "R-50": "resnet50",
}
KINDS = ("d", "w", "r", "dw", "dr", "wr", "dwr", "wg", "dwgr", "d1_w8_g8_r1")
ZOO = {  # the authors' model zoo: G flops, M parameters, M activations, as printed
    "efficientnet_b0": (0.4, 5.3, 6.7),
    "efficientnet_b2": (1.0, 9.1, 13.8),
    "efficientnet_b4": (4.4, 19.3, 49.5),
    "efficientnet_b5": (10.3, 30.4, 98.9),
    "regnetx_002": (0.2, 2.7, 2.2),
    "regnetx_320": (31.7, 107.8, 36.3),
    "regnety_008": (0.8, 6.3, 5.2),
    "regnety_016": (1.6, 11.2, 8.0),
    "regnety_080": (8.0, 39.2, 18.0),
    "regnety_320": (32.3, 145.0, 30.3),
    "resnext50_32x4d": (4.2, 25.0, 14.6),
}
SCALED = {  # recorded from the authors' scaler
    ("efficientnet_b0", "w", 4): (1449978528, 18122720, 13495072),
    ("efficientnet_b0", "fast", 16): (5477638310, 47392966, 34302246),
    ("regnety_040", "dwgr", 4): (15778146424, 49386616, 35777176),
    ("regnety_004", "fast", 4): (1572517292, 14594380, 7919628),
    ("regnetz_040_h", "fast", 4): (17425872126, 97590718, 55522670),
}


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads(golden("golden/fast_scaling.json").read_text())


def structure(config) -> dict:
    """A description in the words of the recorded rows."""
    row = {"res": config.image_size, "stem_w": config.stem_width, "head_w": config.head_width}
    row |= {"depths": list(config.depths), "widths": list(config.widths)}
    if isinstance(config, EfficientNetConfig):
        return row | {"exp": list(config.expansions), "kernels": list(config.kernels)}
    return row | {"bot_muls": list(config.bottlenecks), "group_ws": list(config.group_widths)}


def agrees(config, row: dict) -> bool:
    return all(row[key] == value for key, value in structure(config).items())


@pytest.mark.parametrize("name", NAMES)
def test_base_networks_are_the_recorded_ones(recorded, name):
    row = recorded[name]["base"]
    config = BASES[NAMES[name]]
    assert agrees(config, row)
    assert count(config) == Counts(row["flops"], row["params"], row["acts"])


@pytest.mark.parametrize("name", ["EN-B0", "RegNetY-4.0GF", "RegNetZ-500MF"])
def test_scaled_networks_are_the_recorded_ones(recorded, name):
    rows = recorded[name]["scaled"]
    assert len(rows) == 12
    for key, row in rows.items():
        kind, s = key.split("@")
        assert list(astuple(scaling_factors(kind, float(s)))) == row["factors"]
        config = scale(BASES[NAMES[name]], kind, float(s))
        assert agrees(config, row), key
        if s == "2":
            assert count(config) == Counts(row["flops"], row["params"], row["acts"]), key


@pytest.mark.parametrize("case", SCALED)
def test_counts_of_scaled_networks(case):
    name, kind, s = case
    assert count(scale(BASES[name], kind, s)) == Counts(*SCALED[case])


@pytest.mark.parametrize("name", ZOO)
def test_counts_agree_with_the_authors_model_zoo(name):
    counts = count(BASES[name])
    got = (counts.flops / 1e9, counts.params / 1e6, counts.activations / 1e6)
    assert tuple(round(value, 1) for value in got) == ZOO[name]


def test_shapes_of_the_fast_scaled_networks():
    config = scale(BASES["regnety_040"], "fast", 4)
    assert config.depths == (2, 7, 14, 2)
    assert config.widths == (224, 336, 896, 1904)
    assert config.group_widths == (112,) * 4
    assert config.image_size == 240
    config = scale(BASES["regnetz_040_h"], "fast", 4)
    assert config.widths == (80, 184, 416, 920)
    assert config.group_widths == (16,) * 4
    assert config.image_size == 276
    assert scale(BASES["efficientnet_b0"], "fast", 4).head_width == 2232


@pytest.mark.parametrize("name", NAMES.values())
def test_every_scaled_description_keeps_the_rules(name):
    base = BASES[name]
    for kind in KINDS:
        for s in (0.25, 0.5, 1, 2, 3.7, 4, 8, 16):
            config = scale(base, kind, s)
            assert len(config.depths) == len(base.depths)
            assert min(config.depths) >= 1
            assert config.image_size % 4 == 0
            if isinstance(config, RegNetConfig):
                pairs = zip(config.inner_widths, config.group_widths, strict=True)
                assert all(inner % group == 0 for inner, group in pairs)
                assert config.stem_width == base.stem_width
            else:
                assert all(width % 8 == 0 for width in config.widths)
            if s == 1:
                assert config == base


def test_a_scaled_network_runs():
    for name in ("efficientnet_b0", "regnetz_005", "resnet50"):
        with torch.device("meta"):
            model = build(scale(BASES[name], "fast", 0.5), num_classes=7).eval()
        assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 7)


EXPONENTS = {  # table 2 of the paper: flops, parameters, activations as powers of s
    "d": (1, 1, 1),
    "w": (1, 1, 1 / 2),
    "r": (1, 0, 1),
    "dw": (1, 1, 3 / 4),
    "dr": (1, 1 / 2, 1),
    "wr": (1, 1 / 2, 3 / 4),
    "dwr": (1, 2 / 3, 5 / 6),
    "fast": (1, 0.9, 0.6),
}


@pytest.mark.parametrize("kind", EXPONENTS)
def test_predictions_follow_the_table(kind):
    for s in (2.0, 7.3):
        predicted = scaling_factors(kind, s).predicted()
        expected = [s**power for power in EXPONENTS[kind]]
        np.testing.assert_allclose(astuple(predicted), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["w", "r", "dw", "wr", "dwr"])
def test_predictions_are_what_a_stack_of_convolutions_costs(kind):
    s = 4096  # all of these kinds then multiply by whole numbers
    factors = scaling_factors(kind, s)

    def cost(depth, width, resolution):
        conv = nn.Conv2d(width, width, 3, padding=1, bias=False, device="meta")
        out = conv(torch.empty(1, width, resolution, resolution, device="meta"))
        macs = out.numel() * conv.weight[0].numel()
        return depth * np.array([macs, conv.weight.numel(), out.numel()])

    width, resolution = 4 * factors.width, 4 * factors.resolution
    ratio = cost(3 * factors.depth, round(width), round(resolution)) / cost(3, 4, 4)
    np.testing.assert_allclose(ratio, astuple(factors.predicted()), rtol=1e-9)


def test_group_width_counts_as_the_paper_says():
    s = 5.0
    wide = scaling_factors("w", s).predicted(grouped=True)
    np.testing.assert_allclose(astuple(wide), [s**0.5] * 3)
    groups = scaling_factors("g", s).predicted(grouped=True)
    np.testing.assert_allclose(astuple(groups), [s, s, 1])
    both = scaling_factors("wg", s).predicted(grouped=True)
    np.testing.assert_allclose(astuple(both), [s, s, s**0.5])


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    weights=st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(lambda w: sum(w[:3])),
    s=st.floats(0.1, 50),
)
def test_factors_always_share_out_s(weights, s):
    kind = "_".join(f"{letter}{weight}" for letter, weight in zip("dwgr", weights, strict=True))
    factors = scaling_factors(kind, s)
    assert factors.depth * factors.width**2 * factors.resolution**2 == pytest.approx(s, rel=1e-9)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    eighths=st.integers(1, 300),
    bottleneck=st.sampled_from([0.25, 0.5, 1.0, 4, 6]),
    group=st.integers(1, 400),
)
def test_compatible_widths_divide(eighths, bottleneck, group):
    width, fitted = compatible(8 * eighths, bottleneck, group)
    assert (width * bottleneck) % fitted == 0
    assert fitted == min(group, int(8 * eighths * bottleneck))
    assert width == 8 * eighths or (8 * eighths * bottleneck) % fitted or bottleneck > 1


def test_fast_scaling_with_other_alphas():
    for alpha, kind in ((1, "wg"), (0, "dr")):
        assert scaling_factors(fast_kind(alpha), 3.0) == scaling_factors(kind, 3.0)
    third = astuple(scaling_factors(fast_kind(1 / 3), 3.0))
    assert third == pytest.approx(astuple(scaling_factors("dwgr", 3.0)))
    fast = astuple(scaling_factors(fast_kind(0.8), 3.0))
    assert fast == pytest.approx(astuple(scaling_factors("fast", 3.0)))


def test_line_through_points():
    fit = fit_line([1, 2, 3, 4], [2, 4, 5, 9])
    np.testing.assert_allclose(astuple(fit), (2.2, -0.5, 11 / np.sqrt(5 * 26)))
    assert fit_line([0, 1, 2], [5, 3, 1]).r == pytest.approx(-1)
    with pytest.raises(ValueError, match="vary"):
        fit_line([1, 1], [2, 3])
    with pytest.raises(ValueError, match="two or more points"):
        fit_line([1], [2])


@pytest.mark.parametrize("kind", ["", "x", "d1_q2", "d1_w", "dd", "d-1_w2", "d0", "fastest"])
def test_kinds_that_mean_nothing_are_named(kind):
    with pytest.raises(ValueError, match="kind must be one of d, w, r"):
        scaling_factors(kind, 2)


def test_other_bad_values_are_named():
    with pytest.raises(ValueError, match="must be positive, got 0"):
        scaling_factors("d", 0)
    with pytest.raises(ValueError, match=r"alpha must be in 0\.\.1, got 1\.5"):
        fast_kind(1.5)
    with pytest.raises(ValueError, match="must be positive"):
        Factors(1, 0, 1, 1)
    with pytest.raises(ValueError, match="no multiple of the group width 7"):
        RegNetConfig((1,), (16,), (7,), (1.0,), (2,))
