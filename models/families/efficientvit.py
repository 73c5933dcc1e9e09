"""EfficientViT M0-M5: cascaded group attention in a sandwich layout (CVPR 2023, arXiv
2305.07027, section 3).

Three stages at 1/16, 1/32 and 1/64 of the image, channel-first, batch norm everywhere.
State-dict names are those of the released weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv_layers import ConvBN, DistilledNet, Residual, grid, offset_index, sixteenth_stem

STRIDE = 16  # of the stem
WINDOW = 7  # tokens a side of a local window, all stages
KEY_DIM = 16  # query and key dimension of every head


class SqueezeExcite(nn.Module):
    """Channel gates from the pooled map; both 1x1 convolutions have a bias."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.fc2(F.relu(self.fc1(pooled))).sigmoid()


class PatchMerging(nn.Module):
    """Halve the map and change its width: inverted bottleneck with squeeze-excite."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        hidden = 4 * inputs
        self.conv1 = ConvBN(inputs, hidden)
        self.conv2 = ConvBN(hidden, hidden, 3, stride=2, padding=1, groups=hidden)
        self.se = SqueezeExcite(hidden, inputs)
        self.conv3 = ConvBN(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.se(F.relu(self.conv2(F.relu(self.conv1(x))))))


class FFN(nn.Module):
    """Two 1x1 convolutions, expansion 2, ReLU between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pw1 = ConvBN(dim, 2 * dim)
        self.act = nn.ReLU()
        self.pw2 = ConvBN(2 * dim, dim, bn_weight=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.act(self.pw1(x)))


