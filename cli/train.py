"""`sievit train`: make a pretrained ViT sparse and train it so, for hours if need be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    DEFAULT_MODEL,
    Groups,
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
    Weights,
    load_network,
    load_photos,
    normalization_named,
    saved_mask,
    weights_source,
)
from .terminal import OUT, check_writable, one_line_errors, progress_bars

if TYPE_CHECKING:
    from ..ae import CodecErrors
    from ..images import Photos
    from ..pipeline.sparse_model import SparseModel
    from ..pipeline.train import TrainSettings
    from ..workload import AttentionMask


def train(
    images: Annotated[
        Path | None, typer.Option(help="Folder of photos. Default: scikit-image's samples.")
    ] = None,
    judge_images: JudgeImages = None,
    model: Model = DEFAULT_MODEL,
    weights: Weights = None,
    limit: Limit = 100_000,
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints, logs and the trained model.")
    ] = Path("trained"),
    mode: Annotated[
        str, typer.Option(help="mask, two-step (codec, then mask) or joint (both at once).")
    ] = "mask",
    rule: RuleName = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of entries to prune. Default: 0.9.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="Mask file to train with, say of `sievit masks`; instead of sparsity."),
    ] = None,
    latent_heads: LatentHeads = None,
    groups: Groups = 1,
    labels: Annotated[
        bool, typer.Option("--labels", help="Train on folders as classes, without a teacher.")
    ] = False,
    prefix_share: Annotated[
        float, typer.Option(help="Of the final tokens' loss, for CLS (and registers).")
    ] = 0.1,
    block_weight: Annotated[
        float, typer.Option(help="Of distilling each block's tokens beside the final ones.")
    ] = 4.0,
    attention_weight: Annotated[
        float, typer.Option(help="Of distilling attention beside them.")
    ] = 0.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each stage.")] = 200,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-5,
    batch_size: Annotated[int, typer.Option(help="Photos in a step, over all processes.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 1,
    ema: Annotated[float, typer.Option(help="Decay of a moving average; 0 for none.")] = 0.0,
    gradual: Annotated[
        bool, typer.Option("--gradual", help="Let the mask grow sparser as training goes on.")
    ] = False,
    recompute: Annotated[
        bool,
        typer.Option("--recompute", help="Recompute blocks in the backward pass."),
    ] = False,
    image_size: ImageSize = 224,
    normalization: PixelNormalization = "auto",
    learn_crops: LearnCrops = 128,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Sparsify a pretrained ViT and train it to keep its accuracy.

    Started again with the same settings, it resumes from its last checkpoint; started with
    torchrun, several processes share each batch.
    """
    with one_line_errors(quiet):
        from ..pipeline.train import TrainSettings

        if mask is not None and sparsity is not None:
            raise ValueError(
                f"give either --mask or --sparsity: a mask has its own, got {sparsity} too"
            )
        if mask is not None and rule is not None:
            raise ValueError(f"give either --mask or --rule: a mask has its own, got {rule} too")
        source = weights_source(model, weights)
        settings = TrainSettings(
            image_size=image_size,
            normalization=normalization_named(normalization, source),
            rule=rule or TrainSettings.rule,
            sparsity=TrainSettings.sparsity if sparsity is None else sparsity,
            mode=mode,
            latent_heads=latent_heads,
            groups=groups,
            labels=labels,
            prefix_share=prefix_share,
            block_weight=block_weight,
            attention_weight=attention_weight,
            steps=steps,
            batch_size=batch_size,
            accumulate=accumulate,
            learning_rate=rate,
            ema_decay=ema,
            gradual=gradual,
            recompute=recompute,
            learn_crops=learn_crops,
            checkpoint_every=checkpoint_every,
            seed=seed,
        )
        check_writable(out)
        keep = saved_mask(mask).mask
        network, _ = load_network(model, source)
        photos = load_photos(images, judge_images, limit)
        _run(network, _device(device), photos, settings, keep, out, quiet)


def _run(
    network: Any,
    device: Any,
    photos: tuple[Photos, Photos] | Photos | None,
    settings: TrainSettings,
    mask: AttentionMask | None,
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
            found = train_sparse(network, learn, settings, out, progress, mask=mask)
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
    from .tables import fidelity_table

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
