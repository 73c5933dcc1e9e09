"""Put a fixed mask into a model, and take it out again.

The model's source, parameters and state-dict keys do not change: each call of softmax
attention is intercepted (`sievit.models.attention.intercept`) and pruned entries get no weight.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from ..accel.kernels import AttentionPlan, plan_layers, sparse_attention
from ..models import AttentionCall, AttentionHook, Handle, find_attention, intercept
from ..models.running import image_size_of
from ..workload import AttentionMask

BACKENDS = ("auto", "dense")


class _Masked(AttentionHook):
    """Keeps only the mask's entries of one call; with a plan, by `sparse_attention`."""

    def __init__(self, layer: int, keep: Tensor, plan: AttentionPlan | None = None) -> None:
        self.layer = layer
        self.keep = self.mask = keep
        self.shape = tuple(keep.shape)
        self.kernel = None if plan is None else _Sparse(plan)

    def transform(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        got = (q.shape[1], q.shape[2], k.shape[2])
        if got != self.shape:
            raise ValueError(
                f"attention layer {self.layer} has (heads, queries, keys) = {got}, "
                f"the mask is for {self.shape}: was it learned at another image size?"
            )
        self.keep = self.mask = self.mask.to(q.device)
        return q, k


class _Sparse:
    """The kernel of one call, its plan moved along with the tensors."""

    def __init__(self, plan: AttentionPlan) -> None:
        self.plan = plan

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.plan.device != q.device:
            self.plan = self.plan.to(q.device)
        return sparse_attention(q, k, v, self.plan, scale)


def attach(
    model: nn.Module,
    mask: AttentionMask,
    backend: str = "auto",
    image_size: int | None = None,
) -> Handle:
    """Make ``model`` compute only the entries that ``mask`` keeps, in every forward.

    backend     "dense": dense attention with the pruned entries set to -inf before
                softmax; "auto": `sievit.accel.kernels.sparse_attention`, which computes the
                kept entries alone where that is faster. Where a model writes its softmax
                out, or something else acts on the same call, it is dense all the same.
                Both are differentiable and give the same up to rounding
    image_size  the size the mask was learned at, where the model itself does not say

    Returns a handle; ``handle.remove()`` (or leaving a ``with``) restores the model.
    Raises ValueError where layers, heads or tokens do not fit. A query that keeps no key
    gets 0 from its head; a warning says where, since a learned mask has none.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    calls = find_attention(model, image_size or _image_size(model))
    if len(calls) != len(mask.keep):
        raise ValueError(
            f"the model makes {len(calls)} calls of attention, the mask has {len(mask.keep)} layers"
        )
    for layer, (call, keep) in enumerate(zip(calls, mask.keep, strict=True)):
        _check_fit(layer, call, keep.shape, exact=image_size is not None)
    _warn_of_empty_rows(mask)
    plans = plan_layers(mask) if backend == "auto" else [None] * len(calls)
    hooks = [
        _Masked(i, torch.from_numpy(keep.copy()), plan)
        for i, (keep, plan) in enumerate(zip(mask.keep, plans, strict=True))
    ]
    return intercept(model, hooks, calls)


def _image_size(model: nn.Module) -> int:
    size = image_size_of(model)
    return size if isinstance(size, int) else size[0]


def _warn_of_empty_rows(mask: AttentionMask) -> None:
    empty = [np.argwhere(~keep.any(axis=-1)) for keep in mask.keep]
    count = sum(map(len, empty))
    if count:
        layer, rows = next((i, rows) for i, rows in enumerate(empty) if len(rows))
        head, query = rows[0].tolist()
        warnings.warn(
            f"the mask keeps no key for {count} queries, the first query {query} of layer "
            f"{layer}, head {head}: their heads give 0",
            stacklevel=3,
        )


def _check_fit(layer: int, call: AttentionCall, shape: tuple[int, ...], exact: bool) -> None:
    """Heads must fit now; tokens are known only where the image size is (else in forward)."""
    wanted = (call.heads, call.queries, call.keys)
    if wanted != shape if exact else call.heads != shape[0]:
        raise ValueError(
            f"attention layer {layer} has (heads, queries, keys) = {wanted}, "
            f"the mask is for {shape}"
        )
