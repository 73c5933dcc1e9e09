"""Averaged attention: the statistic that fixed masks are learned from.

ViTCoD (HPCA 2023, section IV-B) averages each layer's softmax output over the training
set. Sums are kept in float64; memory does not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from ..models import AttentionCall, AttentionHook
from ..models.attention.observe import observe_attention


class _Sum(AttentionHook):
    """Adds up one call's probabilities over images (and windows)."""

    def __init__(self) -> None:
        super().__init__(observe=self.add)
        self.total: Tensor | None = None
        self.count = 0

    def add(self, probabilities: Tensor) -> None:
        added = probabilities.detach().sum(dim=0, dtype=torch.float64)
        if self.total is not None and self.total.shape != added.shape:
            raise ValueError(
                f"a batch has attention {list(added.shape)}, the first had "
                f"{list(self.total.shape)}: all images need one size"
            )
        self.total = added if self.total is None else self.total + added
        self.count += len(probabilities)


def average_attention(
    model: nn.Module,
    batches: Iterable[Tensor],
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, ...]:
    """Mean attention of ``model`` over images: float32 [heads, queries, keys] a layer.

    batches   tensors [images, channels, height, width] as the model takes them, or
              (images, labels) pairs of a data loader; read once, one batch in memory
    progress  called with the number of images done after each batch

    Works on any module whose attention `sievit.models.find_attention` finds. The model
    runs in eval mode and is left as it was. Raises ValueError for no images, for a model
    without softmax attention, and where attention is not finite.
    """
    sums: list[_Sum] = []

    def watch(calls: tuple[AttentionCall, ...]) -> list[_Sum]:
        sums.extend(_Sum() for _ in calls)
        return sums

    return _means(sums, observe_attention(model, batches, watch, progress))


def _means(sums: list[_Sum], images: int) -> tuple[np.ndarray, ...]:
    if not images:
        raise ValueError("average_attention needs at least one image, got none")
    if not sums:
        raise ValueError("the model makes no call of softmax attention")
    means = []
    for layer, record in enumerate(sums):
        if record.total is None:
            raise ValueError(f"attention of layer {layer} was not seen in any batch")
        mean = (record.total / record.count).cpu().numpy()
        if not np.isfinite(mean).all():
            raise ValueError(f"attention of layer {layer} is not finite (NaN or infinite)")
        means.append(mean.astype(np.float32))
    return tuple(means)
