"""Token features of any vision transformer: ours, timm's, Hugging Face's, DINOv2's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TOKEN_NAMES = (
    "cls_token",
    "class_token",
    "dist_token",
    "distillation_token",
    "reg_token",
    "register_tokens",
)
"""Parameters [1, tokens, dim] that libraries put before the patches."""


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Last tokens, normalised as the model does, [batch, tokens, dim].

    ``forward_features`` where the model has it (ours, timm, DINOv2's own code), else the
    ``last_hidden_state`` of a Hugging Face model. A feature map [batch, dim, height,
    width] is given as height * width tokens. Raises ``ValueError`` for other models.
    """
    forward = getattr(model, "forward_features", None)
    if forward is not None:
        return _as_tokens(forward(images), model)
    base = getattr(model, "base_model", None)
    if hasattr(model, "config") and base is not None:
        return base(pixel_values=images).last_hidden_state
    raise ValueError(
        f"{type(model).__name__} has neither forward_features nor last_hidden_state; "
        "wrap it in a module with forward_features(images) -> [batch, tokens, dim]"
    )


def as_logits(outputs: Any) -> Tensor:
    """The logits [batch, classes] of what a model returned: itself, or a Hugging Face
    output's ``logits``."""
    return outputs.logits if hasattr(outputs, "logits") else outputs


def prefix_tokens(model: nn.Module) -> int:
    """How many tokens stand before the patches: CLS, distillation, registers.

    ``num_prefix_tokens`` where the model has it (ours, timm), else counted from the
    parameters known as such tokens; 0 where there are none.
    """
    stated = getattr(model, "num_prefix_tokens", None)
    if isinstance(stated, int):
        return stated
    tokens = {
        name.rpartition(".")[2]: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in TOKEN_NAMES
    }
    return sum(parameter.shape[-2] for parameter in tokens.values())


def _as_tokens(found: object, model: nn.Module) -> Tensor:
    if isinstance(found, dict) and "x_norm_patchtokens" in found:
        parts = [found["x_norm_clstoken"][:, None], found.get("x_norm_regtokens")]
        parts = [part for part in parts if part is not None]
        return torch.cat([*parts, found["x_norm_patchtokens"]], dim=1)
    if isinstance(found, Tensor) and found.ndim == 3:
        return found
    if isinstance(found, Tensor) and found.ndim == 4:
        return found.flatten(2).transpose(1, 2)
    raise ValueError(
        f"forward_features of {type(model).__name__} gave no tensor [batch, tokens, dim] "
        f"or [batch, dim, height, width], but {type(found).__name__}"
    )
