"""Vision transformers with any sequence of attention and MLP layers, and such networks at
one latency: the share-of-attention study of EfficientViT (CVPR 2023, section 2.1).

The paper varies the share of attention among all layers of sub-networks that are equally
fast. How it shrank them is not printed; here width and number of layers stay, and the
hidden width of the MLPs is set so that the measured time is that of the target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Mlp
from .vit import Attention, ViT


class Layer(nn.Module):
    """x + f(norm x) on [batch, tokens, dim]."""

    def __init__(self, dim: int, f: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.f = f

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.f(self.norm(tokens))


class MixedViT(ViT):
    """A `ViT` whose residual layers are named one by one.

    layers    a letter each: "a" attention, "m" MLP; "amam..." is the plain ViT
    hidden    hidden width of every MLP
    mean      read out the mean of the patches, not CLS, which without attention sees nothing
    settings  the other arguments of `ViT`
    """

    def __init__(
        self, layers: str, hidden: int, heads: int = 3, mean: bool = False, **settings: Any
    ) -> None:
        if not layers or set(layers) - {"a", "m"}:
            raise ValueError(f"layers is a sequence of 'a' and 'm', got {layers!r}")
        super().__init__(depth=0, heads=heads, **settings)
        self.mean = mean
        self.blocks = nn.ModuleList(
            Layer(self.dim, Attention(self.dim, heads) if kind == "a" else Mlp(self.dim, hidden))
            for kind in layers
        )
        self._initialize()

    def forward_features(self, images: Tensor) -> Tensor:
        """As `ViT.forward_features`; with ``mean``, CLS is the mean of the patches."""
        tokens = super().forward_features(images)
        if not self.mean:
            return tokens
        patches = tokens[:, self.num_prefix_tokens :].mean(1, keepdim=True)
        return torch.cat([patches, tokens[:, 1:]], dim=1)


def spread(attention: int, mlp: int) -> str:
    """``attention`` and ``mlp`` layers evenly mixed, attention first: "am", "amm", ..."""
    total = attention + mlp
    if min(attention, mlp) < 0 or not total:
        raise ValueError(f"one layer or more is needed, got {attention} and {mlp}")
    before = [-(-place * attention // total) for place in range(total + 1)]
    return "".join("a" if before[i + 1] > before[i] else "m" for i in range(total))


def width_at(
    target: float,
    measure: Callable[[int], float],
    start: int,
    multiple: int = 8,
    rounds: int = 4,
) -> int:
    """The width, a multiple of ``multiple``, at which ``measure(width)`` is the target.

    ``target`` and times are in one unit of the caller's. Time is taken as a line in the
    width; each round draws it through the two measurements nearest to the target. Returns
    the width measured nearest to it; raises ValueError where even that takes longer by
    more than a tenth.
    """
    times = {width: measure(width) for width in (start, max(multiple, start // 2))}
    for _ in range(rounds):
        (x0, y0), (x1, y1) = sorted(times.items(), key=lambda p: abs(p[1] - target))[:2]
        slope = (y1 - y0) / (x1 - x0)
        step = (target - y0) / slope if slope > 0 else 0.0
        width = max(multiple, round((x0 + step) / multiple) * multiple)
        if width in times:
            break
        times[width] = measure(width)
    best = min(times, key=lambda width: abs(times[width] - target))
    if times[best] > 1.1 * target:
        raise ValueError(f"width {best} takes {times[best]:.4g}, the target is {target:.4g}")
    return best
