"""`sievit codesign`, the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    DEFAULT_MODEL,
    GlobalKeys,
    Granularity,
    Groups,
    HardwareName,
    Images,
    ImageSize,
    JudgeImages,
    LatentHeads,
    LearnCrops,
    Limit,
    Model,
    PixelNormalization,
    Quiet,
    RuleName,
    Seed,
    Sparsity,
    Theta,
    Weights,
    block_shape,
    global_threshold_of,
    hardware_named,
    load_network,
    load_photos,
    normalization_named,
    weights_source,
)
from .terminal import OUT, check_writable, one_line_errors, progress_bars

if TYPE_CHECKING:
    from ..images import Photos
    from ..pipeline.settings import Settings


def codesign(
    model: Model = DEFAULT_MODEL,
    weights: Weights = None,
    images: Images = None,
    judge_images: JudgeImages = None,
    limit: Limit = 512,
    image_size: ImageSize = 224,
    normalization: PixelNormalization = "auto",
    rule: RuleName = None,
    sparsity: Sparsity = None,
    theta: Theta = None,
    granularity: Granularity = "1x1",
    global_threshold: GlobalKeys = None,
    codec: Annotated[bool, typer.Option(help="Compress Q and K over the heads.")] = True,
    latent_heads: LatentHeads = None,
    groups: Groups = 1,
    rotation: Annotated[
        bool, typer.Option(help="Rotate the heads to agree before the codec.")
    ] = True,
    steps: Annotated[int, typer.Option(help="Recovery steps; 0 for none.")] = 24,
    seconds: Annotated[
        float | None, typer.Option(help="Recovery seconds, instead of steps.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Of the recovery; default 2e-5, of few photos 1e-5."),
    ] = None,
    int8: Annotated[
        bool, typer.Option(help="Judge the result in the machine's integers too.")
    ] = True,
    codec_steps: Annotated[int, typer.Option(help="Training steps of the codec.")] = 8,
    learn_crops: LearnCrops = 64,
    judge_crops: Annotated[int, typer.Option(help="Crops that fidelity is judged on.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Crops in a batch.")] = 8,
    seed: Seed = 0,
    hardware: HardwareName = "vitcod",
    out: Annotated[Path, typer.Option(help="Folder for the report, masks and plots.")] = Path(
        "out"
    ),
    plots: Annotated[bool, typer.Option(help="Draw PNGs into the folder.")] = True,
    quiet: Quiet = False,
) -> None:
    """Sparsify a pretrained ViT, recover it, and simulate what it costs in silicon."""
    with one_line_errors(quiet):
        from ..pipeline.settings import Settings

        source = weights_source(model, weights)
        settings = Settings(
            image_size=image_size,
            normalization=normalization_named(normalization, source),
            rule=rule or Settings.rule,
            sparsity=Settings.sparsity if sparsity is None and theta is None else sparsity,
            theta=theta,
            granularity=block_shape(granularity),
            global_threshold=Settings.global_threshold
            if global_threshold is None
            else global_threshold_of(global_threshold),
            codec=codec,
            latent_heads=latent_heads,
            groups=groups,
            rotation=rotation,
            learn_crops=learn_crops,
            judge_crops=judge_crops,
            int8=int8,
            codec_steps=codec_steps,
            recovery_steps=steps,
            recovery_seconds=seconds,
            recovery_rate=rate,
            batch_size=batch_size,
            seed=seed,
        )
        _run_codesign(
            model,
            source,
            load_photos(images, judge_images, limit),
            settings,
            hardware,
            out,
            plots,
            quiet,
        )


def _run_codesign(
    model: str,
    source: str | None,
    photos: tuple[Photos, Photos] | Photos | None,
    settings: Settings,
    hardware: str,
    out: Path,
    plots: bool,
    quiet: bool,
) -> None:
    from ..pipeline.codesign import codesign as run
    from .tables import codesign_tables

    check_writable(out)
    network, saliency = load_network(model, source)
    with progress_bars(quiet) as progress:
        result = run(
            network,
            photos,
            hardware_named(hardware),
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
