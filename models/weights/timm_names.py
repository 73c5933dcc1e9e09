"""Weights under timm's names -> the names of the authors' releases, for the families whose
modules are named as released. Nothing of timm is needed for it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

DERIVED = "attention_bias_idxs"
"""Index tables that follow from a model's shape; timm does not store them."""


def renamed(
    stored: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]
) -> tuple[dict[str, Tensor], list[str]]:
    """``stored`` with each rule (regular expression, replacement) applied to every name.

    Returns the weights and, as `load_weights` asks, an empty list of names left out.
    """
    weights = {}
    for name, tensor in stored.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        weights[name] = tensor
    return weights, []


def by_position(
    model: nn.Module, stored: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """``stored`` under the names of ``model``, one after the other.

    For families whose layers stand in the same order in timm and in the release. Weights
    that already have the model's names, or another number of tensors, are left as they
    are, for the general check of names and shapes.
    """
    own = model.state_dict()
    derived = {name: tensor for name, tensor in own.items() if name.endswith(DERIVED)}
    names = [name for name in own if name not in derived]
    tensors = [tensor for name, tensor in stored.items() if not name.endswith(DERIVED)]
    if names[0] in stored or len(names) != len(tensors):
        return dict(stored), []
    if any(tensor.is_meta for tensor in derived.values()):
        raise ValueError(
            f"timm's weights lack {next(iter(derived))}: build the model on a real device"
        )
    return {**derived, **dict(zip(names, tensors, strict=True))}, []
