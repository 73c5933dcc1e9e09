"""What several families share: a product joined with a batch norm, which folds into it for
inference, residual branches with stochastic depth, stems, stages and pairs of classifiers.

Attribute names follow the released LeViT and EfficientViT weights (`c`, `bn`, `l`, `m`).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..weights.timm_names import by_position


class ConvBN(nn.Sequential):
    """A 2-d convolution without bias and its batch norm (eps 1e-5).

    ``bn_weight`` is the norm's first weight: 0 makes a fresh residual branch vanish.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bn_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.constant_(self.bn.weight, bn_weight)

    def folded(self) -> nn.Conv2d:
        """One convolution with bias that does the same in evaluation."""
        scale, shift = _affine(self.bn)
        conv = copy.deepcopy(self.c)
        conv.weight = nn.Parameter(self.c.weight * scale[:, None, None, None])
        conv.bias = nn.Parameter(shift)
        return conv


class LinearBN(nn.Sequential):
    """A linear layer without bias over [batch, tokens, dim] and its batch norm."""

    def __init__(self, inputs: int, outputs: int, bn_weight: float = 1.0) -> None:
        super().__init__()
        self.c = nn.Linear(inputs, outputs, bias=False)
        self.bn = nn.BatchNorm1d(outputs)
        nn.init.constant_(self.bn.weight, bn_weight)

    def forward(self, input: Tensor) -> Tensor:
        x = self.c(input)
        return self.bn(x.flatten(0, 1)).reshape_as(x)

    def folded(self) -> nn.Linear:
        """One linear layer with bias that does the same in evaluation."""
        scale, shift = _affine(self.bn)
        linear = copy.deepcopy(self.c)
        linear.weight = nn.Parameter(self.c.weight * scale[:, None])
        linear.bias = nn.Parameter(shift)
        return linear


class BNLinear(nn.Sequential):
    """A classifier: batch norm over [batch, dim], then a linear layer with bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(inputs)
        self.l = nn.Linear(inputs, outputs)
        nn.init.trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def folded(self) -> nn.Linear:
        """One linear layer that does the same in evaluation."""
        scale, shift = _affine(self.bn)
        linear = copy.deepcopy(self.l)
        linear.weight = nn.Parameter(self.l.weight * scale)
        linear.bias = nn.Parameter(self.l.bias + self.l.weight @ shift)
        return linear


def _affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(scale, shift) [channels] of a batch norm in evaluation."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


@torch.no_grad()
def fuse(model: nn.Module) -> nn.Module:
    """A copy of ``model``, in evaluation mode, with every foldable batch norm folded.

    Any module with a method ``folded() -> nn.Module`` is replaced by what that returns.
    The model itself is not changed.
    """
    fused = copy.deepcopy(model).eval()
    if (folded := getattr(fused, "folded", None)) is not None:
        return folded()
    for parent in list(fused.modules()):
        for name, child in list(parent.named_children()):
            if (folded := getattr(child, "folded", None)) is not None:
                setattr(parent, name, folded())
    return fused


class StagedNet(nn.Module):
    """Images -> `stem` -> stages `s1`, `s2`, ... of blocks `b1`, `b2`, ... -> `head`, as the
    weights released with RegNet name them. A subclass makes the parts."""

    stem: nn.Module
    head: nn.Module
    num_prefix_tokens = 0

    def forward_features(self, x: Tensor) -> Tensor:
        """The map [batch, width, h, w] that the head is given."""
        x = self.stem(x)
        stage = 1
        while hasattr(self, f"s{stage}"):
            x = self.get_submodule(f"s{stage}")(x)
            stage += 1
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


def stage_of(blocks: Iterable[nn.Module]) -> nn.Sequential:
    """A stage of `StagedNet`."""
    named = {f"b{index + 1}": block for index, block in enumerate(blocks)}
    return nn.Sequential(OrderedDict(named))


class DistilledNet(nn.Module):
    """A network on [batch, dim] features with a classifier, and with ``distillation`` a
    second one: both averaged in evaluation, both returned in training.

    LeViT and EfficientViT. ``num_classes=0`` returns the features.
    """

    num_prefix_tokens = 0
    one_image_size = True

    def add_heads(self, width: int, num_classes: int, distillation: bool) -> None:
        self.head = BNLinear(width, num_classes) if num_classes else nn.Identity()
        two = distillation and num_classes
        self.head_dist = BNLinear(width, num_classes) if two else None

    def classify(self, pooled: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.head_dist is None:
            return self.head(pooled)
        logits, distilled = self.head(pooled), self.head_dist(pooled)
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def translate_weights(
        self, stored: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Also timm's names, for `load_weights`."""
        return by_position(self, stored)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that training leaves out of weight decay."""
        return {name for name, _ in self.named_parameters() if "attention_biases" in name}


def sixteenth_stem(channels: int, width: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Four 3x3 convolutions of stride 2 with batch norm: a map of 1/16 of the image's side,
    ``activation`` after all but the last."""
    layers: list[nn.Module] = []
    for share in (8, 4, 2, 1):
        layers += [ConvBN(channels, width // share, 3, stride=2, padding=1), activation()]
        channels = width // share
    return nn.Sequential(*layers[:-1])


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: in training, zero whole samples of ``x`` with chance ``rate`` and
    scale the others by 1 / (1 - rate)."""
    if not training or rate == 0.0:
        return x
    kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * (kept / (1.0 - rate)).to(x.dtype)


class Residual(nn.Module):
    """x + m(x), with stochastic depth on the branch."""

    def __init__(self, m: nn.Module, drop: float = 0.0) -> None:
        super().__init__()
        self.m = m
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        return x + drop_path(self.m(x), self.drop, self.training)


def offset_index(queries: Tensor, keys: Tensor, width: int) -> Tensor:
    """Which entry of a bias table a query and a key share: |dy| * width + |dx|.

    queries [q, 2] and keys [k, 2] are (y, x) positions on the key grid, whose rows are
    ``width`` long. Returns int64 [q, k].
    """
    offset = (queries[:, None] - keys[None, :]).abs()
    return offset[..., 0] * width + offset[..., 1]


def grid(resolution: int, stride: int = 1) -> Tensor:
    """(y, x) of every ``stride``-th point of a square grid, row by row: int64 [points, 2]."""
    line = torch.arange(0, resolution, stride)
    return torch.cartesian_prod(line, line)
