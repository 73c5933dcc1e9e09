"""Deformable convolution, DCNv3 and DCNv4: one operator, compiled for CPU and GPU.

For output point p, group g and its samples k (InternImage, CVPR 2023, section 3.1; DCNv4,
CVPR 2024, section 3):

    out_g(p) = sum over k of weight_gk(p) * value_g(p + offset_scale * (lattice_k + offset_gk(p)))

bilinear between pixels and zero outside the map. `deform_core` takes offsets and weights
apart, `deform_conv` DCNv4's merged tensor, which is read where it is. Both are the
PyTorch operator ``sievit::deform_conv``, with its gradients.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

from .deform_shapes import (
    Geometry,
    Pair,
    check_merged,
    check_shape,
    check_tensors,
    check_value,
    pair,
)


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
    """The sampling operator of DCNv3 and DCNv4, in place of
    `sievit.models.families.dcn.deform_core`.

    value   [batch, height, width, channels]
    offset  [batch, rows, columns, groups * K * 2]: by group, sample, (dx, dy), in pixels
    weight  [batch, rows, columns, groups * K]: by group, sample; any softmax already applied
    returns [batch, rows, columns, channels] in the dtype of ``value``

    All floating types, sums in float32 at least; under autocast all three are cast to its
    type. A position that is no number gives an output that is none. On a GPU the gradient
    of ``value`` is summed in no fixed order unless
    `torch.use_deterministic_algorithms(True)` is set. Raises ValueError for shapes, types
    or devices that do not fit each other.
    """
    geometry = _geometry(kernel, stride, padding, dilation, groups, offset_scale, remove_center)
    value, offset, weight = _as_autocast(value, offset, weight)
    check_tensors(value, {"offset": offset, "weight": weight})
    place, each = check_value(value, geometry), groups * geometry.samples
    check_shape("offset", offset, (*place, 2 * each), geometry)
    check_shape("weight", weight, (*place, each), geometry)
    return _run(value, offset, weight, geometry)


def deform_conv(
    value: Tensor,
    offset_mask: Tensor,
    *,
    kernel: Pair = 3,
    stride: Pair = 1,
    padding: Pair = 1,
    dilation: Pair = 1,
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """`deform_core` on DCNv4's merged tensor, read where it is.

    offset_mask  [batch, rows, columns, 3 * groups * K or more]: by group K pairs (dx, dy),
                 then K weights; what follows the last group is never read, its gradient 0
    """
    geometry = _geometry(kernel, stride, padding, dilation, groups, offset_scale, remove_center)
    value, offset_mask = _as_autocast(value, offset_mask)
    check_tensors(value, {"offset_mask": offset_mask})
    check_merged(offset_mask, check_value(value, geometry), geometry)
    return _run(value, offset_mask, None, geometry)


# Where `sievit.models.families.dcn` looks for it; pyright knows no attributes of functions.
deform_core.merged = deform_conv  # pyright: ignore[reportFunctionMemberAccess]


def _geometry(kernel, stride, padding, dilation, groups, offset_scale, remove_center) -> Geometry:
    return Geometry(
        pair(kernel),
        pair(stride),
        pair(padding),
        pair(dilation),
        int(groups),
        float(offset_scale),
        bool(remove_center),
    )


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, in its type (float64 apart); else as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or any(t.dtype == torch.float64 for t in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) for t in tensors)


def _run(value: Tensor, offset: Tensor, weight: Tensor | None, geometry: Geometry) -> Tensor:
    if not _has_kernel(value):
        from .deform_torch import sampled

        return sampled(value, *_by_sample(offset, weight, geometry), geometry)
    return torch.ops.sievit.deform_conv(
        value,
        offset,
        weight,
        list(geometry.kernel),
        list(geometry.stride),
        list(geometry.padding),
        list(geometry.dilation),
        geometry.groups,
        geometry.offset_scale,
        geometry.remove_center,
    )


COMPILER = {"cpu": "numba", "cuda": "triton"}
"""What compiles the kernel of a kind of device."""

PRESENT = {name: importlib.util.find_spec(name) is not None for name in COMPILER.values()}


def _has_kernel(value: Tensor) -> bool:
    """Whether a compiled kernel takes ``value``; PyTorch's operations do the others."""
    device = value.device.type
    repeatable = torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled()
    if device == "cuda" and repeatable:
        return False
    found = device == "meta" or PRESENT.get(COMPILER.get(device, ""), False)
    if not found and not torch.compiler.is_compiling():
        _say_slower(device)
    return found


@cache
def _say_slower(device: str) -> None:
    reason = f"{COMPILER[device]} is not installed" if device in COMPILER else "has no kernel"
    logging.getLogger("sievit.accel.kernels").warning(
        "deformable operator on %s: %s, it runs on PyTorch's operations, slower", device, reason
    )


def _by_sample(offset: Tensor, weight: Tensor | None, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Views [..., groups, samples, (x, y)] and [..., groups, samples] of either form."""
    groups, samples = geometry.groups, geometry.samples
    if weight is not None:
        weight = weight.unflatten(-1, (groups, samples))
        return offset.unflatten(-1, (groups, samples, 2)), weight
    merged = offset[..., : 3 * groups * samples].unflatten(-1, (groups, 3 * samples))
    return merged[..., : 2 * samples].unflatten(-1, (samples, 2)), merged[..., 2 * samples :]


# The operator as PyTorch knows it. Without ``weight`` the merged tensor is ``offset``.

_NUMBERS = (
    "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
    "float offset_scale, bool remove_center"
)
torch.library.define(
    "sievit::deform_conv",
    f"(Tensor value, Tensor offset, Tensor? weight, {_NUMBERS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "sievit::deform_conv_backward",
    f"(Tensor grad, Tensor value, Tensor offset, Tensor? weight, {_NUMBERS}) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("sievit::deform_conv")
def _shape_of_forward(value, offset, weight, *numbers):
    return value.new_empty((*offset.shape[:3], value.shape[-1]))


@torch.library.register_fake("sievit::deform_conv_backward")
def _shape_of_backward(grad, value, offset, weight, *numbers):
    inputs = (value, offset, value.new_empty(0) if weight is None else weight)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.numbers = inputs[3:]


def _gradients(ctx, grad):
    by_value, by_offset, by_weight = torch.ops.sievit.deform_conv_backward(
        grad, *ctx.saved_tensors, *ctx.numbers
    )
    return by_value, by_offset, None if ctx.saved_tensors[2] is None else by_weight, *[None] * 7


torch.library.register_autograd("sievit::deform_conv", _gradients, setup_context=_keep)


def _register(device: str, module: str) -> None:
    """The kernels of ``module``, imported on first use, for tensors on ``device``."""

    def forward(value, offset, weight, *numbers):
        kernels = importlib.import_module(module, __package__)
        return kernels.forward(value, offset, weight, _geometry(*numbers))

    def backward(grad, value, offset, weight, *numbers):
        kernels = importlib.import_module(module, __package__)
        grads = kernels.backward(grad, value, offset, weight, _geometry(*numbers))
        return *grads[:2], value.new_empty(0) if weight is None else grads[2]

    torch.library.impl("sievit::deform_conv", device)(forward)
    torch.library.impl("sievit::deform_conv_backward", device)(backward)


_register("cpu", ".deform_cpu")
_register("cuda", ".deform_gpu")
