"""A module's own forward -> the operations it is made of: the only description of cost.

The forward runs on fake tensors (`shadow`); a dispatch mode sees every operation and a
function mode finds attention, each call of which becomes one `Attention`. There is no
second, hand-written description of any block, so a user's own module is counted as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...workload import Attention, Op, Unused, Workload
from ..attention.calls import AttentionCall, AttentionFinder, SeenCall, attention_calls, images_in
from ..attention.forms import Fused, Scores
from ..attention.shadow import Inputs, ModuleStack, Visit, shadow_run
from .aten_costs import AtenCosts, op_kind
from .parameter_use import ParameterUse


def trace(model: nn.Module, inputs: Inputs | None = None) -> Workload:
    """The operations of one forward of ``model`` for one image, in order.

    inputs  an image size in pixels or (height, width), an example input, or a tuple of
            all inputs of forward; default ``model.image_size``, else 224. Only shapes are
            used, those of one image where it is an image size or one tensor.

    Names are those of the modules; where a module does several things, the kind of
    operation follows (``blocks.0.add``). Each softmax attention is one `Attention`: its
    products, scaling, masks and softmax are in it, a learned bias is its ``bias_params``.
    Views are free, real copies are not. Each parameter is charged where it is first
    computed with, so that the workload's params are the model's; a parameter that no
    operation reads is listed as `Unused`, and an operation of unknown cost as `Unknown`.

    A module may describe itself, as a compiled operator must: with a method
    ``as_op(name, *inputs) -> Op`` it is that one operation, whatever runs inside it.

    Eval mode; hooks of `intercept` are passed by (a workload gets masks and codecs through
    `Workload.with_attention`). The model is left as it was. Raises what the forward raises,
    and ``ValueError`` where it depends on the values of its tensors.
    """
    images = inputs if inputs is not None else getattr(model, "image_size", 224)
    tracer = _Tracer(model)
    modes = (_Operations(tracer), _Attention(tracer))
    shadow_run(model, images, tracer, *modes, prepare=tracer.use.start)
    ops = tracer.finished(modes[1].seen, images_in(images))
    return Workload(getattr(model, "registered_name", type(model).__name__), ops)


@dataclass(eq=False)
class _Slot:
    """One operation and the visit it was made in; an attention is described at the end."""

    op: Op | None
    visit: Visit
    attention: SeenCall | None = None
    params: int = 0


class _Tracer(ModuleStack):
    """Collects operations in order, with the module each was made in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.leaves = {name for name, m in model.named_modules() if not any(m.children())}
        self.use = ParameterUse(model)
        self.costs = AtenCosts(self.use)
        self.slots: list[_Slot] = []
        self.silent = 0  # how many surroundings want nothing recorded

    def add(self, op: Op | None, attention: SeenCall | None = None, params: int = 0) -> None:
        self.slots.append(_Slot(op, self.visits[-1], attention, params))

    def entered(self, module: nn.Module) -> None:
        self.silent += getattr(module, "as_op", None) is not None

    def left(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        as_op = getattr(module, "as_op", None)
        if as_op is not None:
            self.silent -= 1
            if not self.silent:
                self.add(as_op(self.visits[-1].module, *args, **kwargs))
                self.use.charge(self.use.inside(self.visits[-1].module))

    def finished(self, seen: list[SeenCall], images: int) -> tuple[Op, ...]:
        """The operations with their names, attention described, unread parameters last."""
        calls = dict(attention_calls(seen, self.model, images))
        names = _Names(self.leaves)
        ops = []
        for slot in self.slots:
            if slot.attention is not None:
                call = calls[slot.attention]
                name = names.unique(call.module or "attention")
                ops.append(_attention_op(name, call, slot.params))
            elif slot.op is not None:
                ops.append(replace(slot.op, name=names.of(slot.visit, slot.op)))
        unread = (Unused(name, left) for name, left in self.use.uncharged.items() if left)
        return (*ops, *unread)


def _attention_op(name: str, call: AttentionCall, bias_params: int) -> Attention:
    return Attention(
        name,
        heads=call.heads,
        queries=call.queries,
        keys=call.keys,
        key_dim=call.key_dim,
        value_dim=call.value_dim,
        windows=call.windows,
        bias_params=bias_params,
    )


class _Names:
    """Names of operations: the module's, then ``module.kind``, then ``module.kind_2``."""

    def __init__(self, leaves: set[str]) -> None:
        self.leaves = leaves
        self.taken: Counter[str] = Counter()
        self.named: set[Visit] = set()

    def of(self, visit: Visit, op: Op) -> str:
        name = visit.module
        if name in self.leaves and name and visit not in self.named:
            self.named.add(visit)
            return self.unique(name)
        return self.unique(f"{name}.{op_kind(op)}".lstrip("."))

    def unique(self, name: str) -> str:
        self.taken[name] += 1
        return name if self.taken[name] == 1 else f"{name}_{self.taken[name]}"


class _Operations(TorchDispatchMode):
    """Every operation that reaches PyTorch's dispatcher."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.tracer.silent:
            for op in self.tracer.costs.of("", func, args, kwargs or {}, result):
                self.tracer.add(op)
        return result


class _Attention(AttentionFinder):
    """Puts one operation in the place of all that a call of attention is made of."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__(tracer)
        self.tracer = tracer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not self.tracer.silent:
            return self._linear(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self.tracer.silent += 1
        try:
            result = F.linear(input, weight, bias)
        finally:
            self.tracer.silent -= 1
        rows = input.numel() // weight.shape[-1]
        for op in self.tracer.costs.linear("", rows, weight, bias):
            self.tracer.add(op)
        return result

    def fused(self, call: Fused) -> Tensor:
        """Nothing is computed: the result is laid out in memory as the queries are, which
        is what the fused kernels of CPU and GPU do."""
        seen = self.note_fused(call)
        if not self.tracer.silent:
            operands = (call.query, call.key, call.value, call.attn_mask)
            params = self.tracer.use.charge(t for t in operands if t is not None)
            self.tracer.add(None, seen, params)
        shape = (*call.query.shape[:-1], call.value.shape[-1])
        strides = call.query.stride()
        order = sorted(range(len(shape)), key=lambda axis: -strides[axis])
        return torch.empty_permuted(shape, order, dtype=call.query.dtype, device=call.query.device)

    def step(self, scores: Scores, func: Callable, args: tuple, kwargs: Mapping) -> Any:
        first = len(self.tracer.slots)
        result = func(*args, **kwargs)
        scores.origin.steps.extend(self.tracer.slots[first:])
        return result

    def weighted(self, scores: Scores, value_dim: int) -> None:
        """Everything from the product to the weighted values is this one operation."""
        known = scores.event.value_dim > 0
        super().weighted(scores, value_dim)
        steps = [slot for slot in scores.origin.steps if slot.op is not None]
        params = sum(slot.op.params for slot in steps)
        for slot in steps:
            slot.op = None
        if not known and not self.tracer.silent:
            self.tracer.add(None, scores.event, params)
