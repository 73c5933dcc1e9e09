"""A real model with the simulated machine's integer attention (`sievit.accel.integer_attention`).

Each call of softmax attention is computed in the machine's integers: Q, K and V rounded to
int8 with a scale a head, 16-bit scores, fixed-point softmax, int8 output. All else stays in
float. Decoded Q and K of codecs that were attached before are requantized like plain ones;
their latents stay in float (the functional simulation rounds them too).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..accel.kernels import Arithmetic, Int8Attention, Int8Scales, RangeWatcher
from ..models import AttentionCall, AttentionHook, Handle, find_attention, intercept
from ..models.running import evaluating, image_size_of, images_for
from ..workload import AttentionMask


@torch.no_grad()
def calibrate_int8(
    model: nn.Module,
    batches: Iterable[Tensor],
    mask: AttentionMask | None = None,
    arithmetic: Arithmetic = Arithmetic(),
    image_size: int | None = None,
) -> tuple[Int8Scales, ...]:
    """Scales of each call's Q, K, V and output, a head each, from what ``batches`` reach.

    The largest magnitude seen in float (under ``mask``) becomes the largest integer.
    Raises ValueError where there are no images, and where the mask does not fit.
    """
    calls = find_attention(model, image_size_of(model, image_size))
    watchers = [RangeWatcher(keep) for keep in _keeps(mask, calls)]
    hooks = [AttentionHook(kernel=w) for w in watchers]
    with evaluating(model), intercept(model, hooks, calls):
        for batch in batches:
            model(images_for(model, batch))
    return tuple(watcher.scales(arithmetic) for watcher in watchers)


def attach_int8(
    model: nn.Module,
    mask: AttentionMask | None,
    scales: Sequence[Int8Scales],
    arithmetic: Arithmetic = Arithmetic(),
    image_size: int | None = None,
) -> Handle:
    """Make every attention call of ``model`` compute as the machine does; None: all is kept.

    ``scales``: one a call, of `calibrate_int8`. No gradient flows. Returns a handle whose
    ``remove()`` restores the model. Raises ValueError where layers or heads do not fit; a
    forward raises it where tokens do not, and where a call writes its softmax out or
    something else acts on it.
    """
    calls = find_attention(model, image_size_of(model, image_size))
    keeps = _keeps(mask, calls)
    if len(scales) != len(calls):
        raise ValueError(
            f"the model makes {len(calls)} calls of attention, got scales for {len(scales)}"
        )
    for layer, (call, scale) in enumerate(zip(calls, scales, strict=True)):
        if scale.q.shape != (call.heads,):
            raise ValueError(
                f"attention layer {layer} has {call.heads} heads, its scales {len(scale.q)}"
            )
    kernels = [Int8Attention(k, s, arithmetic) for k, s in zip(keeps, scales, strict=True)]
    return intercept(model, [AttentionHook(kernel=kernel) for kernel in kernels], calls)


def _keeps(mask: AttentionMask | None, calls: Sequence[AttentionCall]) -> list[Tensor | None]:
    if mask is None:
        return [None] * len(calls)
    got, wanted = [len(layer) for layer in mask.keep], [call.heads for call in calls]
    if got != wanted:
        raise ValueError(
            f"the model's calls of attention have {wanted} heads, the mask's layers {got}"
        )
    return [torch.from_numpy(layer.copy()) for layer in mask.keep]
