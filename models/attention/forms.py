"""Softmax attention recognised while it is computed, in any module, by its arithmetic.

Three forms are known: ``F.scaled_dot_product_attention``; a softmax between two batched
products (matmul, bmm, baddbmm, einsum, ``@``) with scaling, bias, masks, casts and dropout
around it; and ``F.multi_head_attention_forward`` (``nn.MultiheadAttention``), whose inside
is one of the first two. Under `AttentionForms` every torch function passes by; a subclass
decides what happens at each recognised step. Softmax over anything else stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .products import Operands, Step, operands_of

SOFTMAXES = {torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax}

ELEMENTWISE = frozenset(
    ["add", "add_", "sub", "sub_", "mul", "mul_", "multiply", "div", "div_", "true_divide"]
    + ["__rsub__", "neg", "where", "masked_fill", "masked_fill_", "clamp", "clamp_"]
    + ["clamp_min", "clamp_max", "tanh", "nan_to_num", "contiguous", "clone"]
    + ["to", "type", "type_as", "float", "half", "bfloat16", "double"]
    + ["dropout", "dropout_", "alpha_dropout", "feature_dropout"]
)
"""Functions by name that keep shape and order, allowed between a product and its softmax."""

RESHAPES = frozenset(["view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "expand"])
"""Allowed where the last two axes, queries and keys, stay as they are."""


@dataclass(frozen=True, eq=False)
class Scores:
    """A batched product [..., rows, columns], what was done to it since, and its softmax.

    rows, columns  the operands [..., rows, inner] and [..., columns, inner]
    steps          from the product to the present tensor
    swapped        the last two axes were exchanged since the product
    key_axis       the axis of the present tensor that the softmax ran over, -1 or -2;
                   None before the softmax
    version        how often the present tensor had been changed in place after the last
                   step; None where that is not recorded
    heads          as seen in a shape [..., heads, queries, keys], None where none was seen
    origin, event  a subclass's own notes: where the product was made, what came of it
    """

    rows: Tensor
    columns: Tensor
    steps: tuple[Step, ...] = ()
    swapped: bool = False
    key_axis: int | None = None
    version: int | None = None
    heads: int | None = None
    origin: Any = None
    event: Any = None

    @property
    def key_dim(self) -> int:
        return self.rows.shape[-1]

    def repeatable(self, present: Tensor) -> bool:
        """Whether ``steps`` are all that happened to ``present`` since its product."""
        return _version(present) == self.version

    def recomputed(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The present tensor with other operands (before the softmax)."""
        scores = rows @ columns.mT
        for step in self.steps:
            scores = step.on(scores)
        return scores


