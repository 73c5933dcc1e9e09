"""Running a model over images while hooks watch its attention: the loop that every
statistic of attention maps shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..models import AttentionCall, AttentionHook, find_attention, intercept
from ..models.feeding import images_for

Watch = Callable[[tuple[AttentionCall, ...]], Sequence[AttentionHook]]


@torch.no_grad()
def observe_attention(
    model: nn.Module,
    batches: Iterable[Tensor],
    watch: Watch,
    progress: Callable[[int], None] | None = None,
    begin: Callable[[int], None] = lambda images: None,
) -> int:
    """Run ``model`` on every batch under the hooks of ``watch``; returns the images seen.

    batches   tensors [images, channels, height, width], or (images, labels) pairs of a
              data loader; read once, one batch in memory
    watch     makes a hook a call, from the calls that the first batch's first image makes
    progress  called with the number of images done after each batch
    begin     called with the number of images of a batch before it runs

    The model runs in eval mode and is left as it was.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    handle, done = None, 0
    try:
        for batch in batches:
            images = images_for(model, batch)
            if handle is None:
                calls = find_attention(model, images[:1])
                handle = intercept(model, watch(calls), calls)
            begin(len(images))
            model(images)
            done += len(images)
            if progress is not None:
                progress(done)
    finally:
        if handle is not None:
            handle.remove()
        for module in training:
            module.training = True
    return done
