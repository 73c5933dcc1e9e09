"""A small ViT whose attention is far from uniform, and photos of noise."""

from __future__ import annotations

import torch

from sievit.models import create


def tiny(seed: int = 0, **overrides):
    torch.manual_seed(seed)
    settings = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 3, "heads": 4}
    model = create("vit_tiny", **(settings | {"num_classes": 5} | overrides)).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 8
        block.attn.proj.weight.data *= 3
    return model


def photos(count: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
