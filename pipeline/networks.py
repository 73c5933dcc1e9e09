"""Registered networks as operations, with masks and codecs, on simulated machines.

Beside `pipeline`, which changes a model and judges it: nothing is learned from photos here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..accel import Hardware, Report, presets, simulate
from ..accel.kernels import deform_core
from ..accel.simulate import simulate_silently
from ..ae import latent_heads_for
from ..models import create, create_for, prefix_tokens, trace
from ..models.families.dcn import DeformSampling
from ..models.running import image_size_of
from ..moved import old_arguments, old_names
from ..sparsify import polarize, synthetic_maps, threshold
from ..workload import AttentionMask, GlobalThreshold, HeadCodec, Workload
from .settings import ALL

__getattr__ = old_names(__name__)


@old_arguments("min_kept")
def attention_cycles(
    workload: Workload,
    hardware: Hardware = presets["vitcod"],
    global_threshold: GlobalThreshold = ALL,
) -> Callable[[AttentionMask], float]:
    """What a mask costs in ``workload``: cycles of its attention, without codec."""

    def cost(mask: AttentionMask) -> float:
        polarized = polarize(mask, global_threshold)
        sparse = workload.with_polarized(polarized, [None] * len(polarized))
        report = simulate_silently(sparse, hardware, simulator="vitcod_no_codec")
        return float(report.attention_cycles)

    return cost


def create_to_run(name: str, pretrained: str | None = None, **overrides: Any) -> nn.Module:
    """`create`, for a network that will run: InternImage and its like get the compiled
    deformable operator as their core, unless ``core`` is given."""
    model = create(name, pretrained, **overrides)
    return model if "core" in overrides else with_compiled_core(model)


def with_compiled_core(model: nn.Module) -> nn.Module:
    """``model`` itself, its deformable sampling by the compiled operator from now on."""
    for module in model.modules():
        if isinstance(module, DeformSampling):
            module.core = deform_core
    return model


@old_arguments("min_kept")
def model_workload(
    name: str,
    mask: AttentionMask | None = None,
    codec: HeadCodec | Sequence[HeadCodec | None] | None = None,
    *,
    image_size: int | None = None,
    global_threshold: GlobalThreshold | None = None,
) -> Workload:
    """A registered model as operations, dense or with ``mask`` and ``codec`` (one for all
    layers, or one a layer).

    ``image_size`` None is the model's own; a mask's tokens must fit it. ``global_threshold``
    None is the mask's own.
    """
    model = create_for(name, image_size)
    workload = trace(model, image_size_of(model, image_size))
    return workload.with_attention(mask, codec, global_threshold)


@old_arguments("min_kept")
def sparse_workload(
    name: str,
    mask: AttentionMask | float,
    *,
    latent_heads: int | None = None,
    groups: int = 1,
    codecs: Sequence[HeadCodec | None] | None = None,
    image_size: int | None = None,
    global_threshold: GlobalThreshold | None = None,
    seed: int = 0,
) -> tuple[Workload, str]:
    """A registered model with a mask and a codec, and a sentence that says which.

    mask          a number is the sparsity of a synthetic mask (`synthetic_maps`)
    latent_heads  None is half a layer's heads, rounded up, as ViTCoD has it; 0 is no codec
    codecs        one a layer, in place of ``latent_heads`` and ``groups``; () is no codec
    """
    model = create_for(name, image_size)
    dense = trace(model, image_size_of(model, image_size))
    if not dense.attention:
        raise ValueError(f"{name} has no attention that a mask could prune")
    origin = "the mask given"
    if not isinstance(mask, AttentionMask):
        prefix = prefix_tokens(model)
        shapes = [(op.heads, op.queries, op.keys) for op in dense.attention]
        maps = synthetic_maps(shapes, prefix, seed)
        mask = threshold(maps, sparsity=mask, prefix_tokens=prefix)
        origin = (
            f"a synthetic mask (seed {seed}), shaped like ViTCoD's published ones: enough to "
            "compare machines, without a statement about accuracy"
        )
    if codecs is None:
        codecs = [_codec_for(op.heads, latent_heads, groups) for op in dense.attention]
    elif not codecs:
        codecs = [None] * len(dense.attention)
    shapes = dict.fromkeys(f"{c.heads} -> {c.latent_heads} heads" for c in codecs if c)
    coded = f"codec {', '.join(shapes)}" if shapes else "no codec"
    about = f"{name}, {mask.sparsity:.1%} of attention pruned by {origin}; {coded}."
    return dense.with_attention(mask, codecs, global_threshold), about


def _codec_for(heads: int, latent_heads: int | None, groups: int) -> HeadCodec | None:
    """None for a single head, which has nothing to be compressed over."""
    if latent_heads == 0 or heads == 1:
        return None
    return HeadCodec(
        heads, latent_heads_for(heads) if latent_heads is None else latent_heads, groups
    )


@old_arguments("min_kept")
def simulate_model(
    name: str,
    mask: AttentionMask | None = None,
    codec: HeadCodec | None = None,
    *,
    image_size: int | None = None,
    global_threshold: GlobalThreshold | None = None,
    hardware: Hardware = presets["vitcod"],
    simulators: tuple[str, ...] = ("systolic", "vitcod"),
    batch: int = 1,
) -> dict[str, Report]:
    """`model_workload` on each of ``simulators``."""
    workload = model_workload(
        name, mask, codec, image_size=image_size, global_threshold=global_threshold
    )
    return {s: simulate(workload, hardware, simulator=s, batch=batch) for s in simulators}
