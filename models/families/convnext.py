"""ConvNeXt (CVPR 2022, arXiv 2201.03545): blocks of one 7x7 depthwise convolution and an MLP.

Four stages at 1/4, 1/8, 1/16 and 1/32 of the image; inside a block channel-last. State-dict
names are those of the released weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..weights.timm_names import renamed
from .conv_layers import drop_path


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [batch, channels, height, width]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """x + gamma * mlp(norm(dwconv(x))); ``dwconv`` keeps the shape of its map."""

    def __init__(self, dim: int, layer_scale: float, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale))
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        return x + drop_path(y.permute(0, 3, 1, 2), self.drop, self.training)


class ConvNeXt(nn.Module):
    """Images [batch, 3, h, w] -> logits [batch, num_classes], for any h and w from 32.

    ``drop_path`` rises linearly over the blocks. ``num_classes=0`` returns the pooled and
    normalised features.
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
        image_size: int = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 4, stride=4), ChannelNorm(widths[0], eps=1e-6)
        )
        self.downsample_layers = nn.ModuleList([stem])
        for before, dim in pairwise(widths):
            halve = nn.Conv2d(before, dim, 2, stride=2)
            self.downsample_layers.append(nn.Sequential(ChannelNorm(before, eps=1e-6), halve))
        drops = torch.linspace(0, drop_path, sum(depths), device="cpu").split(list(depths))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, layer_scale, drop) for drop in rates.tolist()))
            for dim, rates in zip(widths, drops, strict=True)
        )
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map [batch, width, h, w]."""
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.forward_features(x).mean((2, 3))))

    def translate_weights(
        self, stored: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Also timm's names, for `load_weights`."""
        return renamed(stored, TIMM_NAMES)


TIMM_NAMES = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^(stages\.\d+)\.blocks\.", r"\1."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
)


def _variant(
    widths: Sequence[int], depths: Sequence[int], drop_path: float
) -> Callable[..., ConvNeXt]:
    return partial(ConvNeXt, widths=widths, depths=depths, drop_path=drop_path)


MODELS: dict[str, Callable[..., nn.Module]] = {
    # widths, depths, drop path (paper section 3 and appendix A.1)
    "convnext_tiny": _variant((96, 192, 384, 768), (3, 3, 9, 3), 0.1),
    "convnext_small": _variant((96, 192, 384, 768), (3, 3, 27, 3), 0.4),
    "convnext_base": _variant((128, 256, 512, 1024), (3, 3, 27, 3), 0.5),
    "convnext_large": _variant((192, 384, 768, 1536), (3, 3, 27, 3), 0.5),
}
