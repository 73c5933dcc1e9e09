"""The Q/K auto-encoder over attention heads (ViTCoD, HPCA 2023, section V).

Q and K of a layer are [batch, heads, tokens, key_dim]. The codec mixes heads alone: each
(token, dim) vector of ``heads`` numbers goes to ``latent_heads`` numbers and back, with
biases, no nonlinearity, and its own weights for Q, for K and for each layer.

Two changes of basis are free, because softmax attention does not see them: a rotation
A_h of a head's dims in both Q and K, and a vector added to every key of a head (it adds
the same number to all scores of a query). `QKCodec` can carry both; `closed_form`
finds them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..moved import old_arguments
from ..workload import HeadCodec


class HeadLinear(nn.Module):
    """A linear map over the heads axis; block-diagonal for ``groups`` > 1.

    ``weight`` [out_heads, in_heads / groups], as a grouped 1 x 1 convolution's, so that
    with one group it is that of ``nn.Linear(in_heads, out_heads)``.
    """

    def __init__(self, in_heads: int, out_heads: int, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_heads, in_heads // groups))
        self.bias = nn.Parameter(torch.zeros(out_heads))
        nn.init.uniform_(self.weight, -1 / math.sqrt(in_heads), 1 / math.sqrt(in_heads))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_heads, tokens, dim] -> [batch, out_heads, tokens, dim]."""
        blocks = x.unflatten(1, (self.groups, -1))
        weight = self.weight.unflatten(0, (self.groups, -1))
        mixed = torch.einsum("goi,bgind->bgond", weight.to(x.dtype), blocks)
        return mixed.flatten(1, 2) + self.bias.to(x.dtype).view(1, -1, 1, 1)


@old_arguments("turn")
class QKCodec(nn.Module):
    """One layer's codec: encoder and decoder for Q, encoder and decoder for K.

    ``rotation`` [heads, key_dim, key_dim] and ``key_shift`` [heads, key_dim] are the free
    change of basis, applied before encoding: q_h A_h and (k_h - shift_h) A_h with
    orthogonal A_h. None leaves the basis as it is. They are buffers, not parameters: in
    a deployed model they are folded into the projections (`fold`).
    """

    rotation: Tensor | None
    key_shift: Tensor | None

    def __init__(self, shape: HeadCodec) -> None:
        super().__init__()
        self.shape = shape
        ends = (shape.heads, shape.latent_heads, shape.groups)
        back = (shape.latent_heads, shape.heads, shape.groups)
        self.encoder_q, self.decoder_q = HeadLinear(*ends), HeadLinear(*back)
        self.encoder_k, self.decoder_k = HeadLinear(*ends), HeadLinear(*back)
        self.register_buffer("rotation", None)
        self.register_buffer("key_shift", None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        """Takes a change of basis that this codec had not; earlier versions stored ``turn``."""
        if f"{prefix}turn" in state_dict:
            state_dict[f"{prefix}rotation"] = state_dict.pop(f"{prefix}turn")
        for name in ("rotation", "key_shift"):
            stored = state_dict.get(prefix + name)
            if stored is not None and getattr(self, name) is None:
                setattr(self, name, torch.empty_like(stored))
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    def in_basis(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Q and K in the codec's basis; scores then differ by a constant a query."""
        if self.key_shift is not None:
            k = k - self.key_shift.to(k.dtype).unsqueeze(1)
        if self.rotation is not None:
            q, k = q @ self.rotation.to(q.dtype), k @ self.rotation.to(k.dtype)
        return q, k

    def coded(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Encode and decode Q and K that are in the codec's basis."""
        return self.decoder_q(self.encoder_q(q)), self.decoder_k(self.encoder_k(k))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Q and K as decoded after compression, in the codec's basis."""
        return self.coded(*self.in_basis(q, k))


Codecs = Sequence[QKCodec] | nn.ModuleList
"""One codec a layer, as a sequence or as the module that holds them."""


def each_codec(codecs: Codecs) -> list[QKCodec]:
    """The codecs of a sequence or module, in order. Raises TypeError for any other module."""
    found = []
    for layer, codec in enumerate(codecs):
        if not isinstance(codec, QKCodec):
            raise TypeError(f"layer {layer} needs a QKCodec, got {type(codec).__name__}")
        found.append(codec)
    return found


def latent_heads_for(heads: int) -> int:
    """The paper's choice: half the heads, rounded up (12 -> 6, 6 -> 3, 3 -> 2)."""
    return (heads + 1) // 2
