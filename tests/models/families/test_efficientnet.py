"""EfficientNet: the compound rule, parameter counts, its block, released names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sievit.models.families.efficientnet import (
    CONFIGS,
    MODELS,
    EfficientNet,
    EfficientNetConfig,
    MBConv,
)

PARAMS = {  # B0 as published by the scaling paper's authors, the others as timm counts them
    "efficientnet_b0": 5288548,
    "efficientnet_b1": 7794184,
    "efficientnet_b2": 9109994,
    "efficientnet_b3": 12233232,
    "efficientnet_b4": 19341616,
    "efficientnet_b5": 30389784,
}


@pytest.mark.parametrize("name", PARAMS)
def test_parameters(name):
    with torch.device("meta"):
        model = MODELS[name]()
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]


def test_compound_rule():
    config = CONFIGS["efficientnet_b4"]
    assert config.depths == (2, 4, 4, 6, 6, 8, 2)
    assert config.widths == (24, 32, 56, 112, 160, 272, 448)
    assert (config.stem_width, config.head_width, config.image_size) == (48, 1792, 380)
    assert CONFIGS["efficientnet_b0"] == EfficientNetConfig()


def test_state_dict_has_the_released_names():
    with torch.device("meta"):
        state = MODELS["efficientnet_b0"]().state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    released = {
        "stem.conv.weight": (32, 3, 3, 3),
        "stem.bn.weight": (32,),
        "s1.b1.dwise.weight": (32, 1, 3, 3),
        "s1.b1.se.f_ex.0.weight": (8, 32, 1, 1),
        "s2.b1.exp.weight": (96, 16, 1, 1),
        "s2.b1.exp_bn.bias": (96,),
        "s3.b1.dwise.weight": (144, 1, 5, 5),
        "s3.b1.se.f_ex.2.weight": (144, 6, 1, 1),
        "s7.b1.lin_proj.weight": (320, 1152, 1, 1),
        "s7.b1.lin_proj_bn.running_var": (320,),
        "head.conv.weight": (1280, 320, 1, 1),
        "head.conv_bn.weight": (1280,),
        "head.fc.bias": (1000,),
    }
    assert released.items() <= shapes.items()
    assert "s1.b1.exp.weight" not in shapes


def test_block_is_its_equation():
    torch.manual_seed(0)
    block = MBConv(8, 8, 6, 5, 1, 0.25).eval()
    x = torch.randn(2, 8, 6, 7)
    y = F.silu(block.exp_bn(block.exp(x)))
    y = F.silu(block.dwise_bn(F.conv2d(y, block.dwise.weight, padding=2, groups=48)))
    gate = block.se.f_ex(y.mean((2, 3), keepdim=True))
    torch.testing.assert_close(block(x), x + block.lin_proj_bn(block.lin_proj(y * gate)))
    halved = MBConv(8, 8, 1, 3, 2, 0.25).eval()
    assert halved.exp is None
    assert halved(x).shape == (2, 8, 3, 4)


def test_drop_path_rises_over_the_blocks_and_rests_in_evaluation():
    config = EfficientNetConfig((1, 2), (8, 16), (1, 4), (3, 3), (1, 2), 8, 32)
    model = EfficientNet(config, num_classes=3, drop_path=0.6)
    blocks = [module for module in model.modules() if isinstance(module, MBConv)]
    assert [block.drop for block in blocks] == pytest.approx([0, 0.2, 0.4])
    x = torch.randn(2, 3, 40, 31)
    assert torch.equal(model.eval()(x), model(x))
    assert model.forward_features(x).shape == (2, 16, 10, 8)


def test_descriptions_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="one entry in each tuple"):
        EfficientNetConfig(depths=(1, 2))
