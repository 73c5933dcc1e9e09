"""What an exploration varies in a model itself: its masks by sparsity, and its codecs.

Each variant is a workload of its own; what makes no workload (a codec that does not divide
the heads) is refused with its reason and does not stop the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..moved import old_arguments
from ..sparsify import polarize, synthetic_maps, threshold
from ..workload import (
    AttentionMask,
    GlobalThreshold,
    HeadCodec,
    PolarizedMask,
    Workload,
)

BY_CHANCE = (
    "synthetic masks (seed {seed}), shaped like ViTCoD's published ones: good for comparing "
    "machines, they say nothing about accuracy"
)

Codec = tuple[int | None, int]
"""(latent heads, groups); None: no codec."""


@dataclass(frozen=True)
class Variants:
    """Workloads by name, what each varies (for tables and plots), and what was refused."""

    workloads: Mapping[str, Workload]
    labels: Mapping[str, Mapping[str, Any]]
    refused: Mapping[str, str]


@old_arguments("min_kept")
def variants(
    dense: Workload,
    masks: Mapping[Any, AttentionMask | None],
    codecs: Sequence[Codec] = ((None, 1),),
    global_threshold: GlobalThreshold | None = None,
    axis: str = "mask",
) -> Variants:
    """``dense`` with each of ``masks`` and each of ``codecs``.

    masks  by label: a word, or a sparsity; None is dense attention
    axis   what the labels are, in tables and plots
    global_threshold  of every mask; None is each mask's own

    Calls of one head have no codec: there is nothing to compress over. Raises ValueError for
    a mask that does not fit the workload.
    """
    shapes = tuple((op.heads, op.queries, op.keys) for op in dense.attention)
    made: dict[str, Workload] = {}
    labels: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for label, mask in masks.items():
        heads = _polarized(dense, mask, shapes, global_threshold)
        for latent, groups in codecs:
            name = f"{dense.name}, {axis} {label}, {_codec_words(latent, groups)}"
            try:
                shaped = [_codec(op.heads, latent, groups) for op in dense.attention]
            except ValueError as error:
                refused[name] = str(error)
                continue
            made[name] = replace(dense.with_polarized(heads, shaped), name=name)
            labels[name] = {axis: label, "latent_heads": latent, "groups": groups}
    return Variants(made, labels, refused)


def masks_by_chance(
    dense: Workload, sparsities: Sequence[float], prefix_tokens: int, seed: int = 0
) -> dict[float, AttentionMask]:
    """Masks at several sparsities of the same `synthetic_maps`."""
    shapes = [(op.heads, op.queries, op.keys) for op in dense.attention]
    maps = synthetic_maps(shapes, prefix_tokens, seed)
    return {s: threshold(maps, sparsity=s, prefix_tokens=prefix_tokens) for s in sparsities}


def _polarized(
    dense: Workload,
    mask: AttentionMask | None,
    shapes: tuple[tuple[int, int, int], ...],
    global_threshold: GlobalThreshold | None,
) -> Sequence[tuple[PolarizedMask, ...] | None]:
    """Every head polarized once, for all codecs."""
    if mask is None:
        return [None] * len(shapes)
    if mask.shapes != shapes:
        dense.with_attention(mask)  # raises, and says which layer does not fit
    return polarize(mask, global_threshold)


def _codec(heads: int, latent_heads: int | None, groups: int) -> HeadCodec | None:
    return None if latent_heads is None or heads == 1 else HeadCodec(heads, latent_heads, groups)


def _codec_words(latent_heads: int | None, groups: int) -> str:
    if latent_heads is None:
        return "no codec"
    return f"{latent_heads} latent heads" + (f" in {groups} groups" if groups > 1 else "")
