"""Modules that write attention their own way, its equation, and input for them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, DIM = 2, 16


def reference(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Masked attention as its equation reads, row by row; a row with nothing kept is 0."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    weights = torch.where(keep, torch.exp(scores), 0.0)
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp_min(1e-30), 0.0) @ v


class Projected(nn.Module):
    """q, k, v and output projections around `core`, which a subclass writes its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        return self.qkv(x).view(b, n, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4).unbind(0)

    def merged(self, y: Tensor) -> Tensor:
        return self.proj(y.transpose(1, 2).reshape(len(y), -1, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.merged(self.core(*self.heads(x)))

    def expected(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.merged(reference(*self.heads(x), keep))


class Fused(Projected):
    def core(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Eager(Projected):
    """As timm and DeiT write it: scale on q, softmax method, a dropout module."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def core(self, q, k, v):
        attn = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return self.drop(attn.softmax(dim=-1)) @ v


def tokens(batch: int = 3, count: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, DIM, generator=torch.Generator().manual_seed(seed))


def random_keep(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
