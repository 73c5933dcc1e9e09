"""ResNet-50 and ResNeXt-50 (CVPR 2016, arXiv 1512.03385; CVPR 2017, arXiv 1611.05431), with
the stride in the 3x3 convolution as all current releases have it.

Described by the same stages as a RegNet. State-dict names are torchvision's and timm's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from .regnet import RegNetConfig


class Bottleneck(nn.Module):
    """1x1, grouped 3x3, 1x1, each with batch norm; projected shortcut at a new shape."""

    def __init__(self, inputs: int, width: int, inner: int, group: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner // group, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = None
        if inputs != width or stride != 1:
            shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Images [batch, 3, h, w] -> logits [batch, num_classes], for any h and w.

    ``num_classes=0`` returns the pooled features.
    """

    num_prefix_tokens = 0

    def __init__(self, config: RegNetConfig, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        _check(config)
        self.config, self.image_size = config, config.image_size
        self.conv1 = nn.Conv2d(in_channels, config.stem_width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(config.stem_width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        width = config.stem_width
        for index, stage in enumerate(config.widths):
            self.add_module(f"layer{index + 1}", _stage(config, index, width))
            width = stage
        self.fc = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map [batch, width, h, w]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for index in range(len(self.config.depths)):
            x = self.get_submodule(f"layer{index + 1}")(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x).mean((2, 3)))


def _check(config: RegNetConfig) -> None:
    if not config.pooled_stem:
        raise ValueError("a ResNet has a pooled stem; without it build a RegNet")
    if config.se_ratio or config.head_width or config.linear or config.activation != "relu":
        raise ValueError(f"a ResNet has plain ReLU bottlenecks and no head width, got {config}")


def _stage(config: RegNetConfig, index: int, inputs: int) -> nn.Sequential:
    width, inner = config.widths[index], config.inner_widths[index]
    group, stride = config.group_widths[index], config.strides[index]
    blocks = []
    for _ in range(config.depths[index]):
        blocks.append(Bottleneck(inputs, width, inner, group, stride))
        inputs, stride = width, 1
    return nn.Sequential(*blocks)


def _fifty(bottleneck: float, group_widths: tuple[int, ...]) -> RegNetConfig:
    return RegNetConfig(
        depths=(3, 4, 6, 3),
        widths=(256, 512, 1024, 2048),
        group_widths=group_widths,
        bottlenecks=(bottleneck,) * 4,
        strides=(1, 2, 2, 2),
        stem_width=64,
        pooled_stem=True,
    )


CONFIGS: dict[str, RegNetConfig] = {
    "resnet50": _fifty(0.25, (64, 128, 256, 512)),
    "resnext50_32x4d": _fifty(0.5, (4, 8, 16, 32)),
}

MODELS: dict[str, Callable[..., nn.Module]] = {
    name: partial(ResNet, config=config) for name, config in CONFIGS.items()
}
