"""Batched products of two activations, whichever function computes them.

matmul, bmm, baddbmm, ``@`` and einsum are read as one thing: two operands with a label on
every axis, of which one is summed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

MATMULS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}
BADDBMMS = {torch.baddbmm, Tensor.baddbmm}
EINSUMS = {torch.einsum, torch.functional.einsum}


@dataclass(frozen=True, eq=False)
class Step:
    """One function applied to scores; ``position`` is the place of the scores in ``args``."""

    func: Callable
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    position: int

    def on(self, scores: Tensor) -> Tensor:
        args = (*self.args[: self.position], scores, *self.args[self.position + 1 :])
        return self.func(*args, **self.kwargs)


@dataclass(frozen=True, eq=False)
class Operands:
    """Two tensors of one batched product, with an axis label for each of their axes.

    ``labels`` are of left, right and result, as in an einsum. ``steps`` are what the
    function does beyond the product (the addend of baddbmm).
    """

    left: Tensor
    right: Tensor
    labels: tuple[str, str, str]
    steps: tuple[Step, ...] = ()

    @property
    def may_be_scores(self) -> bool:
        """Whether the last two axes of the result are one of each operand."""
        left, right, result = self.labels
        shared = set(left) & set(right)
        return not shared & set(result[-2:]) and (result[-2] in left) != (result[-1] in left)

    def canonical(self) -> tuple[Tensor, Tensor]:
        """Views [..., rows, inner] and [..., columns, inner] for result [..., rows, columns]."""
        left, right, result = self.labels
        row, column = result[-2:]
        inner = next(iter(set(left) & set(right) - set(result)))
        pairs = ((self.left, left), (self.right, right))
        (a, a_labels), (b, b_labels) = pairs if row in left else pairs[::-1]
        batch = result[:-2]
        return _arranged(a, a_labels, batch, row + inner), _arranged(
            b, b_labels, batch, column + inner
        )

    def sums_over(self, tensor: Tensor, axis: int) -> bool:
        """Whether the product sums over that axis of ``tensor``, keeping the other of its
        last two."""
        labels = self.labels[0] if tensor is self.left else self.labels[1]
        return labels[axis] not in self.labels[2] and labels[-3 - axis] in self.labels[2]


def _arranged(tensor: Tensor, labels: str, batch: str, last: str) -> Tensor:
    """``tensor`` with axes ``batch + last``; batch axes that it lacks get size 1."""
    present = [label for label in batch + last if label in labels]
    tensor = tensor.permute([labels.index(label) for label in present])
    for place, label in enumerate(batch):
        if label not in labels:
            tensor = tensor.unsqueeze(place)
    return tensor


def operands_of(func: Callable, args: tuple, kwargs: Mapping) -> Operands | None:
    """The operands where ``func`` is a batched product of two activations, else None."""
    if func in MATMULS and len(args) == 2:
        return _of_matmul(*args)
    if func in BADDBMMS and len(args) == 3:
        found = _of_matmul(*args[1:])
        return found and replace(found, steps=(_addend(args[0], **kwargs),))
    if func in EINSUMS:
        return _of_einsum(args)
    return None


def _of_matmul(left: Any, right: Any) -> Operands | None:
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    if left.ndim != right.ndim or left.ndim < 3:
        return None
    batch = "abcdefgh"[: left.ndim - 2]
    return Operands(left, right, (batch + "ri", batch + "ik", batch + "rk"))


def _addend(addend: Tensor, beta: float = 1, alpha: float = 1) -> Step:
    """What baddbmm does to the product."""
    return Step(lambda product: alpha * product + beta * addend, (None,), {}, 0)


def _of_einsum(args: tuple) -> Operands | None:
    if not args or not isinstance(args[0], str):
        return None
    operands = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    equation = args[0].replace(" ", "")
    if len(operands) != 2 or "->" not in equation:
        return None
    first, second = operands
    left, right, result = _spelled_out(equation, (first, second))
    if any(len(set(part)) != len(part) for part in (left, right, result)) or len(result) < 3:
        return None
    summed = (set(left) | set(right)) - set(result)
    if len(summed) != 1 or not summed <= set(left) & set(right):
        return None
    return Operands(first, second, (left, right, result))


def _spelled_out(equation: str, operands: tuple[Tensor, Tensor]) -> tuple[str, str, str]:
    """The three label strings with any ellipsis replaced by capital letters."""
    inputs, result = equation.split("->")
    parts = [*inputs.split(","), result]
    named = [len(part.replace("...", "")) for part in parts]
    hidden = [t.ndim - n for t, n in zip(operands, named[:2], strict=True)]
    widest = "ABCDEFGH"[: max([h for h, p in zip(hidden, parts, strict=False) if "..." in p] + [0])]
    left, right, whole = (
        part.replace("...", widest[len(widest) - h :] if h is not None else widest)
        for part, h in zip(parts, [*hidden, None], strict=True)
    )
    return left, right, whole
