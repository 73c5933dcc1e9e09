"""`sievit codesign`, the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from . import options as o
from .inputs import (
    hardware_named,
    load_network,
    load_photos,
    normalization_named,
    weights_source,
)
from .settings import FROM_SETTINGS, pipeline_settings, values_of
from .terminal import OUT, check_writable, one_line_errors, progress_bars

if TYPE_CHECKING:
    from ..accel import Hardware
    from ..images import Photos
    from ..pipeline.settings import Settings


def codesign(
    ctx: typer.Context,
    model: o.Model = o.DEFAULT_MODEL,
    weights: o.Weights = None,
    images: o.Images = None,
    judge_images: o.JudgeImages = None,
    limit: o.Limit = 512,
    image_size: o.ImageSize = FROM_SETTINGS,
    normalization: o.PixelNormalization = "auto",
    rule: o.RuleName = FROM_SETTINGS,
    sparsity: o.Sparsity = FROM_SETTINGS,
    theta: o.Theta = FROM_SETTINGS,
    cycles: o.Cycles = FROM_SETTINGS,
    tile_entries: o.TileEntries = FROM_SETTINGS,
    tile: o.Tile = FROM_SETTINGS,
    granularity: o.Granularity = FROM_SETTINGS,
    grid: o.Grid = FROM_SETTINGS,
    global_threshold: o.MaskGlobalKeys = FROM_SETTINGS,
    codec: o.Codec = FROM_SETTINGS,
    latent_heads: o.LatentHeads = FROM_SETTINGS,
    groups: o.Groups = FROM_SETTINGS,
    rotation: o.Rotation = FROM_SETTINGS,
    recovery_steps: o.RecoverySteps = FROM_SETTINGS,
    recovery_seconds: o.RecoverySeconds = FROM_SETTINGS,
    recovery_rate: o.RecoveryRate = FROM_SETTINGS,
    int8: o.Int8 = FROM_SETTINGS,
    codec_steps: o.CodecSteps = FROM_SETTINGS,
    learn_crops: o.LearnCrops = FROM_SETTINGS,
    judge_crops: o.JudgeCrops = FROM_SETTINGS,
    batch_size: o.BatchSize = FROM_SETTINGS,
    seed: o.Seed = FROM_SETTINGS,
    hardware: o.HardwareName = "vitcod",
    out: o.OutFolder = Path("out"),
    plots: o.Plots = True,
    quiet: o.Quiet = False,
) -> None:
    """Sparsify a pretrained ViT, recover it, and simulate what it costs in silicon."""
    with one_line_errors(quiet):
        source, made = weights_source(model, weights), pipeline_settings()
        values = values_of(ctx, made)
        values["normalization"] = normalization_named(normalization, source)
        photos = load_photos(images, judge_images, limit)
        machine = hardware_named(hardware)
        _run(model, source, photos, made(**values), machine, out, plots, quiet)


def _run(
    model: str,
    source: str | None,
    photos: tuple[Photos, Photos] | Photos | None,
    settings: Settings,
    hardware: Hardware,
    out: Path,
    plots: bool,
    quiet: bool,
) -> None:
    from ..pipeline.codesign import codesign as run
    from .tables.codesign import codesign_tables

    check_writable(out)
    network, saliency = load_network(model, source)
    with progress_bars(quiet) as progress:
        result = run(
            network,
            photos,
            hardware,
            settings,
            name=model,
            saliency=saliency,
            progress=progress,
        )
        progress("writing files", 0.0)
        paths = result.save(out, plots)
        progress("writing files", 1.0)
    if not quiet:
        OUT.print(codesign_tables(result))
        OUT.print(f"Written: {', '.join(p.name for p in paths)} in {out}/", highlight=False)
