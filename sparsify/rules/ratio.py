"""The rule "ratio": the same share of every row is pruned, its smallest entries (ViTCoD)."""

from __future__ import annotations

import numpy as np

from ...workload import AttentionMask
from .arguments import Layers, RuleArguments, force_prefix


def ratio(layers: Layers, asked: RuleArguments) -> AttentionMask:
    """Prune, in each row, the entries whose ascending rank is below sparsity * keys."""
    asked.only("ratio", ("sparsity",))
    return at_ratio(layers, asked.one_sparsity, asked.prefix_tokens)


def at_ratio(layers: Layers, sparsity: float, prefix_tokens: int) -> AttentionMask:
    """The rule itself, on checked maps."""
    masks = []
    for layer in layers:
        rank = np.argsort(np.argsort(layer, axis=-1, kind="stable"), axis=-1, kind="stable")
        masks.append(force_prefix(rank >= sparsity * layer.shape[-1], prefix_tokens))
    return AttentionMask(tuple(masks))
