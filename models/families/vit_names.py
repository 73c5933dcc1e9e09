"""Names of a plain vision transformer's tensors, from every release known to our own.

Ours are timm's. Known: the official DeiT and DINOv2 releases (timm's names but for the
registers), Hugging Face ViT, DeiT and DINOv2 of transformers 4 and 5 with or without the
model's prefix, ONNX graphs exported from those, and short names with q, k and v apart. The
vocabularies do not collide, so one table serves them all; a name that it does not know
stays as it is and is then reported as unexpected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from .layers import resize_positions


class PlainViT(Protocol):
    """What names and shapes depend on in a `sievit.models.families.vit.ViT`."""

    dim: int
    grid_size: tuple[int, int]
    position_prefix: int

    @property
    def head(self) -> nn.Module | None: ...


PREFIX = re.compile(r"^(vit|deit|dinov2|dinov2_with_registers|backbone)\.")

RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^(?:embeddings\.)?cls(?:_token)?$", "cls_token"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^(?:embeddings\.)?register_tokens$", "reg_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.Concat_\d+$", "pos_cls"),
        (r"^embeddings\.Reshape_\d+$", "pos_patch"),
        (r"^(?:embeddings\.patch_embeddings\.projection|patch)\.(\w+)$", r"patch_embed.proj.\1"),
        (r"^(?:encoder\.layer|layers)\.", "blocks."),
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # blocks stored in chunks
        (r"^(blocks\.\d+)\.attention\.attention\.([qkv])(?:uery|ey|alue)\.", r"\1.\2."),
        (r"^(blocks\.\d+)\.attention\.([qkv])_proj\.", r"\1.\2."),
        (r"^(blocks\.\d+)\.(?:attention\.output\.dense|attention\.o_proj|o)\.", r"\1.attn.proj."),
        (r"^(blocks\.\d+)\.(?:layernorm_before|n1)\.", r"\1.norm1."),
        (r"^(blocks\.\d+)\.(?:layernorm_after|n2)\.", r"\1.norm2."),
        (r"^(blocks\.\d+)\.(?:intermediate\.dense|fc1)\.", r"\1.mlp.fc1."),
        (r"^(blocks\.\d+)\.(?:output\.dense|fc2)\.", r"\1.mlp.fc2."),
        (r"^(blocks\.\d+)\.(?:layer_scale|ls)([12])(?:\.lambda1)?$", r"\1.ls\2.gamma"),
        (r"^layernorm\.", "norm."),
        (r"^(?:cls_)?classifier\.", "head."),
        (r"^distillation_classifier\.", "head_dist."),
    )
)

ELSEWHERE = re.compile(r"^(dec|decoder|pooler)\.|^(embeddings\.)?mask_token$")
"""A saliency decoder, a pooler behind the tokens, the token of masked training."""


def to_vit_names(
    state: Mapping[str, Tensor], model: PlainViT
) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` under the names and in the shapes of ``model``; and the names left out.

    q, k and v are fused; the position grid is resampled to the model's; heads are left out
    where the model has none.
    """
    tensors: dict[str, Tensor] = {}
    left_out = []
    for stored, tensor in state.items():
        name = _renamed(stored)
        headless = model.head is None and name.startswith(("head.", "head_dist."))
        if ELSEWHERE.match(name) or headless:
            left_out.append(stored)
        else:
            tensors[name] = tensor
    _fuse_qkv(tensors)
    _join_positions(tensors)
    _fit_positions(tensors, model)
    return tensors, left_out


def _renamed(name: str) -> str:
    name = PREFIX.sub("", name)
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _fuse_qkv(tensors: dict[str, Tensor]) -> None:
    """blocks.N.{q,k,v}.KIND -> blocks.N.attn.qkv.KIND, rows in that order."""
    for name in [name for name in tensors if re.match(r"blocks\.\d+\.q\.", name)]:
        block, _, kind = name.rsplit(".", 2)
        parts = [f"{block}.{part}.{kind}" for part in "qkv"]
        if all(part in tensors for part in parts):
            tensors[f"{block}.attn.qkv.{kind}"] = torch.cat([tensors.pop(part) for part in parts])


def _join_positions(tensors: dict[str, Tensor]) -> None:
    if "pos_cls" in tensors and "pos_patch" in tensors:
        parts = [tensors.pop("pos_cls"), tensors.pop("pos_patch")]
        tensors["pos_embed"] = torch.cat(parts, dim=1)


def _fit_positions(tensors: dict[str, Tensor], model: PlainViT) -> None:
    """Resample the grid; add CLS's position to its token, or zeros, as the model stores it.

    A stored grid is square; what is left over are positions of prefix tokens (at most 2,
    so the split is unique). Anything else is left for the shape check to report.
    """
    stored = tensors.get("pos_embed")
    if stored is None or stored.ndim != 3 or stored.shape[2] != model.dim:
        return
    side = math.isqrt(stored.shape[1])
    prefix, patches = stored.tensor_split([stored.shape[1] - side * side], dim=1)
    token = tensors.get("cls_token")
    if model.position_prefix == 0 and prefix.shape[1] == 1 and token is not None:
        tensors["cls_token"] = token + prefix
        prefix = prefix[:, :0]
    elif prefix.shape[1] == 0:
        prefix = stored.new_zeros(1, model.position_prefix, model.dim)
    patches = resize_positions(patches, (side, side), model.grid_size)
    tensors["pos_embed"] = torch.cat([prefix, patches], dim=1)
