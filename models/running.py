"""Running a model as it is: on its own device, in eval mode, and left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode inside the block; afterwards every submodule is in the mode that it
    was in, whichever mode its parent is in."""
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def image_size_of(model: nn.Module, given: int | None = None) -> int:
    """Pixels of a side that ``model`` is run at: ``given``, else the model's own, else 224."""
    return given or getattr(model, "image_size", None) or 224


def moved(batch: Any, device: torch.device) -> Any:
    """``batch``, a tensor or a tuple or list of them, on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return tuple(moved(part, device) for part in batch)


def images_for(model: nn.Module, batch: Any) -> Tensor:
    """The images of ``batch``, itself or its first entry, where ``model`` has its parameters."""
    images = batch if isinstance(batch, Tensor) else batch[0]
    first = next(model.parameters(), None)
    return images if first is None else moved(images, first.device)
