"""Structured pruning by first-order Taylor importance (Molchanov et al., CVPR 2019, arXiv
1906.10771), as EfficientViT used it to find where width is wasted (section 2.3).

The importance of a channel is the squared change of the loss that its removal would make,
to first order: (sum over its weights of gradient times weight)^2, averaged over batches.
Heads of an attention keep equally many channels: each head's channels are ranked, and the
r-th of all heads form one unit, whose importance is their mean, that of one channel. Units
of the whole network compete; what is cut is cut from the weights, and the smaller network
runs.
"""

from __future__ import annotations

import contextlib
import copy
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models import trace
from ..models.running import evaluating
from .channels import ChannelSet, find_channels, gate_gradient, resize

Loss = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch)`` -> a scalar, with the batch as the data loader gives it."""


@dataclass(frozen=True, eq=False)
class Importance:
    """``values[i]`` is float64 [heads, units] for ``channels[i]``, over ``batches`` batches."""

    channels: tuple[ChannelSet, ...]
    values: tuple[np.ndarray, ...]
    batches: int

    def ranked(self, index: int) -> np.ndarray:
        """Channels of set ``index`` from the most important on, int64 [heads, units];
        ties in the channels' own order."""
        return np.argsort(-self.values[index], axis=1, kind="stable")

    def units(self, index: int) -> np.ndarray:
        """Importance of the units of set ``index``, falling, float64 [units]."""
        return -np.sort(-self.values[index], axis=1).mean(axis=0)


@contextlib.contextmanager
def _gradients_kept(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Every parameter wants a gradient inside; afterwards gradients and wishes are as before."""
    held = [(parameter, parameter.grad, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, grad, required in held:
            parameter.requires_grad_(required)
            parameter.grad = grad


def taylor_importance(model: nn.Module, batches: Iterable[Any], loss: Loss) -> Importance:
    """Importance of every channel set of ``model`` over ``batches``.

    loss  a task loss; the distance to the model itself has no gradient and will not do

    The model runs in eval mode; weights, gradients and mode are left as they were. Raises
    ValueError for no batches and where the loss or a gradient is not finite.
    """
    channels = find_channels(model)
    totals = [np.zeros((c.heads, c.units)) for c in channels]
    parameters = list(model.parameters())
    done = 0
    with evaluating(model), _gradients_kept(parameters):
        for batch in batches:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            loss(model, batch).backward()
            for total, place in zip(totals, channels, strict=True):
                total += gate_gradient(model, place).detach().double().square().cpu().numpy()
            done += 1
    if not done:
        raise ValueError("taylor_importance needs at least one batch, got none")
    if not all(np.isfinite(total).all() for total in totals):
        raise ValueError("the loss or its gradient is not finite")
    return Importance(channels, tuple(total / done for total in totals), done)


@dataclass(frozen=True, eq=False)
class Pruned:
    """A smaller network: ``kept[i]`` are the channels of set ``channels[i]`` that stayed,
    int64 [heads, count], rising. MACs are for one image."""

    model: nn.Module
    channels: tuple[ChannelSet, ...]
    kept: tuple[np.ndarray, ...]
    macs_before: int
    macs_after: int

    @property
    def counts(self) -> dict[str, int]:
        """Channels of one head that stayed, by set."""
        pairs = zip(self.channels, self.kept, strict=True)
        return {channels.name: kept.shape[1] for channels, kept in pairs}

    def rows(self) -> list[dict[str, object]]:
        """A row a set, in the network's order: how many channels stayed, of how many."""
        return [
            {
                "block": channels.module,
                "kind": channels.kind,
                "head": channels.index,
                "kept": kept.shape[1] * channels.heads,
                "of": channels.units * channels.heads,
                "share": kept.shape[1] / channels.units,
            }
            for channels, kept in zip(self.channels, self.kept, strict=True)
        ]


def prune(
    model: nn.Module,
    importance: Importance,
    target: float,
    *,
    multiple: int = 1,
    image_size: int | tuple[int, int] | None = None,
) -> Pruned:
    """A copy of ``model`` with its least important units cut out.

    target      MACs to reach, as a share of the model's; the network given is the largest
                at or below it
    multiple    counts a head are rounded up to a multiple of this (or keep all); at least
                one multiple stays
    image_size  for which MACs are counted; default as in `sievit.models.costs.trace`

    Raises ValueError where the target is not in (0, 1) or below what the least widths cost.
    """
    if not 0 < target < 1:
        raise ValueError(f"target must be a share of the MACs in (0, 1), got {target}")
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}")
    skeleton = Skeleton(model, image_size)
    chosen = _widths_at(target, importance, skeleton, multiple)
    kept = tuple(
        np.sort(importance.ranked(index)[:, : chosen[channels.name]], axis=1)
        for index, channels in enumerate(importance.channels)
    )
    pairs = zip(importance.channels, kept, strict=True)
    smaller = resize(model, {place.name: torch.from_numpy(stay) for place, stay in pairs})
    return Pruned(smaller, importance.channels, kept, skeleton.macs({}), skeleton.macs(chosen))