@dataclass(frozen=True, eq=False)
class Fused:
    """The arguments of one ``scaled_dot_product_attention``; q [..., queries, key dim]."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def run(self) -> Tensor:
        return F.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            attn_mask=self.attn_mask,
            dropout_p=self.dropout_p,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )

    @property
    def heads(self) -> int | None:
        return self.query.shape[-3] if self.query.ndim >= 4 else None

    @property
    def softmax_scale(self) -> float:
        return self.key.shape[-1] ** -0.5 if self.scale is None else self.scale


class AttentionForms(TorchFunctionMode):
    """A function mode that finds attention. The methods below the line change nothing;
    a subclass overrides what it needs. ``multi_head`` is the number of heads while inside
    ``F.multi_head_attention_forward``, else None."""

    def __init__(self) -> None:
        super().__init__()
        self.multi_head: int | None = None
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.fused(Fused(*args, **kwargs))
        if func is F.multi_head_attention_forward:
            return self._multi_head(args, kwargs)
        if func in SOFTMAXES:
            return self._softmax(func, args, kwargs)
        operands = operands_of(func, args, kwargs)
        if operands is not None:
            return self._product(func, args, kwargs, operands)
        if self._known:
            return self._follow(func, args, kwargs)
        return func(*args, **kwargs)

    # ---------------------------------------------------------------- for a subclass

    def fused(self, call: Fused) -> Tensor:
        """A fused call; what is returned takes its place."""
        return call.run()

    def origin(self) -> Any:
        """What to note with a new product."""
        return None

    def step(self, scores: Scores, func: Callable, args: tuple, kwargs: Mapping) -> Any:
        """One function from the product to the weighted values."""
        return func(*args, **kwargs)

    def softmax(
        self, scores: Scores, present: Tensor, run: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Any]:
        """The softmax: ``run(present)``. Returns the probabilities and the event to note."""
        return run(present), None

    def weighted(self, scores: Scores, value_dim: int) -> None:
        """The probabilities met their values: it was attention after all."""

    # ---------------------------------------------------------------- recognition

    def _multi_head(self, args: tuple, kwargs: Mapping) -> Any:
        outer, self.multi_head = self.multi_head, _argument(args, kwargs, 4, "num_heads")
        try:
            with self:
                return _MULTI_HEAD_BODY(*args, **kwargs)
        finally:
            self.multi_head = outer

    def _product(self, func: Callable, args: tuple, kwargs: Mapping, operands: Operands) -> Any:
        for tensor in (operands.left, operands.right):
            scores = self._known.get(tensor)
            if scores is not None and scores.key_axis is not None:
                return self._weigh(func, args, kwargs, operands, tensor, scores)
        if not operands.may_be_scores:
            return func(*args, **kwargs)
        rows, columns = operands.canonical()
        scores = Scores(rows, columns, operands.steps, heads=self.multi_head, origin=self.origin())
        product = self.step(scores, func, args, kwargs)
        heads = scores.heads or (product.shape[-3] if product.ndim >= 4 else None)
        self._known[product] = replace(scores, heads=heads, version=_version(product))
        return product

    def _weigh(self, func, args, kwargs, operands: Operands, tensor: Tensor, scores: Scores) -> Any:
        """A product with probabilities: attention where it sums over the keys."""
        result = self.step(scores, func, args, kwargs)
        axis = scores.key_axis
        if axis is not None and operands.sums_over(tensor, axis):
            keys = tensor.shape[axis]
            self.weighted(scores, result.numel() * keys // tensor.numel())
        return result

    def _softmax(self, func: Callable, args: tuple, kwargs: Mapping) -> Any:
        present = args[0] if args else kwargs.get("input")
        if not isinstance(present, Tensor):
            return func(*args, **kwargs)
        scores = self._known.get(present)
        axis = _argument(args, kwargs, 1, "dim")
        if scores is None or scores.key_axis is not None or axis is None:
            return func(*args, **kwargs)
        axis = axis if axis < 0 else axis - present.ndim
        if axis not in (-1, -2):
            return func(*args, **kwargs)
        scores = replace(scores, key_axis=axis)
        rest, named = args[1:], {k: v for k, v in kwargs.items() if k != "input"}

        def run(tensor: Tensor) -> Tensor:
            return self.step(scores, func, (tensor, *rest), named)

        probabilities, event = self.softmax(scores, present, run)
        self._known[probabilities] = replace(scores, event=event)
        return probabilities

    def _follow(self, func: Callable, args: tuple, kwargs: Mapping) -> Any:
        """Any other function: the scores stay known through arithmetic and views."""
        positions = [
            i for i, value in enumerate(args) if isinstance(value, Tensor) and value in self._known
        ]
        if len(positions) != 1:
            return func(*args, **kwargs)
        before = args[positions[0]]
        scores = self._known[before]
        if func is Tensor.__setitem__:
            self._known[before] = replace(scores, version=-1)
        turned = _last_two_turned(func, args, kwargs, before)
        if turned is None:
            return func(*args, **kwargs)
        shape = before.shape[-2:]
        after = self.step(scores, func, args, kwargs)
        if not isinstance(after, Tensor) or after.numel() != before.numel():
            return after
        if tuple(after.shape[-2:]) != (tuple(shape[::-1]) if turned else tuple(shape)):
            return after
        self._known[after] = _after(scores, Step(func, args, kwargs, positions[0]), turned, after)
        return after


def _after(scores: Scores, step: Step, turned: bool, after: Tensor) -> Scores:
    """``scores`` one step on; the step's own copy of the scores is not held."""
    blank = (*step.args[: step.position], None, *step.args[step.position + 1 :])
    steps = (
        scores.steps if scores.key_axis is not None else (*scores.steps, replace(step, args=blank))
    )
    axis = scores.key_axis
    return replace(
        scores,
        steps=steps,
        swapped=scores.swapped != turned,
        key_axis=-3 - axis if turned and axis is not None else axis,
        version=_version(after),
        heads=scores.heads or (after.shape[-3] if after.ndim >= 4 else None),
    )


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _last_two_turned(func: Callable, args: tuple, kwargs: Mapping, before: Tensor) -> bool | None:
    """False where queries and keys stay the last two axes in order, True where they change
    places, None where ``func`` is nothing that scores are followed through."""
    name = getattr(func, "__name__", "")
    if name in ELEMENTWISE or name in RESHAPES:
        return False
    rank = before.ndim
    # Torch's annotation of a property of tensors is that of its value.
    mt = Tensor.mT.__get__  # pyright: ignore[reportAttributeAccessIssue]
    if func in (mt, Tensor.adjoint, torch.adjoint):
        return True
    if name in ("transpose", "swapaxes", "transpose_", "swapdims"):
        first, second = (_argument(args, kwargs, i, f"dim{i - 1}") for i in (1, 2))
        axes = {first % rank, second % rank}
        return True if axes == {rank - 1, rank - 2} else None
    if name == "permute":
        given = kwargs.get("dims", args[1:])
        order = [int(a) % rank for a in (given[0] if len(given) == 1 else given)]
        return True if order == [*range(rank - 2), rank - 1, rank - 2] else None
    return None


def _argument(args: tuple, kwargs: Mapping, position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


_MULTI_HEAD_BODY = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda *_: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
"""``F.multi_head_attention_forward`` that runs its own body under a function mode, where
the original would hand itself to the mode again. The body is torch's, unchanged."""
_MULTI_HEAD_BODY.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__
