"""The deformable operator out of PyTorch's own operations: any device, its own autograd.

What runs where no compiled kernel can (another device, no Numba, no Triton) and where
`torch.use_deterministic_algorithms` asks for repeatable gradients on a GPU. Slower, and
it keeps every sample for the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .deform_shapes import Geometry

BORDER = 2
"""Rows and columns of zeros around the map: a sample reads its pixel and the next."""


def sampled(value: Tensor, offset: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """[batch, rows, columns, channels] in the type of ``value``.

    value [batch, height, width, channels], offset [batch, rows, columns, groups, samples,
    (x, y)], weight [batch, rows, columns, groups, samples], in any strides.
    """
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    _, height, width, channels = value.shape
    groups, wide = geometry.groups, width + 2 * BORDER
    cells = F.pad(value.to(exact), (0, 0, BORDER, BORDER, BORDER, BORDER))
    cells = cells.flatten(1, 2).unflatten(-1, (groups, channels // groups))
    pixel, part = _places(offset.to(exact), geometry, height, width)
    (x, y), weight = part.unbind(-1), weight.to(exact)
    total: Tensor | float = 0.0
    for down, along, share in (
        (0, 0, (1 - y) * (1 - x)),
        (0, 1, (1 - y) * x),
        (1, 0, y * (1 - x)),
        (1, 1, y * x),
    ):
        index = (pixel + (down * wide + along)).permute(0, 1, 2, 4, 3)  # groups last
        index = index.flatten(1, 3).unsqueeze(-1).expand(-1, -1, -1, cells.shape[-1])
        found = cells.gather(1, index)
        found = found.unflatten(
            1, (*offset.shape[1:3], geometry.samples)
        )  # samples, groups, channels
        total = total + (found * (share * weight).transpose(3, 4).unsqueeze(-1)).sum(3)
    return total.flatten(-2).to(value.dtype)


def _places(offset: Tensor, geometry: Geometry, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Of every sample its cell in the bordered map, and how far it is past it, (x, y)."""
    like = {"dtype": offset.dtype, "device": offset.device}
    rows, columns = offset.shape[1:3]
    stride, first = geometry.stride, geometry.first
    lattice = torch.tensor(geometry.lattice, **like)
    shift = geometry.offset_scale * (lattice + offset)
    y, x = torch.meshgrid(
        torch.arange(rows, **like) * stride[0] + first[0],
        torch.arange(columns, **like) * stride[1] + first[1],
        indexing="ij",
    )
    base = torch.stack((x, y), -1)[:, :, None, None]
    size = torch.tensor((width, height), **like)
    shift = torch.minimum(torch.maximum(shift, -BORDER - base), size - base)
    whole = shift.detach().nan_to_num().floor()
    cell = (whole + base).clamp(min=-BORDER).minimum(size).long() + BORDER
    return cell[..., 1] * (width + 2 * BORDER) + cell[..., 0], shift - whole
