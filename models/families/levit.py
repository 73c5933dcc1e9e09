"""LeViT (ICCV 2021, arXiv 2104.01136): attention with learned biases between stages of
shrinking maps, each shrunk by an attention whose queries are every second token.

State-dict names are those of the released weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv_layers import DistilledNet, LinearBN, Residual, grid, offset_index, sixteenth_stem

STRIDE = 16  # of the stem


class Attention(nn.Module):
    """Self-attention on [batch, resolution**2, dim]; values twice as wide as keys.

    A learned bias, shared by all pairs at the same |dy|, |dx|, is added to the scores.
    """

    attention_bias_idxs: Tensor

    def __init__(self, dim: int, heads: int, key_dim: int, resolution: int) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim = heads, key_dim, 2 * key_dim
        points = grid(resolution)
        self.attention_biases = nn.Parameter(torch.zeros(heads, resolution**2))
        self.register_buffer("attention_bias_idxs", offset_index(points, points, resolution))
        self.qkv = LinearBN(dim, heads * (2 * key_dim + self.value_dim))
        out = LinearBN(heads * self.value_dim, dim, bn_weight=0.0)
        self.proj = nn.Sequential(nn.Hardswish(), out)

    def forward(self, x: Tensor) -> Tensor:
        qkv = _split_heads(self.qkv(x), self.heads)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        bias = self.attention_biases[:, self.attention_bias_idxs]  # (heads, tokens, tokens)
        return self.proj(_join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


class Subsample(nn.Module):
    """Every second token of every second row of a square map, [batch, tokens, dim]."""

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.resolution = resolution

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.resolution, -1))[:, ::2, ::2].flatten(1, 2)


class AttentionSubsample(nn.Module):
    """Attention of every second token (queries) over all (keys): the map is halved.

    [batch, resolution**2, inputs] -> [batch, ceil(resolution / 2)**2, outputs]; values are
    four times as wide as keys.
    """

    attention_bias_idxs: Tensor

    def __init__(
        self, inputs: int, outputs: int, heads: int, key_dim: int, resolution: int
    ) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim = heads, key_dim, 4 * key_dim
        index = offset_index(grid(resolution, 2), grid(resolution), resolution)
        self.attention_biases = nn.Parameter(torch.zeros(heads, resolution**2))
        self.register_buffer("attention_bias_idxs", index)
        self.kv = LinearBN(inputs, heads * (key_dim + self.value_dim))
        self.q = nn.Sequential(Subsample(resolution), LinearBN(inputs, heads * key_dim))
        self.proj = nn.Sequential(nn.Hardswish(), LinearBN(heads * self.value_dim, outputs))

    def forward(self, x: Tensor) -> Tensor:
        kv = _split_heads(self.kv(x), self.heads)
        k, v = kv.split([self.key_dim, self.value_dim], dim=-1)
        q = _split_heads(self.q(x), self.heads)
        bias = self.attention_biases[:, self.attention_bias_idxs]  # (heads, queries, keys)
        return self.proj(_join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, tokens, heads * dim] -> [batch, heads, tokens, dim]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _join_heads(x: Tensor) -> Tensor:
    """[batch, heads, tokens, dim] -> [batch, tokens, heads * dim]."""
    return x.transpose(1, 2).flatten(2)


def _mlp(dim: int) -> nn.Sequential:
    return nn.Sequential(
        LinearBN(dim, 2 * dim), nn.Hardswish(), LinearBN(2 * dim, dim, bn_weight=0.0)
    )


class LeViT(DistilledNet):
    """Images [batch, 3, image_size, image_size] -> logits [batch, num_classes].

    With ``distillation`` (all released models) there are two classifiers: averaged in
    evaluation, both returned in training. ``num_classes=0`` returns the pooled features.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        key_dim: int,
        drop_path: float = 0.0,
        image_size: int = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
        distillation: bool = True,
    ) -> None:
        super().__init__()
        if not len(widths) == len(depths) == len(heads):
            raise ValueError(
                f"every stage needs a width, a depth and heads, got {widths}, {depths}, {heads}"
            )
        if image_size < STRIDE:
            raise ValueError(f"image_size must be at least {STRIDE}, got {image_size}")
        self.image_size = image_size
        self.patch_embed = sixteenth_stem(in_channels, widths[0], nn.Hardswish)
        self.resolution = resolution = image_size // STRIDE
        blocks: list[nn.Module] = []
        for stage, (dim, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage:
                before = widths[stage - 1]
                shrink = AttentionSubsample(before, dim, before // key_dim, key_dim, resolution)
                resolution = (resolution + 1) // 2
                blocks += [shrink, Residual(_mlp(dim), drop_path)]
            for _ in range(depth):
                attention = Attention(dim, heads[stage], key_dim, resolution)
                blocks += [Residual(attention, drop_path), Residual(_mlp(dim), drop_path)]
        self.blocks = nn.Sequential(*blocks)
        self.add_heads(widths[-1], num_classes, distillation)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last tokens [batch, tokens, width]."""
        x = self.patch_embed(x)
        if x.shape[2:] != (self.resolution, self.resolution):
            raise ValueError(
                f"this LeViT is built for a map of {self.resolution} x {self.resolution} tokens, "
                f"got {x.shape[2]} x {x.shape[3]}: build it with the image_size it is to see"
            )
        return self.blocks(x.flatten(2).transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.classify(self.forward_features(x).mean(1))


def _variant(
    widths: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    key_dim: int,
    drop_path: float = 0.0,
) -> Callable[..., LeViT]:
    return partial(
        LeViT, widths=widths, depths=depths, heads=heads, key_dim=key_dim, drop_path=drop_path
    )


MODELS: dict[str, Callable[..., nn.Module]] = {
    # widths, depths, heads by stage; key dimension; drop path (paper table 2)
    "levit_128s": _variant((128, 256, 384), (2, 3, 4), (4, 6, 8), 16),
    "levit_128": _variant((128, 256, 384), (4, 4, 4), (4, 8, 12), 16),
    "levit_192": _variant((192, 288, 384), (4, 4, 4), (3, 5, 6), 32),
    "levit_256": _variant((256, 384, 512), (4, 4, 4), (4, 6, 8), 32),
    "levit_384": _variant((384, 512, 768), (4, 4, 4), (6, 9, 12), 32, 0.1),
}
