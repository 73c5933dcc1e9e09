"""Put codecs into a model, and fit them to it.

`attach_codec` intercepts each attention call, as masks do, so that scores are computed
from decoded Q and K. Nothing of the model changes, until `fold` moves the free rotation of
the heads into its Q and K projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models import AttentionCall, AttentionHook, Handle, find_attention, intercept
from ..models.attention.observe import observe_attention
from ..models.running import image_size_of
from ..moved import old_arguments
from ..workload import HeadCodec
from .closed_form import ExplainedVariance, HeadMoments, fit_closed_form
from .codec import Codecs, QKCodec, each_codec, latent_heads_for

Pair = tuple[Tensor, Tensor]
Watcher = Callable[[int, Pair, Pair], None]
"""Called in each forward of a layer: its number, (Q, K) in the codec's basis, plain and decoded."""


class _Coded(AttentionHook):
    """Replaces Q and K of one call by their decoded selves."""

    def __init__(self, layer: int, codec: QKCodec, watcher: Watcher | None) -> None:
        self.layer = layer
        self.codec = codec
        self.watcher = watcher

    def transform(self, q: Tensor, k: Tensor) -> Pair:
        heads = self.codec.shape.heads
        if q.shape[1] != heads:
            raise ValueError(
                f"attention layer {self.layer} has {q.shape[1]} heads, its codec {heads}"
            )
        plain = self.codec.in_basis(q, k)
        coded = self.codec.coded(*plain)
        if self.watcher is not None:
            self.watcher(self.layer, plain, coded)
        return coded


def attach_codec(
    model: nn.Module,
    codecs: Codecs,
    image_size: int | None = None,
    watcher: Watcher | None = None,
) -> Handle:
    """Make every attention call of ``model`` use Q and K decoded by ``codecs[call]``.

    ``watcher`` sees each layer's plain and decoded pair in every forward. Returns a
    handle whose ``remove()`` restores the model. The codecs' parameters stay their own:
    they are trained through the model, but are not in its state dict. They move to the
    model's device.
    """
    layers = each_codec(codecs)
    calls = find_attention(model, image_size_of(model, image_size))
    if len(calls) != len(codecs):
        raise ValueError(
            f"the model makes {len(calls)} calls of attention, got {len(codecs)} codecs"
        )
    first = next(model.parameters(), None)
    for codec in layers:
        codec.to(None if first is None else first.device)
    hooks = [_Coded(layer, codec, watcher) for layer, codec in enumerate(layers)]
    return intercept(model, hooks, calls)


class _Moments(AttentionHook):
    """Adds up the second moments of one call's Q and K."""

    def __init__(self) -> None:
        self.q: HeadMoments | None = None
        self.k: HeadMoments | None = None

    def transform(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        new_q, new_k = HeadMoments.of(q), HeadMoments.of(k)
        self.q = new_q if self.q is None else self.q + new_q
        self.k = new_k if self.k is None else self.k + new_k
        return q, k

    @property
    def pair(self) -> tuple[HeadMoments, HeadMoments]:
        if self.q is None or self.k is None:
            raise RuntimeError("this call of attention was not made in any forward")
        return self.q, self.k


@torch.no_grad()
def head_moments(
    model: nn.Module, batches: Iterable[Tensor]
) -> tuple[tuple[HeadMoments, HeadMoments], ...]:
    """Second moments between heads of Q and of K, one pair a layer, over all batches."""
    hooks: list[_Moments] = []

    def watch(calls: Sequence[AttentionCall]) -> Sequence[_Moments]:
        hooks.extend(_Moments() for _ in calls)
        return hooks

    observe_attention(model, batches, watch)
    if not hooks:
        raise ValueError("a codec is fitted to images, got none")
    return tuple(hook.pair for hook in hooks)


@dataclass(frozen=True, eq=False)
class FittedCodecs:
    """Closed-form codecs, one a layer, with the variance over heads that each keeps."""

    codecs: nn.ModuleList
    explained: tuple[ExplainedVariance, ...]

    @property
    def shapes(self) -> tuple[HeadCodec, ...]:
        return tuple(codec.shape for codec in each_codec(self.codecs))


@old_arguments("turn")
def fit_codecs(
    moments: Sequence[tuple[HeadMoments, HeadMoments]],
    latent_heads: Callable[[int], int] | Sequence[int] | int | None = None,
    groups: int = 1,
    rotation: bool = True,
    progress: Callable[[int], None] | None = None,
) -> FittedCodecs:
    """Codecs in closed form from `head_moments`.

    latent_heads  total over the groups, a number for all layers, one for each
                  (`latent_heads_by_layer`) or a function of a layer's heads; None is the
                  paper's half, rounded up
    rotation      make the free change of basis first (see `closed_form`)
    progress      called with the number of layers done
    """
    codecs, explained = nn.ModuleList(), []
    latents = _latents(latent_heads, [len(q.first) for q, _ in moments])
    for layer, ((q, k), latent) in enumerate(zip(moments, latents, strict=True)):
        codec, kept = fit_closed_form(q, k, HeadCodec(len(q.first), latent, groups), rotation)
        codecs.append(codec)
        explained.append(kept)
        if progress is not None:
            progress(layer + 1)
    return FittedCodecs(codecs, tuple(explained))


def _latents(
    latent_heads: Callable[[int], int] | Sequence[int] | int | None, heads: Sequence[int]
) -> list[int]:
    """Latent heads of each layer."""
    choose = latent_heads_for if latent_heads is None else latent_heads
    if callable(choose):
        return [choose(count) for count in heads]
    if not isinstance(choose, Sequence):
        return [choose] * len(heads)
    if len(choose) != len(heads):
        raise ValueError(f"latent_heads has {len(choose)} numbers, the model {len(heads)} layers")
    return list(choose)
