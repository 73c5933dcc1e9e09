"""DCNv4 in the place of a vision transformer's attention or of a ConvNeXt's depthwise
convolution: the replacement experiment of the DCNv4 paper (arXiv 2401.06197, section 5).

Nothing else of the network changes. An operator put in starts as the mean of its 3x3
window: the published first values, all zero, would switch the branch off where no
projection follows (this project's choice).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .families.dcn import Core, DCNv4, deform_core
from .features import prefix_tokens


class TokenDCN(nn.Module):
    """DCNv4 on the patches of [batch, prefix + side * side, dim], a square grid.

    The ``prefix`` tokens (CLS, distillation, registers) have no place on the grid: each
    receives the mean of what the patches get, so that a read-out from CLS still sees the
    whole image (this project's choice; the paper does not say).
    """

    def __init__(self, dcn: DCNv4, prefix: int) -> None:
        super().__init__()
        self.dcn = dcn
        self.prefix = prefix

    def forward(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, self.prefix :]
        if math.isqrt(patches.shape[1]) ** 2 != patches.shape[1]:
            raise ValueError(f"{patches.shape[1]} patches form no square grid")
        mixed = self.dcn(patches)
        pooled = mixed.mean(1, keepdim=True).expand(-1, self.prefix, -1)
        return torch.cat((pooled, mixed), dim=1)


class MapDCN(nn.Module):
    """DCNv4 on channel-first maps [batch, channels, height, width]."""

    def __init__(self, dcn: DCNv4) -> None:
        super().__init__()
        self.dcn = dcn

    def forward(self, x: Tensor) -> Tensor:
        return self.dcn(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def replace_attention(
    model: nn.Module, group_channels: int = 16, core: Core = deform_core
) -> nn.Module:
    """A copy of a vision transformer with DCNv4 for every attention module.

    An attention module is one with linear layers ``qkv`` and ``proj`` (ours and timm's).
    The operator has its own projections of value and output, as attention has.
    Raises ValueError where there is none, or where ``group_channels`` does not divide the
    width.
    """
    prefix = prefix_tokens(model)

    def operator(width: int) -> nn.Module:
        return TokenDCN(_started(width, group_channels, core, pointwise=True), prefix)

    return _replaced(model, _attention_width, operator, "attention module with qkv and proj")


def replace_depthwise(
    model: nn.Module, group_channels: int = 16, core: Core = deform_core
) -> nn.Module:
    """A copy of a network with DCNv4 for every depthwise convolution that keeps the map.

    The operator has no projections of its own: in a ConvNeXt block the two linear layers
    that follow mix the channels.
    Raises ValueError where there is none, or where ``group_channels`` does not divide the
    width.
    """

    def operator(width: int) -> nn.Module:
        return MapDCN(_started(width, group_channels, core, pointwise=False))

    return _replaced(model, _depthwise_width, operator, "depthwise convolution of stride 1")


def _attention_width(module: nn.Module) -> int | None:
    """The width of an attention module, None for any other."""
    qkv, proj = (getattr(module, name, None) for name in ("qkv", "proj"))
    if isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear):
        return proj.out_features
    return None


def _depthwise_width(module: nn.Module) -> int | None:
    """The channels of a depthwise convolution of stride 1, None for any other module."""
    if not isinstance(module, nn.Conv2d) or module.stride != (1, 1) or module.groups == 1:
        return None
    depthwise = module.groups == module.in_channels == module.out_channels
    return module.out_channels if depthwise else None


def _started(width: int, group_channels: int, core: Core, pointwise: bool) -> DCNv4:
    """A DCNv4 that gives the mean of its window."""
    if width % group_channels:
        raise ValueError(f"width {width} is not divisible by group_channels {group_channels}")
    groups = width // group_channels
    dcn = DCNv4(width, groups, pointwise=pointwise, core=core)
    samples = dcn.sampling.samples
    with torch.no_grad():
        by_group = dcn.offset_mask.bias[: 3 * groups * samples].view(groups, 3 * samples)
        by_group[:, 2 * samples :] = 1 / samples
    return dcn


def _replaced(
    model: nn.Module,
    width_of: Callable[[nn.Module], int | None],
    operator: Callable[[int], nn.Module],
    what: str,
) -> nn.Module:
    changed = copy.deepcopy(model)
    widths = {name: width_of(module) for name, module in changed.named_modules()}
    found = [(name, width) for name, width in widths.items() if width is not None]
    if not found:
        raise ValueError(f"{type(model).__name__} has no {what}")
    for name, width in found:
        old = changed.get_submodule(name)
        place = next(old.parameters())
        changed.set_submodule(name, operator(width).to(place).train(old.training))
    return changed