class CascadedGroupAttention(nn.Module):
    """Attention heads in a chain, each on its own share of the channels (section 3.1).

    Head i sees its chunk plus the output of head i-1. A learned bias, shared by all pairs
    at the same |dy|, |dx|, is added to the scores. The map must be resolution x resolution.
    """

    attention_bias_idxs: Tensor

    def __init__(self, dim: int, heads: int, resolution: int, kernels: Sequence[int]) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not divisible by heads {heads}")
        if len(kernels) < heads:
            raise ValueError(f"{heads} heads need {heads} query kernels, got {tuple(kernels)}")
        self.resolution = resolution
        self.key_dims = [KEY_DIM] * heads  # a pruned head has fewer; the scale stays
        self.value_dim = dim // heads
        head_dim = 2 * KEY_DIM + self.value_dim
        self.qkvs = nn.ModuleList(ConvBN(dim // heads, head_dim) for _ in range(heads))
        self.dws = nn.ModuleList(
            ConvBN(KEY_DIM, KEY_DIM, k, padding=k // 2, groups=KEY_DIM) for k in kernels[:heads]
        )
        self.proj = nn.Sequential(nn.ReLU(), ConvBN(dim, dim, bn_weight=0.0))
        points = grid(resolution)
        self.attention_biases = nn.Parameter(torch.zeros(heads, resolution**2))
        self.register_buffer("attention_bias_idxs", offset_index(points, points, resolution))

    def forward(self, x: Tensor) -> Tensor:
        biases = self.attention_biases[:, self.attention_bias_idxs]  # (heads, tokens, tokens)
        outputs: list[Tensor] = []
        for head, chunk in enumerate(x.chunk(len(self.qkvs), dim=1)):
            outputs.append(self.head(head, chunk + outputs[-1] if outputs else chunk, biases[head]))
        return self.proj(torch.cat(outputs, dim=1))

    def head(self, index: int, x: Tensor, bias: Tensor) -> Tensor:
        """One head on [batch, dim / heads, h, w] -> [batch, value_dim, h, w]."""
        key_dim = self.key_dims[index]
        q, k, v = self.qkvs[index](x).split([key_dim, key_dim, self.value_dim], dim=1)
        q = self.dws[index](q)
        q, k, v = (t.flatten(2).transpose(1, 2).unsqueeze(1) for t in (q, k, v))
        # the result has the shape (batch, 1, tokens, value_dim)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=KEY_DIM**-0.5)
        return mixed.squeeze(1).transpose(1, 2).reshape(*x.shape[:1], -1, *x.shape[2:])


class LocalWindowAttention(nn.Module):
    """Cascaded group attention on the whole map, or in windows of 7 x 7 where it is larger.

    A map that windows do not tile is padded with zeros at the right and bottom; the padding
    takes part as zeros.
    """

    def __init__(self, dim: int, heads: int, resolution: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.attn = CascadedGroupAttention(dim, heads, min(WINDOW, resolution), kernels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        side = self.attn.resolution
        if (height, width) == (side, side):
            return self.attn(x)
        if side < WINDOW or max(height, width) < WINDOW:
            raise ValueError(
                f"a map of {height} x {width} tokens does not fit attention over {side} x {side}: "
                "build the model with the image_size it is to see"
            )
        padded = F.pad(x, (0, -width % side, 0, -height % side))
        windows = self.attn(cut_windows(padded, side))
        return join_windows(windows, side, padded.shape[2:])[..., :height, :width]


def cut_windows(x: Tensor, side: int) -> Tensor:
    """[batch, c, h, w] -> [batch * windows, c, side, side], windows row by row."""
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // side, side, width // side, side)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, side, side)


def join_windows(windows: Tensor, side: int, size: Sequence[int]) -> Tensor:
    """The inverse of `cut_windows` for a map of ``size`` (height, width)."""
    height, width = size
    channels = windows.shape[1]
    x = windows.view(-1, height // side, width // side, channels, side, side)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)


class Block(nn.Module):
    """The sandwich: depthwise convolution and FFN on either side of one attention."""

    def __init__(self, dim: int, heads: int, resolution: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.dw0 = Residual(ConvBN(dim, dim, 3, padding=1, groups=dim, bn_weight=0.0))
        self.ffn0 = Residual(FFN(dim))
        self.mixer = Residual(LocalWindowAttention(dim, heads, resolution, kernels))
        self.dw1 = Residual(ConvBN(dim, dim, 3, padding=1, groups=dim, bn_weight=0.0))
        self.ffn1 = Residual(FFN(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))))


def _mixing(dim: int) -> nn.Sequential:
    """Depthwise convolution and FFN, on either side of a patch merging."""
    conv = ConvBN(dim, dim, 3, padding=1, groups=dim)
    return nn.Sequential(Residual(conv), Residual(FFN(dim)))


class EfficientViT(DistilledNet):
    """Images [batch, 3, image_size, image_size] -> logits [batch, num_classes].

    ``kernels`` are the query convolutions by head index, the first ``heads`` of them used.
    With ``distillation`` there are two classifiers: averaged in evaluation, both returned
    in training. ``num_classes=0`` returns the pooled features.
    """

    blocks1: nn.Module
    blocks2: nn.Module
    blocks3: nn.Module

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        kernels: Sequence[int],
        image_size: int = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
        distillation: bool = False,
    ) -> None:
        super().__init__()
        if not len(widths) == len(depths) == len(heads) == 3:
            raise ValueError(
                f"three stages need 3 widths, depths and heads, got {widths}, {depths}, {heads}"
            )
        if image_size < STRIDE:
            raise ValueError(f"image_size must be at least {STRIDE}, got {image_size}")
        self.image_size = image_size
        self.patch_embed = sixteenth_stem(in_channels, widths[0], nn.ReLU)
        resolution = image_size // STRIDE
        for stage, (dim, depth) in enumerate(zip(widths, depths, strict=True)):
            layers: list[nn.Module] = []
            if stage:
                before = widths[stage - 1]
                layers += [_mixing(before), PatchMerging(before, dim), _mixing(dim)]
                resolution = (resolution - 1) // 2 + 1
            layers += [Block(dim, heads[stage], resolution, kernels) for _ in range(depth)]
            self.add_module(f"blocks{stage + 1}", nn.Sequential(*layers))
        self.add_heads(widths[-1], num_classes, distillation)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map [batch, width, h, w]."""
        return self.blocks3(self.blocks2(self.blocks1(self.patch_embed(x))))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.classify(self.forward_features(x).mean((2, 3)))


def _variant(
    widths: Sequence[int], depths: Sequence[int], heads: Sequence[int], kernels: Sequence[int]
) -> Callable[..., EfficientViT]:
    return partial(EfficientViT, widths=widths, depths=depths, heads=heads, kernels=kernels)


MODELS: dict[str, Callable[..., nn.Module]] = {
    # widths, depths, heads by stage; query kernels by head (paper table 2)
    "efficientvit_m0": _variant((64, 128, 192), (1, 2, 3), (4, 4, 4), (5, 5, 5, 5)),
    "efficientvit_m1": _variant((128, 144, 192), (1, 2, 3), (2, 3, 3), (7, 5, 3, 3)),
    "efficientvit_m2": _variant((128, 192, 224), (1, 2, 3), (4, 3, 2), (7, 5, 3, 3)),
    "efficientvit_m3": _variant((128, 240, 320), (1, 2, 3), (4, 3, 4), (5, 5, 5, 5)),
    "efficientvit_m4": _variant((128, 256, 384), (1, 2, 3), (4, 4, 4), (7, 5, 3, 3)),
    "efficientvit_m5": _variant((192, 288, 384), (1, 3, 4), (3, 3, 4), (7, 5, 3, 3)),
}
