"""ResNet-50 and ResNeXt-50: parameter counts, released names, shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sievit.models.families.regnet import CONFIGS as REGNETS
from sievit.models.families.resnet import CONFIGS, MODELS, Bottleneck, ResNet


@pytest.mark.parametrize(
    ("name", "params"), [("resnet50", 25557032), ("resnext50_32x4d", 25028904)]
)
def test_parameters(name, params):
    with torch.device("meta"):
        model = MODELS[name]()
    assert sum(p.numel() for p in model.parameters()) == params


def test_state_dict_has_the_released_names():
    with torch.device("meta"):
        state = MODELS["resnet50"]().state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    released = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_mean": (64,),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer1.0.downsample.1.bias": (256,),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
        "layer4.2.bn3.weight": (2048,),
        "fc.weight": (1000, 2048),
    }
    assert released.items() <= shapes.items()
    assert len(shapes) == 320


def test_block_is_its_equation():
    torch.manual_seed(0)
    block = Bottleneck(16, 32, 8, 4, 2).eval()
    x = torch.randn(2, 16, 7, 9)
    y = F.relu(block.bn1(F.conv2d(x, block.conv1.weight)))
    y = F.relu(block.bn2(F.conv2d(y, block.conv2.weight, stride=2, padding=1, groups=2)))
    y = block.bn3(F.conv2d(y, block.conv3.weight))
    shortcut, norm = block.downsample
    expected = F.relu(y + norm(F.conv2d(x, shortcut.weight, stride=2)))
    torch.testing.assert_close(block(x), expected)


def test_maps_shrink_by_thirty_two():
    config = replace(
        CONFIGS["resnet50"], depths=(1, 1, 1, 1), widths=(32, 64, 64, 128),
        group_widths=(8, 16, 16, 32), stem_width=16,
    )  # fmt: skip
    model = ResNet(config, num_classes=3).eval()
    assert model.forward_features(torch.zeros(1, 3, 64, 96)).shape == (1, 128, 2, 3)
    assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 3)


def test_descriptions_that_are_no_resnet_are_named():
    with pytest.raises(ValueError, match="has a pooled stem"):
        ResNet(REGNETS["regnetx_002"])
    with pytest.raises(ValueError, match="plain ReLU bottlenecks"):
        ResNet(replace(CONFIGS["resnet50"], se_ratio=0.25))
