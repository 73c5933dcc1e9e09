"""Running a model over images while hooks watch its attention: the loop that every
statistic of attention maps shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..running import evaluating, images_for
from .calls import AttentionCall, find_attention
from .intercept import AttentionHook, intercept

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
    done = 0
    with evaluating(model), ExitStack() as hooked:
        for batch in batches:
            images = images_for(model, batch)
            if not done:
                calls = find_attention(model, images[:1])
                hooked.enter_context(intercept(model, watch(calls), calls))
            begin(len(images))
            model(images)
            done += len(images)
            if progress is not None:
                progress(done)
    return done
