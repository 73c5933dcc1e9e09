"""Change or watch the softmax attention inside any module, from outside.

The one place that puts masks, codecs, kernels and observers into a model. While a module
that computes attention runs, its torch functions pass through `AttentionForms`, and each
call meets the hooks that were given for it. Parameters and state-dict keys do not change.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calls import AttentionCall, find_attention
from .forms import AttentionForms, Fused, Scores
from .shadow import in_shadow


class AttentionHook:
    """What to do at one call; a subclass or an instance sets what it needs.

    keep       bool [heads, queries, keys]; False entries get no weight, as if their score
               were -inf; a row with none kept gives 0
    transform  q, k -> q, k, each [batch, heads, tokens, key_dim], before the scores
    observe    receives the probabilities [batch, heads, queries, keys] after masking
    kernel     kernel(q, k, v, scale) -> [batch, heads, queries, value_dim] computes the
               call instead, masking included; where something else is in the way (an
               eager softmax, another bias, mask, dropout or observer) ``keep``, which must
               then be given too, is applied densely. A kernel whose ``takes_bias`` is true
               gets the call's own bias too, kernel(q, k, v, scale, bias)
    """

    keep: Tensor | None = None
    observe: Callable[[Tensor], None] | None = None
    kernel: Callable[..., Tensor] | None = None

    def __init__(
        self,
        keep: Tensor | None = None,
        observe: Callable[[Tensor], None] | None = None,
        kernel: Callable[..., Tensor] | None = None,
    ) -> None:
        self.keep = keep
        self.kernel = kernel
        if observe is not None:
            self.observe = observe

    def transform(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


class Handle:
    """Takes hooks out again: `remove`, or the end of a ``with``."""

    def __init__(self, wrapped: dict[str, _Intercepted], layer: object) -> None:
        self._wrapped = wrapped
        self._layer = layer

    def remove(self) -> None:
        """Restore the model, but for other intercepts; a second time does nothing."""
        for wrapped in self._wrapped.values():
            wrapped.drop(self._layer)
        self._wrapped = {}

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def intercept(
    model: nn.Module,
    hooks: Sequence[AttentionHook | None],
    calls: Sequence[AttentionCall] | None = None,
) -> Handle:
    """Let ``hooks[i]`` act on the i-th attention call in every forward of ``model``.

    hooks  one a call of `find_attention`, in that order; None leaves a call alone
    calls  the result of `find_attention`, found for ``model.image_size`` where not given;
           only modules, order and heads matter, tokens may differ in a forward

    Intercepts stack: a mask may be put in, then maps observed. Transforms act in the order
    of their intercepts, a key is kept where every mask keeps it. They act under autograd,
    autocast, checkpointing of whole modules and in a deep copy of the model. Raises
    ``ValueError`` where the numbers of hooks and calls differ.
    """
    calls = find_attention(model) if calls is None else tuple(calls)
    if len(hooks) != len(calls):
        raise ValueError(f"the model makes {len(calls)} calls of attention, got {len(hooks)} hooks")
    by_module: dict[str, dict[int, tuple[AttentionCall, AttentionHook | None]]] = {}
    for call, hook in zip(calls, hooks, strict=True):
        placed = by_module.setdefault(call.module, {})
        if placed.setdefault(call.index, (call, hook))[1] is not hook:
            raise ValueError(
                f"module {call.module!r} runs more than once in a forward; its calls need the "
                "same hook each time"
            )
    layer = object()
    wrapped = {}
    for name, placed in by_module.items():
        wrapped[name] = _Intercepted.of(model.get_submodule(name), name)
        wrapped[name].add(layer, placed)
    return Handle(wrapped, layer)


Placed = dict[int, tuple[AttentionCall, AttentionHook | None]]
"""By index in the module: the call, for its number of heads, and what acts on it."""


class _Intercepted:
    """Stands in for one module's ``forward`` while anything is intercepted there.

    It is held by the module alone and holds the module, so that a deep copy of the one
    copies the other. The empty forward pre-hook keeps ``nn.TransformerEncoderLayer`` from
    its fused path, which would never call the module.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        self.previous = module.__dict__.get("forward")
        self.layers: list[tuple[object, Placed]] = []
        self.blocker = module.register_forward_pre_hook(_nothing)

    @classmethod
    def of(cls, module: nn.Module, name: str) -> _Intercepted:
        present = module.__dict__.get("forward")
        if isinstance(present, cls):
            return present
        module.forward = cls(module, name)
        return module.forward

    def add(self, layer: object, placed: Placed) -> None:
        self.layers.append((layer, placed))

    def drop(self, layer: object) -> None:
        self.layers = [(other, placed) for other, placed in self.layers if other is not layer]
        if self.layers or self.module.__dict__.get("forward") is not self:
            return
        self.blocker.remove()
        if self.previous is None:
            del self.module.forward
        else:
            self.module.forward = self.previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.previous or type(self.module).forward.__get__(self.module)
        if in_shadow():
            return forward(*args, **kwargs)
        frames = _THREAD.frames
        frames.append(_Frame(self))
        try:
            with _Interceptor() if len(frames) == 1 else contextlib.nullcontext():
                return forward(*args, **kwargs)
        finally:
            frames.pop()


