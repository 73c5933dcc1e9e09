"""Queries and keys, and a small model, that a codec has something to do on."""

from __future__ import annotations

import torch

from sievit.models import create


def random_qk(seed: int, heads: int = 4, tokens: int = 30, dim: int = 6):
    """Q and K whose heads share directions, rotated away from each other, with offsets."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    pair = []
    rotations = [torch.linalg.qr(draw(dim, dim))[0] for _ in range(heads)]
    for _ in range(2):
        common = draw(2, 2, tokens, dim)
        weights = draw(heads, 2)
        mixed = torch.einsum("hc,bcnd->bhnd", weights, common)
        rotated = torch.stack([mixed[:, h] @ rotations[h] for h in range(heads)], dim=1)
        pair.append(rotated + 0.05 * draw(2, heads, tokens, dim) + draw(heads, 1, dim))
    return tuple(pair)


def tiny_vit(seed: int = 0):
    torch.manual_seed(seed)
    model = create("vit_tiny", image_size=32, patch_size=8, dim=32, depth=2, heads=4, num_classes=0)
    for block in model.blocks:  # attention far from uniform, so that Q and K matter
        block.attn.qkv.weight.data *= 8
        block.attn.proj.weight.data *= 3
    return model.eval()
