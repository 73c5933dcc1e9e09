"""Where the softmax attention of any module is: its calls, in order, with their shapes.

The three forms are those of `attention_forms`. No source is edited and no weight touched:
the module's own forward runs on fake tensors and each call is noted as it goes by.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .attention_forms import AttentionForms, Fused, Scores
from .shadow import Inputs, ModuleStack, Visit, shadow_run


@dataclass(frozen=True)
class AttentionCall:
    """One call of softmax attention in a forward.

    module   qualified name of the innermost module inside which all of it happens
    index    the how-manieth softmax of scores in one forward of that module
    form     'sdpa', 'softmax' (between two batched products) or 'mha'
    windows  independent windows an image: the call's batch over the number of images
    """

    module: str
    index: int
    form: str
    heads: int
    queries: int
    keys: int
    key_dim: int
    value_dim: int
    windows: int


def find_attention(model: nn.Module, inputs: Inputs | None = None) -> tuple[AttentionCall, ...]:
    """Every call of softmax attention in one forward of ``model``, in call order.

    inputs  an image size in pixels or (height, width), an example input, or a tuple of
            all inputs of forward; default ``model.image_size``, else 224. Only shapes are
            used, those of one image where it is an image size or one tensor.

    Runs on shapes alone, in milliseconds and no memory, in eval mode, and leaves the model
    as it was. Hooks of `intercept` are passed by. Where a call's tensors are three-
    dimensional its heads are the module's ``num_heads`` if that is its only call, else 1.
    """
    stack = ModuleStack()
    finder = _Finder(stack)
    images = inputs if inputs is not None else getattr(model, "image_size", 224)
    shadow_run(model, images, stack, finder)
    return _calls(finder.seen, model, _batch(images))


@dataclass(eq=False)
class _Seen:
    """A call as it goes by. ``path`` are the visits inside which all of it happens."""

    path: tuple[Visit, ...]
    form: str
    heads: int | None
    queries: int
    keys: int
    key_dim: int
    batch: int  # over images, windows and, where heads is None, heads
    value_dim: int = 0  # stays 0 where the probabilities met no values


class _Finder(AttentionForms):
    """Notes every softmax of scores and what it met."""

    def __init__(self, stack: ModuleStack) -> None:
        super().__init__()
        self.stack = stack
        self.seen: list[_Seen] = []

    def origin(self) -> tuple[Visit, ...]:
        return self.stack.now

    def fused(self, call: Fused) -> Tensor:
        *batch, queries, key_dim = call.query.shape
        self.seen.append(
            _Seen(
                path=self.stack.now,
                form="mha" if self.multi_head else "sdpa",
                heads=call.heads,
                queries=queries,
                keys=call.key.shape[-2],
                key_dim=key_dim,
                batch=math.prod(batch) // (call.heads or 1),
                value_dim=call.value.shape[-1],
            )
        )
        return call.run()

    def softmax(
        self, scores: Scores, present: Tensor, run: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, _Seen]:
        *batch, first, second = present.shape
        queries, keys = (first, second) if scores.key_axis == -1 else (second, first)
        event = _Seen(
            path=_shared(scores.origin, self.stack.now),
            form="mha" if self.multi_head else "softmax",
            heads=scores.heads,
            queries=queries,
            keys=keys,
            key_dim=scores.key_dim,
            batch=math.prod(batch) // (scores.heads or 1),
        )
        self.seen.append(event)
        return run(present), event

    def weighted(self, scores: Scores, value_dim: int) -> None:
        scores.event.value_dim += value_dim
        scores.event.path = _shared(scores.event.path, self.stack.now)


def _shared(one: tuple[Visit, ...], other: tuple[Visit, ...]) -> tuple[Visit, ...]:
    """The visits that both paths have in common, from the outermost on."""
    return tuple(a for a, b in zip(one, other, strict=False) if a == b)


def _calls(seen: list[_Seen], model: nn.Module, images: int) -> tuple[AttentionCall, ...]:
    inside: dict[Visit, list[_Seen]] = defaultdict(list)
    for event in seen:
        inside[event.path[-1]].append(event)
    calls = []
    for event in seen:
        if not event.value_dim:
            continue
        visit = event.path[-1]
        heads, batch = event.heads, event.batch
        if heads is None:
            alone = len(inside[visit]) == 1
            heads = _stated_heads(model.get_submodule(visit.module), batch) if alone else 1
            batch //= heads
        calls.append(
            AttentionCall(
                module=visit.module,
                index=inside[visit].index(event),
                form=event.form,
                heads=heads,
                queries=event.queries,
                keys=event.keys,
                key_dim=event.key_dim,
                value_dim=event.value_dim,
                windows=max(1, batch // images),
            )
        )
    return tuple(calls)


def _stated_heads(module: nn.Module, batch: int) -> int:
    """The module's own number of heads, where the batch can hold them; else 1."""
    for name in ("num_heads", "heads", "num_attention_heads", "n_heads", "n_head"):
        heads = getattr(module, name, None)
        if isinstance(heads, int) and heads > 0 and batch % heads == 0:
            return heads
    return 1


def _batch(inputs: Inputs) -> int:
    """Images in one shadow run: 1, or the first size of the first of several inputs."""
    if isinstance(inputs, tuple):
        first = next((value for value in inputs if isinstance(value, Tensor)), None)
        return 1 if first is None else len(first)
    return 1
