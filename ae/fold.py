"""Fold the free change of basis into a model's Q and K projections.

After it the model computes q_h A_h and (k_h - shift_h) A_h by itself, at no cost, and the
codecs carry no rotation any more. Attention is unchanged: scores differ by a constant for
each query, which softmax does not see.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models import find_attention
from ..models.running import image_size_of
from .codec import Codecs, each_codec

SEPARATE = (("query", "key"), ("q_proj", "k_proj"))


@torch.no_grad()
def fold(model: nn.Module, codecs: Codecs, image_size: int | None = None) -> None:
    """Move each codec's ``rotation`` and ``key_shift`` into ``model``'s projections, in place.

    The module that makes the attention call must hold its projections as one linear
    layer ``qkv`` (ours, timm) or as ``query`` and ``key`` or ``q_proj`` and ``k_proj``
    (Hugging Face), with a bias for the key where keys are shifted. Raises ValueError,
    naming the module, where it does not; then nothing was changed.
    """
    calls = find_attention(model, image_size_of(model, image_size))
    if len(calls) != len(codecs):
        raise ValueError(
            f"the model makes {len(calls)} calls of attention, got {len(codecs)} codecs"
        )
    modules = [model.get_submodule(call.module) for call in calls]
    for call, module in zip(calls, modules, strict=True):
        _projections(call.module, module)
    for call, module, codec in zip(calls, modules, each_codec(codecs), strict=True):
        (q_weight, q_bias), (k_weight, k_bias) = _projections(call.module, module)
        _apply(q_weight, q_bias, codec.rotation, None)
        _apply(k_weight, k_bias, codec.rotation, codec.key_shift)
        codec.rotation, codec.key_shift = None, None


Projection = tuple[Tensor, Tensor]


def _projections(name: str, module: nn.Module) -> tuple[Projection, Projection]:
    """Views (weight [heads * dim, inputs], bias) of the Q and of the K projection."""
    fused = getattr(module, "qkv", None)
    if isinstance(fused, nn.Linear) and fused.bias is not None and fused.out_features % 3 == 0:
        rows = fused.out_features // 3
        q, k = slice(0, rows), slice(rows, 2 * rows)
        return (fused.weight[q], fused.bias[q]), (fused.weight[k], fused.bias[k])
    for names in SEPARATE:
        found = [getattr(module, name, None) for name in names]
        layers = [p for p in found if isinstance(p, nn.Linear) and p.bias is not None]
        if len(layers) == len(names):
            q, k = layers
            return (q.weight, q.bias), (k.weight, k.bias)
    raise ValueError(
        f"module {name!r} holds no linear layers with bias called qkv, query and key, or "
        "q_proj and k_proj; keep the rotation inside the codec instead of folding it"
    )


def _apply(weight: Tensor, bias: Tensor, rotation: Tensor | None, shift: Tensor | None) -> None:
    """x W^T + b -> (x W^T + b - shift) A, head by head, in place."""
    if shift is not None:
        bias -= shift.flatten().to(bias)
    if rotation is not None:
        heads, dim, _ = rotation.shape
        exact = rotation.to(weight.device).double()
        rotated = torch.einsum("hij,hic->hjc", exact, weight.double().view(heads, dim, -1))
        weight.copy_(rotated.flatten(0, 1).to(weight))
        bias.copy_(torch.einsum("hij,hi->hj", exact, bias.double().view(heads, dim)).flatten())