def redistribute(
    pruned: Pruned, *, multiple: int = 1, image_size: int | tuple[int, int] | None = None
) -> nn.Module:
    """The pruned network widened again, in proportion to what it kept, to its old cost.

    All counts are multiplied by the largest common factor that does not cost more MACs
    than before pruning. The network computes what the pruned one does until the channels
    that joined are trained.
    """
    skeleton = Skeleton(pruned.model, image_size)

    def counts(factor: float) -> dict[str, int]:
        return {
            name: max(count, int(count * factor) // multiple * multiple)
            for name, count in pruned.counts.items()
        }

    factors = 1 + np.arange(2048) / 256  # from 1 to 9
    over = bisect_left(factors, True, key=lambda f: skeleton.macs(counts(f)) > pruned.macs_before)
    wider = counts(factors[max(0, over - 1)])
    added = {name: wider[name] - count for name, count in pruned.counts.items()}
    return resize(pruned.model, {}, added)


def _widths_at(
    target: float, importance: Importance, skeleton: Skeleton, multiple: int
) -> dict[str, int]:
    """Channels a head by set, at the first removal that costs no more than the target."""
    order = _removal_order(importance)

    def share(removed: int) -> float:
        counts = _counts(importance.channels, order[:removed], multiple)
        return skeleton.macs(counts) / skeleton.macs({})

    if share(len(order)) > target:
        raise ValueError(
            f"target {target} is out of reach: the least widths still cost "
            f"{share(len(order)):.3f} of the MACs"
        )
    removed = bisect_left(range(len(order)), True, key=lambda n: share(n) <= target)
    return _counts(importance.channels, order[:removed], multiple)


def _removal_order(importance: Importance) -> np.ndarray:
    """The set that loses a unit, step by step, from the least important unit on."""
    units = [importance.units(index) for index in range(len(importance.channels))]
    owner = np.repeat(np.arange(len(units)), [len(values) for values in units])
    return owner[np.argsort(np.concatenate(units), kind="stable")]


def _counts(channels: tuple[ChannelSet, ...], removed: np.ndarray, multiple: int) -> dict[str, int]:
    """Channels a head that stay in each set after the units ``removed``."""
    lost = np.bincount(removed, minlength=len(channels))
    return {
        place.name: min(place.units, max(1, -(-(place.units - gone) // multiple)) * multiple)
        for place, gone in zip(channels, lost.tolist(), strict=True)
    }


class Skeleton:
    """A network without its weights, to ask what it would cost at other widths."""

    def __init__(self, model: nn.Module, image_size: int | tuple[int, int] | None) -> None:
        self.model = copy.deepcopy(model).to("meta")
        self.image_size = image_size
        self.units = {c.name: (c.heads, c.units) for c in find_channels(model)}
        self._known: dict[tuple[tuple[str, int], ...], int] = {}

    def macs(self, counts: Mapping[str, int]) -> int:
        """Traced MACs with ``counts`` channels a head in the sets that are named."""
        key = tuple(sorted(counts.items()))
        if key not in self._known:
            kept, added = {}, {}
            for name, count in counts.items():
                heads, units = self.units[name]
                kept[name] = torch.arange(min(count, units)).expand(heads, -1)
                added[name] = max(0, count - units)
            self._known[key] = trace(resize(self.model, kept, added), self.image_size).macs
        return self._known[key]
