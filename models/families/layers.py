"""Parts of plain vision transformers: patches, positions, layer scale, MLP.

Token tensors are [batch, tokens, dim]; image tensors [batch, channels, height, width].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Image -> tokens, one a ``patch_size`` x ``patch_size`` square, row by row."""

    def __init__(self, patch_size: int, dim: int, channels: int = 3) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches down and across; ValueError where a side is not a multiple of the patch."""
        if height % self.patch_size or width % self.patch_size or not (height and width):
            raise ValueError(
                f"image sides must be multiples of the patch size {self.patch_size}, "
                f"got {height} x {width}"
            )
        return height // self.patch_size, width // self.patch_size

    def forward(self, images: Tensor) -> Tensor:
        self.grid(*images.shape[-2:])
        return self.proj(images).flatten(2).transpose(1, 2)


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(initial)))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class Mlp(nn.Module):
    """Linear, exact GELU, linear, on every token alone."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(tokens)))


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position vectors [1, rows * columns, dim] of grid ``old`` resampled for grid ``new``.

    Bicubic with a = -0.75, half-pixel centres, no antialiasing: what DINOv2's exported
    graphs do. Computed in float32, since half types have no bicubic kernel everywhere.
    """
    if old == new:
        return positions
    grid = positions.transpose(1, 2).unflatten(2, old)  # (1, dim, rows, columns)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(positions.dtype)
