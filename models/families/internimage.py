"""InternImage with DCNv3 (CVPR 2023, arXiv 2211.05778, section 3.2) and FlashInternImage
with DCNv4 (CVPR 2024, arXiv 2401.06197, section 4).

Four stages of deformable blocks at 1/4, 1/8, 1/16 and 1/32 of the image, channel-last
[batch, height, width, channels]. State-dict names are those of the released weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv_layers import drop_path
from .dcn import Core, DCNv3, DCNv4, Permute, deform_core, to_channels_last

OPERATORS = ("dcnv3", "dcnv4")
NORMS = ("pre", "post", "res_post")


@dataclass(frozen=True)
class BlockStyle:
    """What all blocks of one network share."""

    operator: str = "dcnv3"
    norm: str = "pre"
    """``pre``: x + f(LN x); ``post``: x + LN(f(x)); ``res_post``: x + LN'(f(LN x))."""
    layer_scale: float | None = None
    """First value of a learned factor on each branch; None for no such factor."""
    offset_scale: float = 1.0
    dw_kernel: int | None = None
    """Depthwise convolution before offsets: None is 3 x 3 in DCNv3 and none in DCNv4."""
    center_scale: bool = False
    bias: bool = True
    """Bias of the operator's output projection and of the MLP's second layer (DCNv4)."""

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise ValueError(f"operator must be one of {OPERATORS}, got {self.operator!r}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {self.norm!r}")
        if self.norm == "res_post" and self.layer_scale is not None:
            raise ValueError("res_post blocks have no layer scale")
        if self.operator == "dcnv3" and not self.bias:
            raise ValueError("bias=False is for dcnv4: DCNv3 always has an output bias")


def layer_norm(channels: int) -> nn.Sequential:
    """Layer norm over the last axis, alone in a `Sequential` as in the released weights."""
    return nn.Sequential(nn.LayerNorm(channels, eps=1e-6))


