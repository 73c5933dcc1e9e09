"""The rule "ratio": the same share of every row is pruned, its smallest entries (ViTCoD)."""

from __future__ import annotations

import numpy as np

from ...workload import AttentionMask
from .arguments import Layers, RuleArguments, force_prefix


def ratio(layers: Layers, asked: RuleArguments) -> AttentionMask:
    """Prune, in each row, the entries whose ascending rank is below sparsity * keys."""
    asked.only("ratio", ("sparsity",))
    sparsity, masks = asked.one_sparsity, []
    for layer in layers:
        rank = np.argsort(np.argsort(layer, axis=-1, kind="stable"), axis=-1, kind="stable")
        masks.append(force_prefix(rank >= sparsity * layer.shape[-1], asked.prefix_tokens))
    return AttentionMask(tuple(masks))
