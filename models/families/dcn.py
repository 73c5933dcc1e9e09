"""Deformable convolution: the sampling operator and the modules DCNv3 and DCNv4.

DCNv3 is InternImage section 3.1 (CVPR 2023, arXiv 2211.05778), DCNv4 section 3 of its paper
(CVPR 2024, arXiv 2401.06197). Maps are channel-last [batch, height, width, channels]. An
operator of G groups takes K samples for each group and output point: pixel (x, y) of
sample k = a * kernel_height + b, a the horizontal index, is

    x = column * stride - padding + half + offset_scale * (a * dilation - half + dx)

with half = dilation * (kernel_width - 1) // 2; y alike from b. Between pixels the value is
bilinear, outside the map it is zero. State-dict names are those of the released weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...workload import Deform
from ..attention.shadow import in_shadow

Core = Callable[..., Tensor]
"""``core(value, offset, weight, *, kernel, stride, padding, dilation, groups, offset_scale,
remove_center)``, as `deform_core`: a compiled kernel may stand in its place. One that has a
function ``merged(value, offset_mask, ...)`` beside is given DCNv4's tensor as it is."""

Pair = int | tuple[int, int]
"""One number for both axes, or (height, width)."""


def deform_core(
    value: Tensor,
    offset: Tensor,
    weight: Tensor,
    *,
    kernel: Pair = 3,
    stride: Pair = 1,
    padding: Pair = 1,
    dilation: Pair = 1,
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """The plain reference of the sampling operator of DCNv3 and DCNv4.

    value   [batch, height, width, channels]
    offset  [batch, rows, columns, groups * K * 2]: by group, sample, (dx, dy), in pixels
    weight  [batch, rows, columns, groups * K]: by group, sample; any softmax already applied
    returns [batch, rows, columns, channels] in the dtype of ``value``

    ``remove_center`` leaves the middle sample of an odd square kernel out. Half types are
    sampled in float32: a bfloat16 position is off by up to a quarter of a pixel.
    Raises ValueError for shapes that do not fit each other.
    """
    points = kernel_points(kernel, remove_center)
    _check_shapes(value, offset, weight, groups, len(points))
    batch, rows, columns, _ = offset.shape
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    shift = offset.to(exact).reshape(batch, rows, columns, groups, len(points), 2)
    place = _positions(shift, points, _pair(kernel), stride, padding, dilation, offset_scale)
    sampled = _sampled(value.to(exact), place)  # (batch, groups, rows * columns, c / groups, K)
    share = weight.to(exact).reshape(batch, rows * columns, groups, 1, -1).transpose(1, 2)
    mixed = (sampled * share).sum(-1).transpose(1, 2)
    return mixed.reshape(batch, rows, columns, -1).to(value.dtype)


def kernel_points(kernel: Pair, remove_center: bool = False) -> list[tuple[int, int]]:
    """(horizontal, vertical) index of every sample, in the operator's order."""
    height, width = _pair(kernel)
    points = [(a, b) for a in range(width) for b in range(height)]
    if remove_center:
        if height != width or height % 2 == 0:
            raise ValueError(f"remove_center needs an odd square kernel, got {height} x {width}")
        points.remove((width // 2, height // 2))
    return points


def _positions(
    shift: Tensor,
    points: list[tuple[int, int]],
    kernel: tuple[int, int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    offset_scale: float,
) -> Tensor:
    """Pixel (x, y) of every sample, [batch, rows, columns, groups, K, 2]."""
    like = {"dtype": shift.dtype, "device": shift.device}
    rows, columns = shift.shape[1:3]
    spread = torch.tensor(_pair(dilation)[::-1], **like)  # (x, y) from here on
    sizes = torch.tensor(kernel[::-1], **like)
    half = (spread * (sizes - 1)).div(2, rounding_mode="floor")
    start = half - torch.tensor(_pair(padding)[::-1], **like)
    step = torch.tensor(_pair(stride)[::-1], **like)
    y, x = torch.meshgrid(torch.arange(rows, **like), torch.arange(columns, **like), indexing="ij")
    centre = torch.stack((x, y), dim=-1) * step + start  # (rows, columns, 2)
    lattice = torch.tensor(points, **like) * spread - half  # (K, 2)
    return centre[:, :, None, None] + offset_scale * (lattice + shift)


def _sampled(value: Tensor, place: Tensor) -> Tensor:
    """Bilinear values at ``place`` [batch, rows, columns, groups, K, (x, y)], zero outside:
    [batch, groups, rows * columns, channels / groups, K]."""
    batch, height, width, _ = value.shape
    groups, samples = place.shape[3:5]
    size = torch.tensor([width, height], dtype=place.dtype, device=place.device)
    place = (2 * place + 1) / size - 1  # grid_sample's: -1 and 1 are the outer pixel edges
    place = place.permute(0, 3, 1, 2, 4, 5).reshape(batch * groups, -1, samples, 2)
    image = value.reshape(batch, height, width, groups, -1).permute(0, 3, 4, 1, 2).flatten(0, 1)
    found = F.grid_sample(image, place, padding_mode="zeros", align_corners=False)
    return found.transpose(1, 2).unflatten(0, (batch, groups))


def _check_shapes(value: Tensor, offset: Tensor, weight: Tensor, groups: int, samples: int) -> None:
    if value.ndim != 4 or value.shape[-1] % groups:
        raise ValueError(
            f"value must be [batch, height, width, channels] with channels divisible by "
            f"groups = {groups}, got {tuple(value.shape)}"
        )
    place = (value.shape[0], *offset.shape[1:3])
    wanted = [(*place, groups * samples * 2), (*place, groups * samples)]
    got = [tuple(offset.shape), tuple(weight.shape)]
    if got != wanted:
        raise ValueError(
            f"{groups} groups of {samples} samples need offset and weight of shape "
            f"{wanted[0]} and {wanted[1]}, got {got[0]} and {got[1]}"
        )


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def split_offset_mask(offset_mask: Tensor, groups: int, samples: int) -> tuple[Tensor, Tensor]:
    """DCNv4's merged tensor [..., padded] -> offset [..., G*K*2] and weight [..., G*K].

    Group g owns entries 3Kg up to 3K(g+1): K pairs (dx, dy), then K weights. What follows
    the last group is padding and is never read.
    """
    by_group = offset_mask[..., : 3 * groups * samples].unflatten(-1, (groups, 3 * samples))
    offset, weight = by_group.split([2 * samples, samples], dim=-1)
    return offset.flatten(-2), weight.flatten(-2)


class DeformSampling(nn.Module):
    """One sampling operator and its geometry, keeping the map's size; no parameters.

    ``core`` may be exchanged at any time for another implementation of `deform_core`.
    """

    def __init__(
        self,
        groups: int,
        kernel: int = 3,
        dilation: int = 1,
        offset_scale: float = 1.0,
        remove_center: bool = False,
        core: Core = deform_core,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"the kernel must be odd to keep the map's size, got {kernel}")
        self.groups, self.kernel, self.dilation = groups, kernel, dilation
        self.offset_scale, self.remove_center = offset_scale, remove_center
        self.samples = len(kernel_points(kernel, remove_center))
        self.core = core

    def forward(self, value: Tensor, offset: Tensor, weight: Tensor | None = None) -> Tensor:
        """Without ``weight``, ``offset`` is DCNv4's merged tensor."""
        geometry = {
            "kernel": self.kernel,
            "stride": 1,
            "padding": self.dilation * (self.kernel - 1) // 2,
            "dilation": self.dilation,
            "groups": self.groups,
            "offset_scale": self.offset_scale,
            "remove_center": self.remove_center,
        }
        merged: Core | None = getattr(self.core, "merged", None)
        if weight is None and merged is not None and not in_shadow():
            return merged(value, offset, **geometry)
        if weight is None:
            offset, weight = split_offset_mask(offset, self.groups, self.samples)
        if in_shadow():  # `as_op` says what it costs; a compiled core takes no fake tensors
            _check_shapes(value, offset, weight, self.groups, self.samples)
            return value.new_empty((*offset.shape[:3], value.shape[-1]))
        return self.core(value, offset, weight, **geometry)

    def as_op(
        self, name: str, value: Tensor, offset: Tensor, weight: Tensor | None = None
    ) -> Deform:
        """This operator for one image, as `trace` counts it whatever the core."""
        return Deform(
            name,
            channels=value.shape[-1],
            groups=self.groups,
            samples=self.samples,
            in_size=(value.shape[1], value.shape[2]),
            points=offset.shape[1] * offset.shape[2],
        )

    def extra_repr(self) -> str:
        return (
            f"groups={self.groups}, kernel={self.kernel}, dilation={self.dilation}, "
            f"offset_scale={self.offset_scale}, remove_center={self.remove_center}"
        )


class Permute(nn.Module):
    """`Tensor.permute` as a layer."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


def to_channels_last() -> Permute:
    """[batch, channels, height, width] -> [batch, height, width, channels]."""
    return Permute(0, 2, 3, 1)


class _Operator(nn.Module):
    """What DCNv3 and DCNv4 share: the sampling, and the centre gate under its released names,
    None where there is no gate."""

    center_feature_scale_proj_weight: nn.Parameter | None
    center_feature_scale_proj_bias: nn.Parameter | None

    def __init__(self, channels: int, sampling: DeformSampling, center_gate: bool) -> None:
        super().__init__()
        groups = sampling.groups
        if groups < 1 or channels % groups:
            raise ValueError(f"channels {channels} are not divisible by groups {groups}")
        self.sampling = sampling
        weight = nn.Parameter(torch.zeros(groups, channels)) if center_gate else None
        bias = nn.Parameter(torch.zeros(groups)) if center_gate else None
        self.register_parameter("center_feature_scale_proj_weight", weight)
        self.register_parameter("center_feature_scale_proj_bias", bias)

    def _mix_center(self, mixed: Tensor, value: Tensor, source: Tensor) -> Tensor:
        """mixed * (1 - s) + value * s, s a gate a group from ``source``; mixed without a gate."""
        weight = self.center_feature_scale_proj_weight
        if weight is None:
            return mixed
        gate = F.linear(source, weight, self.center_feature_scale_proj_bias).sigmoid()
        gate = gate.repeat_interleave(mixed.shape[-1] // weight.shape[0], dim=-1)
        return mixed * (1 - gate) + value * gate


class DCNv3(_Operator):
    """DCNv3 on [batch, height, width, channels]: weights are a softmax over the samples.

    Offsets and weights come from a depthwise convolution of the input (kernel
    ``dw_kernel``, that of the operator by default), layer norm and GELU. With
    ``center_feature_scale`` each group is mixed with the projected value under its centre
    by a learned gate. A fresh operator is a uniform mean of the window.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        kernel: int = 3,
        dilation: int = 1,
        offset_scale: float = 1.0,
        dw_kernel: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        core: Core = deform_core,
    ) -> None:
        sampling = DeformSampling(groups, kernel, dilation, offset_scale, remove_center, core)
        super().__init__(channels, sampling, center_feature_scale)
        dw_kernel = dw_kernel or kernel
        self.dw_conv = nn.Sequential(
            nn.Conv2d(channels, channels, dw_kernel, padding=dw_kernel // 2, groups=channels),
            nn.Sequential(to_channels_last(), nn.LayerNorm(channels, eps=1e-6)),
            nn.GELU(),
        )
        self.offset = nn.Linear(channels, groups * self.sampling.samples * 2)
        self.mask = nn.Linear(channels, groups * self.sampling.samples)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published first values: zero offsets, uniform weights, Xavier projections."""
        _zero(self.offset, self.mask)
        _xavier(self.input_proj, self.output_proj)

    def forward(self, x: Tensor) -> Tensor:
        value = self.input_proj(x)
        branch = self.dw_conv(x.permute(0, 3, 1, 2))
        mask = self.mask(branch).unflatten(-1, (-1, self.sampling.samples))
        mixed = self.sampling(value, self.offset(branch), mask.softmax(-1).flatten(-2))
        return self.output_proj(self._mix_center(mixed, value, branch))


class DCNv4(_Operator):
    """DCNv4: no softmax (weights without bound), offsets and weights from one linear layer.

    Takes [batch, height, width, channels], or as the released module [batch, tokens,
    channels] with ``shape`` = (height, width), square where it is not given. The linear
    layer reads the input itself, or a depthwise convolution of it with ``dw_kernel``;
    its outputs are padded to a multiple of 8. ``pointwise=False`` leaves the projections
    before and after out. The centre gate reads the operator's output, as released.
    A fresh operator gives zero before its output projection.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        kernel: int = 3,
        dilation: int = 1,
        offset_scale: float = 1.0,
        dw_kernel: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        pointwise: bool = True,
        core: Core = deform_core,
    ) -> None:
        sampling = DeformSampling(groups, kernel, dilation, offset_scale, remove_center, core)
        super().__init__(channels, sampling, center_feature_scale)
        self.offset_mask_dw = (
            nn.Conv2d(channels, channels, dw_kernel, padding=dw_kernel // 2, groups=channels)
            if dw_kernel
            else None
        )
        merged = 8 * math.ceil(3 * groups * self.sampling.samples / 8)
        self.offset_mask = nn.Linear(channels, merged)
        self.value_proj = nn.Linear(channels, channels) if pointwise else None
        self.output_proj = nn.Linear(channels, channels, bias=output_bias) if pointwise else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published first values: zero offsets and weights, Xavier projections."""
        _zero(self.offset_mask)
        if self.value_proj is not None and self.output_proj is not None:
            _xavier(self.value_proj, self.output_proj)

    def forward(self, x: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        if x.ndim == 3:
            side = math.isqrt(x.shape[1])
            return self.forward(x.unflatten(1, shape or (side, side))).flatten(1, 2)
        value = x if self.value_proj is None else self.value_proj(x)
        branch = x
        if self.offset_mask_dw is not None:
            branch = self.offset_mask_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        mixed = self.sampling(value, self.offset_mask(branch))
        mixed = self._mix_center(mixed, value, mixed)
        return mixed if self.output_proj is None else self.output_proj(mixed)


def _zero(*layers: nn.Linear) -> None:
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def _xavier(*layers: nn.Linear) -> None:
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