def _nothing(module: nn.Module, args: tuple) -> None:
    pass


@dataclass
class _Frame:
    """One running forward of an intercepted module, and how many calls it has made."""

    intercepted: _Intercepted
    made: int = 0

    def next_call(self) -> tuple[int, list[AttentionHook]]:
        """(heads, hooks) of the call that is being made."""
        found = [placed[self.made] for _, placed in self.intercepted.layers if self.made in placed]
        self.made += 1
        return (found[0][0].heads if found else 1), [hook for _, hook in found if hook is not None]


class _Thread(threading.local):
    def __init__(self) -> None:
        self.frames: list[_Frame] = []


_THREAD = _Thread()


class _Interceptor(AttentionForms):
    """Hands each recognised call to the hooks of the innermost running module."""

    def fused(self, call: Fused) -> Tensor:
        frame = _THREAD.frames[-1]
        heads, hooks = frame.next_call()
        if not hooks:
            return call.run()
        batch = call.query.shape[:-2]
        result = _hooked(_by_heads(call, heads), hooks, frame.intercepted.name)
        return result.reshape(*batch, *result.shape[-2:])

    def softmax(
        self, scores: Scores, present: Tensor, run: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, None]:
        frame = _THREAD.frames[-1]
        heads, hooks = frame.next_call()
        name = frame.intercepted.name
        changing = [hook for hook in hooks if _transforms(hook)]
        if changing and not scores.repeatable(present):
            raise ValueError(
                f"the scores in {name!r} are changed in place between product and softmax; "
                "q and k cannot be transformed there"
            )
        if changing:
            present = _with_transforms(scores, present, heads, changing)
        turned = scores.key_axis == -2
        shaped = present.mT if turned else present
        shape = (heads, shaped.shape[-2], shaped.shape[-1])
        keep = _joint_keep(hooks, shape, present.device, name)
        shaped = shaped.reshape(-1, heads, *shaped.shape[-2:])

        def softmax(tensor: Tensor) -> Tensor:
            tensor = tensor.mT if turned else tensor
            result = run(tensor.reshape(present.shape))
            return (result.mT if turned else result).reshape(shaped.shape)

        probabilities = kept_softmax(shaped, keep, softmax)
        for hook in hooks:
            if hook.observe is not None:
                hook.observe(probabilities)
        probabilities = probabilities.mT if turned else probabilities
        return probabilities.reshape(present.shape), None