class Stem(nn.Module):
    """Image [batch, 3, h, w] -> [batch, h / 4, w / 4, channels]."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(in_channels, half, 3, stride=2, padding=1)
        self.norm1 = nn.Sequential(
            to_channels_last(), nn.LayerNorm(half, eps=1e-6), Permute(0, 3, 1, 2)
        )
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(half, channels, 3, stride=2, padding=1)
        self.norm2 = nn.Sequential(to_channels_last(), nn.LayerNorm(channels, eps=1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class Downsample(nn.Module):
    """Halve the map, double the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = nn.Sequential(to_channels_last(), nn.LayerNorm(2 * channels, eps=1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class MLP(nn.Module):
    """Linear C -> 4C, exact GELU, linear 4C -> C."""

    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * channels, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A deformable branch and an MLP branch, each with its residual, in the style's form."""

    gamma1: nn.Parameter | None
    gamma2: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        groups: int,
        style: BlockStyle,
        drop: float = 0.0,
        core: Core = deform_core,
    ) -> None:
        super().__init__()
        self.norm, self.drop = style.norm, drop
        self.norm1 = layer_norm(channels)
        self.dcn = _operator(channels, groups, style, core)
        self.norm2 = layer_norm(channels)
        self.mlp = MLP(channels, style.bias)
        for name in ("gamma1", "gamma2"):
            scale = style.layer_scale
            factor = None if scale is None else nn.Parameter(torch.full((channels,), scale))
            self.register_parameter(name, factor)
        if style.norm == "res_post":
            self.res_post_norm1 = layer_norm(channels)
            self.res_post_norm2 = layer_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        outer1 = outer2 = None
        if self.norm == "res_post":
            outer1, outer2 = self.res_post_norm1, self.res_post_norm2
        x = x + self._branch(x, self.dcn, self.norm1, outer1, self.gamma1)
        return x + self._branch(x, self.mlp, self.norm2, outer2, self.gamma2)

    def _branch(
        self,
        x: Tensor,
        layer: nn.Module,
        norm: nn.Module,
        outer: nn.Module | None,
        gamma: Tensor | None,
    ) -> Tensor:
        y = norm(layer(x)) if self.norm == "post" else layer(norm(x))
        y = y if outer is None else outer(y)
        y = y if gamma is None else gamma * y
        return drop_path(y, self.drop, self.training)


def _operator(channels: int, groups: int, style: BlockStyle, core: Core) -> DCNv3 | DCNv4:
    common = {
        "offset_scale": style.offset_scale,
        "dw_kernel": style.dw_kernel,
        "center_feature_scale": style.center_scale,
        "core": core,
    }
    if style.operator == "dcnv3":
        return DCNv3(channels, groups, **common)
    return DCNv4(channels, groups, output_bias=style.bias, **common)


class Stage(nn.Module):
    """Blocks of one width. Returns the stage's map; ``downsample`` leads to the next.

    An extra norm follows each block listed in ``normed_blocks``, and the last block unless
    the blocks are post-norm without centre scale.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        style: BlockStyle,
        drops: Sequence[float],
        last: bool,
        normed_blocks: Sequence[int] = (),
        core: Core = deform_core,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, groups, style, d, core) for d in drops)
        ends_normed = style.norm != "post" or style.center_scale
        self.norm = layer_norm(channels) if ends_normed else nn.Identity()
        self.post_norms = nn.ModuleList(layer_norm(channels) for _ in normed_blocks)
        self.normed_blocks = tuple(normed_blocks)
        self.downsample = nn.Identity() if last else Downsample(channels)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.normed_blocks:
                x = self.post_norms[self.normed_blocks.index(index)](x)
        return self.norm(x)


class PoolAttention(nn.Module):
    """Attention of the mean token over all tokens: [batch, tokens, dim] -> [batch, out]."""

    def __init__(self, dim: int, heads: int, out_dim: int) -> None:
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (layer_norm(dim) for _ in range(3))
        self.cross_dcn = CrossAttention(dim, heads, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        query = self.norm1_q(x.mean(1, keepdim=True))
        return self.cross_dcn(query, self.norm1_k(x), self.norm1_v(x)).squeeze(1)


class CrossAttention(nn.Module):
    """Multi-head attention with separate q, k, v whose biases are parameters of their own."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    q_bias: nn.Parameter
    k_bias: nn.Parameter
    v_bias: nn.Parameter

    def __init__(self, dim: int, heads: int, out_dim: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q", "k", "v"):
            self.add_module(name, nn.Linear(dim, dim, bias=False))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(dim)))
        self.proj = nn.Linear(dim, out_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q = self._heads(F.linear(query, self.q.weight, self.q_bias))
        k = self._heads(F.linear(key, self.k.weight, self.k_bias))
        v = self._heads(F.linear(value, self.v.weight, self.v_bias))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class InternImage(nn.Module):
    """Images [batch, 3, h, w] -> logits [batch, num_classes], for any h and w from 32.

    Stage i has channels * 2**i channels in groups of ``group_channels``. ``clip_head``
    replaces convolution and average pool at the end by attention pooling over the last
    two stages (the H and G models) and needs sides that are multiples of 32. ``core`` is
    the sampling operator of all blocks, see `sievit.models.families.dcn.deform_core`.
    ``num_classes=0`` returns the pooled features.
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        channels: int,
        depths: Sequence[int],
        style: BlockStyle,
        group_channels: int = 16,
        normed_blocks: Sequence[int] = (),
        clip_head: bool = False,
        drop_path: float = 0.0,
        image_size: int = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
        core: Core = deform_core,
    ) -> None:
        super().__init__()
        _check(channels, group_channels, depths, normed_blocks)
        self.image_size = image_size
        self.patch_embed = Stem(in_channels, channels)
        drops = torch.linspace(0, drop_path, sum(depths), device="cpu").split(list(depths))
        self.levels = nn.ModuleList(
            Stage(
                channels * 2**level,
                channels * 2**level // group_channels,
                style,
                rates.tolist(),
                last=level == 3,
                normed_blocks=normed_blocks if level == 2 else (),
                core=core,
            )
            for level, rates in enumerate(drops)
        )
        width = channels * 2**3
        self.clip_head = clip_head
        features = self._add_clip_head(width) if clip_head else self._add_conv_head(width)
        self.head = nn.Linear(features, num_classes) if num_classes else nn.Identity()
        self._reset()

    def _add_conv_head(self, width: int) -> int:
        features = int(1.5 * width)
        conv = nn.Conv2d(width, features, 1, bias=False)
        norm = nn.Sequential(nn.BatchNorm2d(features))
        self.conv_head = nn.Sequential(conv, norm, nn.GELU())
        return features

    def _add_clip_head(self, width: int, dim: int = 1024, features: int = 768) -> int:
        self.dcnv3_head_x4 = nn.Sequential(nn.Conv2d(width, 4 * dim, 1), nn.PixelShuffle(2))
        self.dcnv3_head_x3 = nn.Conv2d(width // 2, dim, 1)
        self.clip_projector = PoolAttention(dim, heads=16, out_dim=features)
        self.fc_norm = layer_norm(features)
        return features

    def _reset(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, DCNv3 | DCNv4):
                module.reset_parameters()

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The map of every stage, channel-last, before its downsampling."""
        x = self.patch_embed(x)
        maps = []
        for level in self.levels:
            maps.append(level(x))
            x = level.get_submodule("downsample")(maps[-1])
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map [batch, channels, h, w]."""
        return self.forward_stages(x)[-1].permute(0, 3, 1, 2)

    def translate_weights(
        self, stored: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Also the names in the Hugging Face release, all below ``model``."""
        return {name.removeprefix("model."): tensor for name, tensor in stored.items()}, []

    def forward(self, x: Tensor) -> Tensor:
        if not self.clip_head:
            return self.head(self.conv_head(self.forward_features(x)).mean((2, 3)))
        third, fourth = (m.permute(0, 3, 1, 2) for m in self.forward_stages(x)[-2:])
        fourth, third = self.dcnv3_head_x4(fourth), self.dcnv3_head_x3(third)
        if fourth.shape != third.shape:
            raise ValueError(f"image sides must be multiples of 32, got {tuple(x.shape[2:])}")
        joined = fourth + third
        return self.head(self.fc_norm(self.clip_projector(joined.flatten(2).transpose(1, 2))))


def _check(
    channels: int, group_channels: int, depths: Sequence[int], normed_blocks: Sequence[int]
) -> None:
    if channels % group_channels:
        raise ValueError(
            f"channels {channels} are not divisible by group_channels {group_channels}"
        )
    if len(depths) != 4:
        raise ValueError(f"an InternImage has four stages, got depths {tuple(depths)}")
    if max(normed_blocks, default=0) >= depths[2]:
        raise ValueError(
            f"normed_blocks {tuple(normed_blocks)} go beyond the {depths[2]} blocks of stage 3"
        )


_POST = BlockStyle(norm="post", layer_scale=1e-5)
_HUGE = BlockStyle(norm="res_post", dw_kernel=5, center_scale=True)
_GIANT = BlockStyle(norm="post", dw_kernel=5, center_scale=True)
_FLASH = BlockStyle("dcnv4", bias=False)
_FLASH_POST = BlockStyle("dcnv4", norm="post", layer_scale=1e-5, dw_kernel=3, bias=False)
_SMALL, _LARGE, _XLARGE = (4, 4, 21, 4), (5, 5, 22, 5), (5, 5, 24, 5)


def _variant(
    channels: int, depths: Sequence[int], style: BlockStyle, drop_path: float, image_size: int = 224
) -> Callable[..., InternImage]:
    return partial(
        InternImage,
        channels=channels,
        depths=depths,
        style=style,
        drop_path=drop_path,
        image_size=image_size,
    )


def _clip_variant(
    channels: int, depths: Sequence[int], style: BlockStyle, drop_path: float
) -> Callable[..., InternImage]:
    variant = _variant(channels, depths, style, drop_path)
    normed = tuple(range(5, depths[2], 6))
    return partial(variant, group_channels=32, normed_blocks=normed, clip_head=True)


MODELS: dict[str, Callable[..., nn.Module]] = {
    # channels, depths, form of the blocks, drop path (paper table 1 and the released configs)
    "internimage_t": _variant(64, (4, 4, 18, 4), BlockStyle(), 0.1),
    "internimage_s": _variant(80, _SMALL, _POST, 0.4),
    "internimage_b": _variant(112, _SMALL, _POST, 0.5),
    "internimage_l": _variant(160, _LARGE, replace(_POST, offset_scale=2.0), 0.1, 384),
    "internimage_xl": _variant(192, _XLARGE, replace(_POST, offset_scale=2.0), 0.2, 384),
    "internimage_h": _clip_variant(320, (6, 6, 32, 6), _HUGE, 0.2),
    "internimage_g": _clip_variant(512, (2, 2, 48, 4), _GIANT, 0.4),
    "flash_internimage_t": _variant(64, (4, 4, 18, 4), _FLASH, 0.1),
    "flash_internimage_s": _variant(80, _SMALL, _FLASH_POST, 0.4),
    "flash_internimage_b": _variant(112, _SMALL, replace(_FLASH_POST, offset_scale=0.5), 0.5),
    "flash_internimage_l": _variant(
        160, _LARGE, replace(_FLASH_POST, offset_scale=2.0, bias=True), 0.1, 384
    ),
}
