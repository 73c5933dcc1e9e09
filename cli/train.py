"""`sievit train`: make a pretrained ViT sparse and train it so, for hours if need be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import options as o
from .inputs import (
    hardware_named,
    load_network,
    load_photos,
    normalization_named,
    saved_mask,
    weights_source,
)
from .settings import FROM_SETTINGS, check_hardware, flag, given, train_settings, values_of
from .terminal import OUT, check_writable, one_line_errors, progress_bars

if TYPE_CHECKING:
    from ..accel import Hardware
    from ..ae import CodecErrors
    from ..images import Photos
    from ..pipeline.sparse_model import SparseModel
    from ..pipeline.train import TrainSettings
    from ..workload import AttentionMask


def train(
    ctx: typer.Context,
    images: o.Images = None,
    judge_images: o.JudgeImages = None,
    model: o.Model = o.DEFAULT_MODEL,
    weights: o.Weights = None,
    limit: o.Limit = 100_000,
    out: o.TrainedFolder = Path("trained"),
    mode: o.Mode = FROM_SETTINGS,
    rule: o.RuleName = FROM_SETTINGS,
    sparsity: o.Sparsity = FROM_SETTINGS,
    theta: o.Theta = FROM_SETTINGS,
    cycles: o.Cycles = FROM_SETTINGS,
    tile_entries: o.TileEntries = FROM_SETTINGS,
    tile: o.Tile = FROM_SETTINGS,
    granularity: o.Granularity = FROM_SETTINGS,
    grid: o.Grid = FROM_SETTINGS,
    global_threshold: o.MaskGlobalKeys = FROM_SETTINGS,
    hardware: o.BudgetHardware = "vitcod",
    mask: o.TrainedMask = None,
    latent_heads: o.LatentHeads = FROM_SETTINGS,
    groups: o.Groups = FROM_SETTINGS,
    rotation: o.Rotation = FROM_SETTINGS,
    labels: o.Labels = FROM_SETTINGS,
    prefix_share: o.PrefixShare = FROM_SETTINGS,
    block_weight: o.BlockWeight = FROM_SETTINGS,
    attention_weight: o.AttentionWeight = FROM_SETTINGS,
    steps: o.Steps = FROM_SETTINGS,
    learning_rate: o.LearningRate = FROM_SETTINGS,
    batch_size: o.TrainBatch = FROM_SETTINGS,
    accumulate: o.Accumulate = FROM_SETTINGS,
    ema_decay: o.EmaDecay = FROM_SETTINGS,
    gradual: o.Gradual = FROM_SETTINGS,
    recompute: o.Recompute = FROM_SETTINGS,
    image_size: o.ImageSize = FROM_SETTINGS,
    normalization: o.PixelNormalization = "auto",
    learn_crops: o.LearnCrops = FROM_SETTINGS,
    checkpoint_every: o.CheckpointEvery = FROM_SETTINGS,
    device: o.Device = "auto",
    seed: o.Seed = FROM_SETTINGS,
    quiet: o.Quiet = False,
) -> None:
    """Sparsify a pretrained ViT and train it to keep its accuracy.

    Started again with the same settings, it resumes from its last checkpoint; started with
    torchrun, several processes share each batch.
    """
    with one_line_errors(quiet):
        if mask is not None and (said := given(ctx)):
            name, value = next(iter(said.items()))
            raise ValueError(
                f"give either --mask or {flag(name)}: a mask has its own, got {value} too"
            )
        source, made = weights_source(model, weights), train_settings()
        values = values_of(ctx, made)
        check_hardware(ctx)
        values["normalization"] = normalization_named(normalization, source)
        settings, machine = made(**values), hardware_named(hardware)
        check_writable(out)
        keep = saved_mask(mask).mask
        network, _ = load_network(model, source)
        photos = load_photos(images, judge_images, limit)
        _run(network, _device(device), photos, settings, keep, machine, out, quiet)


def _run(
    network: Any,
    device: Any,
    photos: tuple[Photos, Photos] | Photos | None,
    settings: TrainSettings,
    mask: AttentionMask | None,
    hardware: Hardware,
    out: Path,
    quiet: bool,
) -> None:
    from ..images import photo_sets
    from ..models.training.processes import joined, rank
    from ..pipeline.train import train_sparse

    learn, judged = photo_sets(photos)
    with joined(device):
        network.to(device)
        first = rank() == 0
        with progress_bars(quiet or not first) as progress:
            found = train_sparse(
                network, learn, settings, out, progress, mask=mask, hardware=hardware
            )
            if not first:
                return
            rows = found.evaluate(network, judged, progress, learned_from=learn)
            errors = found.codec_errors(judged)
        paths = found.save(out, rows, errors)
    if not quiet:
        _report(found, rows, errors)
        OUT.print(f"Written: {', '.join(p.name for p in paths)} in {out}/", highlight=False)


def _report(found: SparseModel, rows: dict[str, Any], errors: Sequence[CodecErrors]) -> None:
    from ..ae import mean_errors
    from .tables.codesign import fidelity_table

    for stage, log in found.logs.items():
        resumed = f", resumed at {log.resumed_at}" if log.resumed_at else ""
        OUT.print(
            f"{stage}: {len(log.losses)} steps{resumed}, loss {log.losses[0]:.4f} -> "
            f"{log.losses[-1]:.4f}",
            highlight=False,
        )
    OUT.print(fidelity_table(rows))
    if errors:
        worst = max(range(len(errors)), key=lambda layer: errors[layer].attention)
        mean = mean_errors(errors)
        OUT.print(
            f"Codec under the mask, mean of the layers: error Q {mean.q:.3f}, K {mean.k:.3f}, "
            f"attention moved {mean.attention:.2f} (most in layer {worst}, "
            f"{errors[worst].attention:.2f})",
            highlight=False,
        )


def _device(name: str) -> Any:
    import torch

    from ..models.training.processes import own_device

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return own_device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or auto, got {name!r}") from None
