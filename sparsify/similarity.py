"""How alike the attention heads of a block are (EfficientViT, CVPR 2023, section 2.2).

The measure is fixed here as: for one image and one head, the largest cosine between its
whole attention map, all queries and keys as one vector, and that of another head of the
same block; then the mean over images.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..figure import blank, save
from ..models import AttentionCall, AttentionHook
from ..models.attention.observe import observe_attention


@dataclass(frozen=True, eq=False)
class HeadSimilarity:
    """``values[b]`` is float64 [heads] for the block whose attention is ``blocks[b]``."""

    blocks: tuple[str, ...]
    values: tuple[np.ndarray, ...]
    images: int

    @property
    def by_block(self) -> np.ndarray:
        """Mean over the heads of each block, float64 [blocks]."""
        return np.array([float(heads.mean()) for heads in self.values])

    def rows(self) -> list[dict[str, object]]:
        """A row a block for a table or JSON."""
        return [
            {"block": name, "mean": float(heads.mean()), "heads": heads.tolist()}
            for name, heads in zip(self.blocks, self.values, strict=True)
        ]


def head_similarity(
    model: nn.Module,
    batches: Iterable[Tensor],
    progress: Callable[[int], None] | None = None,
) -> HeadSimilarity:
    """Similarity of the heads of every block of ``model``, averaged over images.

    batches   tensors [images, channels, height, width] as the model takes them, or
              (images, labels) pairs of a data loader
    progress  called with the number of images done after each batch

    A block is one attention call of several heads, or all calls of one head in the same
    module (a cascade, as in EfficientViT); windows of an image are parts of one map. The
    model runs in eval mode and is left as it was. Raises ValueError for no images, for a
    model without softmax attention and for a block of a single head.
    """
    blocks: list[_Block] = []

    def watch(calls: tuple[AttentionCall, ...]) -> list[AttentionHook]:
        found, hooks = _watch(calls)
        blocks.extend(found)
        return hooks

    def begin(images: int) -> None:
        for block in blocks:
            block.images = images

    done = observe_attention(model, batches, watch, progress, begin)
    if not done or not blocks:
        raise ValueError("head_similarity needs images and a model with softmax attention")
    values = tuple((block.total / done).cpu().numpy() for block in blocks)
    return HeadSimilarity(tuple(block.name for block in blocks), values, done)


class _Block:
    """Gathers the maps of one block until all heads are there, then adds up."""

    def __init__(self, name: str, heads: int) -> None:
        self.name, self.heads = name, heads
        self.images = 0
        self.maps: list[Tensor] = []
        self.total = torch.zeros((), dtype=torch.float64)

    def add(self, probabilities: Tensor) -> None:
        """[images * windows, heads, queries, keys] of one call."""
        heads = probabilities.shape[1]
        maps = probabilities.reshape(self.images, -1, heads, probabilities[0, 0].numel())
        self.maps.append(maps.transpose(1, 2).flatten(2))  # (images, heads, entries)
        if sum(call.shape[1] for call in self.maps) == self.heads:
            self.total = self.total + similarities(torch.cat(self.maps, dim=1)).sum(0)
            self.maps = []


def similarities(maps: Tensor) -> Tensor:
    """Largest cosine of each head with another: [images, heads, entries] -> float64
    [images, heads]."""
    unit = F.normalize(maps.double(), dim=-1)
    cosines = unit @ unit.transpose(1, 2)
    own = torch.eye(maps.shape[1], dtype=torch.bool, device=maps.device)
    return cosines.masked_fill(own, -torch.inf).amax(-1)


class _Watch(AttentionHook):
    def __init__(self, block: _Block) -> None:
        super().__init__(observe=lambda probabilities: block.add(probabilities.detach()))


def _watch(calls: tuple[AttentionCall, ...]) -> tuple[list[_Block], list[AttentionHook]]:
    """The blocks, and a hook for each call that leads to its block."""
    blocks: dict[tuple, _Block] = {}
    hooks: list[AttentionHook] = []
    for call in calls:
        alone = call.heads > 1
        key = (call.module, call.index if alone else None, call.queries, call.keys)
        block = blocks.setdefault(key, _Block(call.module, 0))
        block.heads += call.heads
        hooks.append(_Watch(block))
    for block in blocks.values():
        if block.heads < 2:
            raise ValueError(f"{block.name} has one head: there is no other to be like")
    return list(blocks.values()), hooks


def plot_similarity(
    similarity: HeadSimilarity, path: str | os.PathLike[str], title: str = ""
) -> None:
    """Every head as a dot and the mean of each block as a line, over depth; a picture file."""
    figure = blank(6.4, 3.6)
    axes = figure.subplots()
    places = np.arange(len(similarity.blocks))
    for place, heads in zip(places, similarity.values, strict=True):
        axes.plot(np.full(len(heads), place), heads, "o", color="#2b6cb0", ms=4, alpha=0.6)
    axes.plot(places, similarity.by_block, color="#dd6b20", label="mean over heads")
    axes.set_xticks(places, [str(place) for place in places])
    axes.set_xlabel("block")
    axes.set_ylabel("largest cosine to another head")
    axes.set_ylim(0, 1.02)
    axes.set_title(title or f"{similarity.images} images", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save(figure, path)
