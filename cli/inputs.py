"""What the values of options load: networks, photos, masks, machines, energy profiles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from .options import DEFAULT_MODEL, DEFAULT_WEIGHTS

if TYPE_CHECKING:
    from ..accel import EnergyProfile, Hardware
    from ..accel.explore.grid import Configuration
    from ..images import Normalization, Photos
    from ..workload import AttentionMask, HeadCodec


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
    """What --granularity says."""
    return _pair("--granularity", "queries x keys, as 32x1", text)


def grid_shape(text: str | None) -> tuple[int, int] | None:
    """What --grid says; None where it is not given."""
    return None if text is None else _pair("--grid", "rows x columns, as 14x14", text)


def _pair(option: str, wanted: str, text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{option} is {wanted}, got {text!r}")
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
        if found is None:
            return IMAGENET
        (r, g, b), (r_std, g_std, b_std) = found
        return Normalization((r, g, b), (r_std, g_std, b_std))
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
    report = getattr(network, "load_report", None)
    left_out = () if report is None else report.left_out
    decodes = any(name.startswith(("dec.", "decoder.")) for name in left_out)
    if source is None or not decodes:
        return network, None
    decoder = SaliencyDecoder().eval()
    load_pretrained(decoder, source)
    return network, decoder


Kept = TypeVar("Kept")


class SavedMask(NamedTuple, Generic[Kept]):
    """What a mask file holds. ``codecs``, a shape a layer, is None where it says nothing of
    codecs and () where it has none."""

    mask: Kept
    codecs: tuple[HeadCodec, ...] | None = None
    image_size: int | None = None


def saved_mask(path: Path | None) -> SavedMask[AttentionMask] | SavedMask[None]:
    """A mask file's mask, and what else it holds; nothing without a file."""
    return SavedMask(None) if path is None else mask_file(path)


def mask_file(path: Path) -> SavedMask[AttentionMask]:
    """A mask file's mask, and what else it holds."""
    from ..workload import AttentionMask

    if path.suffix != ".safetensors":
        return SavedMask(AttentionMask.load(path))
    from ..pipeline.attachments import Attachments

    found = Attachments.load(path)
    if found.mask is None:
        raise ValueError(f"{path}: holds codecs, but no mask")
    return SavedMask(found.mask, found.codec_shapes, found.image_size)


def codec_shape(model: str, latent_heads: int, groups: int) -> HeadCodec:
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


def profile_named(name: str) -> EnergyProfile:
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


def hardware_named(name: str) -> Hardware:
    """A preset by its name."""
    from ..accel import presets

    if name not in presets:
        raise ValueError(f"--hardware must be one of {', '.join(presets)}, got {name!r}")
    return presets[name]


def configuration_of(
    hardware: str, texts: list[str] | None, names: tuple[str, ...]
) -> Configuration:
    """The preset ``hardware`` with what --set says, for the simulators ``names``.

    Raises ValueError for a field that is unknown, given twice or with several values, and
    for a parameter of a simulator that is not run.
    """
    from ..accel.explore.grid import configured
    from .lists import field_values

    changes: dict[str, Any] = {}
    for text in texts or []:
        joined, values = field_values(text)
        if len(values) != 1:
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
