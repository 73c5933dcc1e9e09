"""RegNets: the generator against the published stages, counts, blocks, released names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sievit.models.families.regnet import (
    CONFIGS,
    MODELS,
    Block,
    RegNet,
    RegNetConfig,
    regnet_config,
)

PARAMS = {
    "regnetx_004": 5157512,
    "regnety_004": 4344144,
    "regnety_006": 6055160,
    "regnety_040": 20646656,
    "regnety_160": 83590140,
    "regnety_320": 145046770,
    "regnetz_005": 7122742,
    "regnetz_040": 27116800,
    "regnetz_040_h": 28938880,
}
STAGES = {  # depths, widths as published
    "regnetx_004": ((1, 2, 7, 12), (32, 64, 160, 384)),
    "regnety_004": ((1, 3, 6, 6), (48, 104, 208, 440)),
    "regnety_006": ((1, 3, 7, 4), (48, 112, 256, 608)),
    "regnety_040": ((2, 6, 12, 2), (128, 192, 512, 1088)),
    "regnety_160": ((2, 4, 11, 1), (224, 448, 1232, 3024)),
    "regnetz_005": ((1, 4, 9, 7), (16, 40, 104, 256)),
    "regnetz_040": ((2, 6, 14, 6), (48, 104, 240, 528)),
}


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_are_the_published_ones(name):
    with torch.device("meta"):
        model = MODELS[name]()
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]


@pytest.mark.parametrize("name", STAGES)
def test_generator_gives_the_published_stages(name):
    assert (CONFIGS[name].depths, CONFIGS[name].widths) == STAGES[name]


def test_groups_are_cut_down_to_narrow_stages():
    assert CONFIGS["regnetx_080"].group_widths == (80, 120, 120, 120)
    assert CONFIGS["regnetz_005"].inner_widths == (64, 160, 416, 1024)


def test_state_dict_has_the_released_names():
    with torch.device("meta"):
        state = MODELS["regnety_004"]().state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    released = {
        "stem.conv.weight": (32, 3, 3, 3),
        "stem.bn.running_mean": (32,),
        "s1.b1.proj.weight": (48, 32, 1, 1),
        "s1.b1.bn.weight": (48,),
        "s2.b3.f.a.weight": (104, 104, 1, 1),
        "s2.b3.f.a_bn.weight": (104,),
        "s2.b3.f.b.weight": (104, 8, 3, 3),
        "s2.b3.f.se.f_ex.0.weight": (26, 104, 1, 1),
        "s2.b3.f.se.f_ex.2.bias": (104,),
        "s2.b3.f.c_bn.bias": (104,),
        "head.fc.weight": (1000, 440),
    }
    assert released.items() <= shapes.items()
    assert "s2.b3.proj.weight" not in shapes
    with torch.device("meta"):
        assert "head.conv.weight" in MODELS["regnetz_005"]().state_dict()


def small(**changes) -> RegNetConfig:
    return RegNetConfig(
        (1, 2), (16, 24), (4, 4), (1.0, 1.0), (2, 2), stem_width=8, se_ratio=0.25, **changes
    )


def test_blocks_are_their_equations():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 6, 6)
    same = Block(16, 16, 16, 4, 1, small()).eval()
    torch.testing.assert_close(same(x), F.relu(x + same.f(x)))
    halved = Block(16, 24, 24, 4, 2, small()).eval()
    torch.testing.assert_close(halved(x), F.relu(halved.bn(halved.proj(x)) + halved.f(x)))
    linear = small(linear=True, activation="silu")
    same = Block(16, 16, 16, 4, 1, linear).eval()
    torch.testing.assert_close(same(x), x + same.f(x))
    halved = Block(16, 24, 24, 4, 2, linear).eval()
    assert halved.proj is None
    torch.testing.assert_close(halved(x), halved.f(x))


def test_squeeze_excite_is_its_equation():
    torch.manual_seed(0)
    se = Block(16, 16, 16, 4, 1, small()).f.se
    x = torch.randn(2, 16, 5, 7)
    first, _, second, _ = se.f_ex
    hidden = F.relu(x.mean((2, 3)) @ first.weight[:, :, 0, 0].T + first.bias)
    gates = torch.sigmoid(hidden @ second.weight[:, :, 0, 0].T + second.bias)
    torch.testing.assert_close(se(x), x * gates[:, :, None, None])


def test_any_image_size_runs():
    model = RegNet(small(head_width=40), num_classes=3).eval()
    assert model(torch.zeros(1, 3, 33, 50)).shape == (1, 3)
    assert model.forward_features(torch.zeros(1, 3, 33, 50)).shape == (1, 24, 5, 7)


def test_timm_names_are_read():
    model = RegNet(small(head_width=40), num_classes=3)
    back = {".f.a.": ".conv1.conv.", ".f.a_bn.": ".conv1.bn.", ".f.b.": ".conv2.conv."}
    back |= {".f.b_bn.": ".conv2.bn.", ".f.c.": ".conv3.conv.", ".f.c_bn.": ".conv3.bn."}
    back |= {".f.se.f_ex.0.": ".se.fc1.", ".f.se.f_ex.2.": ".se.fc2."}
    back |= {".proj.": ".downsample.conv.", "b1.bn.": "b1.downsample.bn."}
    back |= {"head.conv.": "final_conv.conv.", "head.bn.": "final_conv.bn."}
    stored = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in back.items():
            name = name.replace(ours, theirs)
        stored[name] = tensor
    assert "s1.b1.downsample.bn.weight" in stored
    translated, left_out = model.translate_weights(stored)
    assert list(translated) == list(model.state_dict())
    assert left_out == []


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="w0 > 0 divisible by 8"):
        regnet_config(10, 20, 10.0, 2.0, 8)
    with pytest.raises(ValueError, match="one entry in each tuple"):
        RegNetConfig((1, 2), (16,), (4, 4))
    with pytest.raises(ValueError, match="activation must be one of"):
        small(activation="tanh")
    with pytest.raises(ValueError, match="pooled stem belongs to a ResNet"):
        RegNet(small(pooled_stem=True))


def test_first_values_follow_the_fan_out():
    torch.manual_seed(0)
    model = MODELS["regnety_004"]()
    weight = model.s4.b2.f.a.weight
    assert weight.std().item() == pytest.approx((2 / 440) ** 0.5, rel=0.02)
    assert model.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert isinstance(model.s1.b1.af, nn.ReLU)