def _by_heads(call: Fused, heads: int) -> Fused:
    """``call`` with q, k, v and mask as [batch, heads, ...], grouped heads written out."""
    *batch, queries, _ = call.query.shape
    key, value, mask = call.key, call.value, call.attn_mask
    if call.enable_gqa:
        key = key.repeat_interleave(call.query.shape[-3] // key.shape[-3], dim=-3)
        value = value.repeat_interleave(call.query.shape[-3] // value.shape[-3], dim=-3)
    if mask is not None:
        mask = mask.expand(*batch, queries, key.shape[-2]).reshape(
            -1, heads, queries, key.shape[-2]
        )

    def shaped(tensor: Tensor) -> Tensor:
        tensor = tensor.expand(*batch, *tensor.shape[-2:])
        return tensor.reshape(-1, heads, *tensor.shape[-2:])

    return replace(
        call,
        query=shaped(call.query),
        key=shaped(key),
        value=shaped(value),
        attn_mask=mask,
        scale=call.softmax_scale,
        enable_gqa=False,
    )


def _hooked(call: Fused, hooks: list[AttentionHook], name: str) -> Tensor:
    """One fused call [batch, heads, ...] under its hooks."""
    query, key = call.query, call.key
    for hook in hooks:
        query, key = hook.transform(query, key)
    call = replace(call, query=query, key=key)
    observers = [hook.observe for hook in hooks if hook.observe is not None]
    masking = [hook for hook in hooks if hook.keep is not None or hook.kernel is not None]
    kernel = masking[0].kernel if not observers and len(masking) == 1 else None
    if kernel is not None and not call.is_causal and call.dropout_p == 0:
        bias = call.attn_mask
        if bias is None:
            return kernel(query, key, call.value, call.softmax_scale)
        if getattr(kernel, "takes_bias", False) and bias.dtype != torch.bool:
            return kernel(query, key, call.value, call.softmax_scale, bias)
    shape = (query.shape[1], query.shape[2], key.shape[2])
    keep = _joint_keep(hooks, shape, query.device, name)
    if observers:
        return _written_out(call, keep, observers)
    return call.run() if keep is None else _masked(call, keep)


def _joint_keep(
    hooks: list[AttentionHook], shape: tuple[int, int, int], device: torch.device, name: str
) -> Tensor | None:
    """The entries that every hook keeps, None where none has a mask."""
    joint = None
    for hook in hooks:
        if hook.keep is None and hook.kernel is not None:
            raise ValueError(
                f"the kernel for {name!r} cannot act here (a softmax written out, another "
                "mask, dropout or observer); its hook needs keep as well, to be applied densely"
            )
        if hook.keep is None:
            continue
        if hook.keep.dtype != torch.bool or tuple(hook.keep.shape) != shape:
            raise ValueError(
                f"attention in {name!r} has (heads, queries, keys) = {shape}; keep must be bool "
                f"of that shape, got {hook.keep.dtype} {tuple(hook.keep.shape)}"
            )
        keep = hook.keep.to(device)
        joint = keep if joint is None else joint & keep
    return joint


def _masked(call: Fused, keep: Tensor) -> Tensor:
    """Fused attention over the kept entries; a query with none kept gives 0."""
    if call.is_causal:
        keep = keep & torch.ones_like(keep).tril()
    keep = keep[None]  # four axes: with three, the fast kernels refuse the mask
    own = call.attn_mask
    allowed = keep if own is None else keep & (own if own.dtype == torch.bool else own > -math.inf)
    empty = ~allowed.any(dim=-1, keepdim=True)
    allowed = allowed | empty  # such a row is computed in full, without NaN, and then dropped
    if own is None or own.dtype == torch.bool:
        mask = allowed
    else:
        mask = own.masked_fill(~allowed, -math.inf).masked_fill(empty, 0.0)
    result = replace(call, attn_mask=mask, is_causal=False).run()
    return result.masked_fill(empty, 0.0)


def _written_out(
    call: Fused, keep: Tensor | None, observers: list[Callable[[Tensor], None]]
) -> Tensor:
    """The same with the probabilities at hand."""
    scores = call.query @ call.key.mT * call.softmax_scale
    own = call.attn_mask
    if own is not None and own.dtype != torch.bool:
        scores = scores + own
        own = None
    if call.is_causal:
        own = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if own is not None:
        keep = own if keep is None else own & keep
    probabilities = kept_softmax(scores, keep, lambda tensor: tensor.softmax(dim=-1))
    for observe in observers:
        observe(probabilities)
    weights = F.dropout(probabilities, call.dropout_p) if call.dropout_p else probabilities
    return weights.to(call.value.dtype) @ call.value


def kept_softmax(
    scores: Tensor, keep: Tensor | None, softmax: Callable[[Tensor], Tensor]
) -> Tensor:
    """``softmax`` over the last axis of the kept scores; a row with none kept gives 0."""
    if keep is None:
        return softmax(scores)
    scores = scores.masked_fill(~keep, -math.inf)
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    return softmax(scores.masked_fill(empty, 0.0)).masked_fill(empty, 0.0)


def _transforms(hook: AttentionHook) -> bool:
    return getattr(hook.transform, "__func__", None) is not AttentionHook.transform


def _with_transforms(
    scores: Scores, present: Tensor, heads: int, hooks: list[AttentionHook]
) -> Tensor:
    """The scores again, from transformed q and k."""
    batch = torch.broadcast_shapes(scores.rows.shape[:-2], scores.columns.shape[:-2])
    rows, columns = (t.expand(*batch, *t.shape[-2:]) for t in (scores.rows, scores.columns))
    keys_are_columns = (scores.key_axis == -1) != scores.swapped
    query, key = (rows, columns) if keys_are_columns else (columns, rows)
    query, key = (t.reshape(-1, heads, *t.shape[-2:]) for t in (query, key))
    for hook in hooks:
        query, key = hook.transform(query, key)
    query, key = (t.reshape(*batch, *t.shape[-2:]) for t in (query, key))
    rows, columns = (query, key) if keys_are_columns else (key, query)
    return scores.recomputed(rows, columns).reshape(present.shape)
