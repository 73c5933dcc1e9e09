"""EfficientNet B0-B5 (ICML 2019, arXiv 1905.11946): inverted bottlenecks with depthwise
convolution and squeeze-excite.

A network is described by its stages (`EfficientNetConfig`), which is what scaling works on.
State-dict names are those of the weights released by the authors of the scaling paper
(arXiv 2103.06877).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ..weights.timm_names import by_position
from .conv_layers import StagedNet, drop_path, stage_of
from .regnet import SqueezeExcite, init_weights


@dataclass(frozen=True)
class EfficientNetConfig:
    """One entry a stage in every tuple; ``image_size`` in pixels.

    ``expansions`` is the inner width over a block's *input* width.
    """

    depths: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    widths: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    expansions: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    kernels: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    stem_width: int = 32
    head_width: int = 1280
    se_ratio: float = 0.25
    image_size: int = 224

    def __post_init__(self) -> None:
        stages = (self.widths, self.expansions, self.kernels, self.strides)
        if any(len(entries) != len(self.depths) for entries in stages):
            raise ValueError(f"every stage needs one entry in each tuple, got {self}")


def compound_config(width: float, depth: float, image_size: int) -> EfficientNetConfig:
    """B0 with widths times ``width`` and depths times ``depth`` (paper section 3.3).

    Widths are rounded to the nearest multiple of 8, one up where that would lose more than
    10 %; depths are rounded up. Stem and head are widened too.
    """
    base = EfficientNetConfig()
    return replace(
        base,
        depths=tuple(math.ceil(depth * d) for d in base.depths),
        widths=tuple(_near_eight(width * w) for w in base.widths),
        stem_width=_near_eight(width * base.stem_width),
        head_width=_near_eight(width * base.head_width),
        image_size=image_size,
    )


def _near_eight(width: float) -> int:
    nearest = max(8, int(width + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * width else nearest


class MBConv(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze-excite, 1x1 projection without
    activation; a shortcut where the shape stays."""

    def __init__(
        self, inputs: int, width: int, expansion: int, kernel: int, stride: int, se_ratio: float
    ) -> None:
        super().__init__()
        inner = inputs * expansion
        self.exp = self.exp_bn = None
        if expansion != 1:
            self.exp = nn.Conv2d(inputs, inner, 1, bias=False)
            self.exp_bn = nn.BatchNorm2d(inner)
        self.dwise = nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False)
        self.dwise_bn = nn.BatchNorm2d(inner)
        self.se = SqueezeExcite(inner, int(inputs * se_ratio), nn.SiLU)
        self.lin_proj = nn.Conv2d(inner, width, 1, bias=False)
        self.lin_proj_bn = nn.BatchNorm2d(width)
        self.skip = stride == 1 and inputs == width
        self.drop = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.exp is not None and self.exp_bn is not None:
            y = F.silu(self.exp_bn(self.exp(x)))
        y = self.se(F.silu(self.dwise_bn(self.dwise(y))))
        y = self.lin_proj_bn(self.lin_proj(y))
        return x + drop_path(y, self.drop, self.training) if self.skip else y


class Stem(nn.Module):
    """3x3 convolution of stride 2, batch norm, SiLU."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class Head(nn.Module):
    """1x1 convolution, batch norm, SiLU, average pool, dropout, classifier."""

    def __init__(self, inputs: int, width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, 1, bias=False)
        self.conv_bn = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv_bn(self.conv(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


class EfficientNet(StagedNet):
    """Images [batch, 3, h, w] -> logits [batch, num_classes], for any h and w.

    ``dropout`` is that of the classifier, ``drop_path`` the stochastic depth of the last
    block, rising linearly from the first. ``num_classes=0`` returns the pooled features.
    """

    def __init__(
        self,
        config: EfficientNetConfig,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.config, self.image_size = config, config.image_size
        self.stem = Stem(in_channels, config.stem_width)
        width = config.stem_width
        for index, stage in enumerate(config.widths):
            self.add_module(f"s{index + 1}", _stage(config, index, width))
            width = stage
        self.head = Head(width, config.head_width, num_classes, dropout)
        blocks = [module for module in self.modules() if isinstance(module, MBConv)]
        for index, block in enumerate(blocks):
            block.drop = drop_path * index / len(blocks)
        self.apply(init_weights)

    def translate_weights(
        self, stored: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Also timm's names, for `load_weights`."""
        return by_position(self, stored)


def _stage(config: EfficientNetConfig, index: int, inputs: int) -> nn.Sequential:
    width, stride = config.widths[index], config.strides[index]
    expansion, kernel = config.expansions[index], config.kernels[index]
    blocks = []
    for _ in range(config.depths[index]):
        blocks.append(MBConv(inputs, width, expansion, kernel, stride, config.se_ratio))
        inputs, stride = width, 1
    return stage_of(blocks)


CONFIGS: dict[str, EfficientNetConfig] = {  # width, depth, image size (the authors' release)
    "efficientnet_b0": compound_config(1.0, 1.0, 224),
    "efficientnet_b1": compound_config(1.0, 1.1, 240),
    "efficientnet_b2": compound_config(1.1, 1.2, 260),
    "efficientnet_b3": compound_config(1.2, 1.4, 300),
    "efficientnet_b4": compound_config(1.4, 1.8, 380),
    "efficientnet_b5": compound_config(1.6, 2.2, 456),
}

MODELS: dict[str, Callable[..., nn.Module]] = {
    name: partial(EfficientNet, config=config) for name, config in CONFIGS.items()
}
