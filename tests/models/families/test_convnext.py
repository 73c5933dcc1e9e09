"""ConvNeXt: parameter counts, released names, and its block as the equation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sievit.models.families.convnext import MODELS, Block, ConvNeXt

PARAMS = {  # as timm counts them
    "convnext_tiny": 28589128,
    "convnext_small": 50223688,
    "convnext_base": 88591464,
    "convnext_large": 197767336,
}


@pytest.mark.parametrize("name", PARAMS)
def test_parameters(name):
    with torch.device("meta"):
        model = MODELS[name]()
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]


def test_state_dict_has_the_released_names():
    with torch.device("meta"):
        state = MODELS["convnext_tiny"]().state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    released = {
        "downsample_layers.0.0.weight": (96, 3, 4, 4),
        "downsample_layers.0.1.weight": (96,),
        "downsample_layers.3.0.bias": (384,),
        "downsample_layers.3.1.weight": (768, 384, 2, 2),
        "stages.2.8.gamma": (384,),
        "stages.2.8.dwconv.weight": (384, 1, 7, 7),
        "stages.2.8.norm.bias": (384,),
        "stages.2.8.pwconv1.weight": (1536, 384),
        "stages.2.8.pwconv2.weight": (384, 1536),
        "norm.weight": (768,),
        "head.weight": (1000, 768),
    }
    assert released.items() <= shapes.items()


def test_block_is_its_equation():
    torch.manual_seed(0)
    block = Block(6, layer_scale=0.4, drop=0.0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 6, 9, 8)
    y = F.conv2d(x, block.dwconv.weight, block.dwconv.bias, padding=3, groups=6)
    y = y - y.mean(1, keepdim=True)
    y = y / (y.square().mean(1, keepdim=True) + 1e-6).sqrt()
    y = y * block.norm.weight[:, None, None] + block.norm.bias[:, None, None]
    y = torch.einsum("oc,bchw->bohw", block.pwconv1.weight, y) + block.pwconv1.bias[:, None, None]
    y = torch.einsum("oc,bchw->bohw", block.pwconv2.weight, F.gelu(y))
    y = y + block.pwconv2.bias[:, None, None]
    torch.testing.assert_close(block(x), x + block.gamma[:, None, None] * y)


def test_maps_shrink_by_four_and_then_by_two():
    model = ConvNeXt((8, 16, 24, 32), (1, 1, 2, 1), num_classes=5)
    assert model.forward_features(torch.zeros(1, 3, 64, 96)).shape == (1, 32, 2, 3)
    assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 5)
    assert ConvNeXt((8, 16), (1, 1), num_classes=0)(torch.zeros(1, 3, 32, 32)).shape == (1, 16)
