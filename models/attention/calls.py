"""Where the softmax attention of any module is: its calls, in order, with their shapes.

The three forms are those of `forms`. No source is edited and no weight touched:
the module's own forward runs on fake tensors and each call is noted as it goes by.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from .forms import AttentionForms, Fused, Scores
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
    finder = AttentionFinder(stack)
    images = inputs if inputs is not None else getattr(model, "image_size", 224)
    shadow_run(model, images, stack, finder)
    return tuple(call for _, call in attention_calls(finder.seen, model, images_in(images)))


@dataclass(eq=False)
class Trail:
    """Where a product of scores was made; ``steps`` is for what a subclass notes of it."""

    path: tuple[Visit, ...]
    steps: list = field(default_factory=list)


@dataclass(eq=False)
class SeenCall:
    """A call as it goes by. ``path`` are the visits inside which all of it happens."""

    path: tuple[Visit, ...]
    form: str
    heads: int | None
    queries: int
    keys: int
    key_dim: int
    batch: int  # over images, windows and, where heads is None, heads
    value_dim: int = 0  # stays 0 where the probabilities met no values


class AttentionFinder(AttentionForms):
    """Notes every softmax of scores and what it met."""

    def __init__(self, stack: ModuleStack) -> None:
        super().__init__()
        self.stack = stack
        self.seen: list[SeenCall] = []

    def origin(self) -> Trail:
        return Trail(self.stack.now)

    def fused(self, call: Fused) -> Tensor:
        self.note_fused(call)
        return call.run()

    def note_fused(self, call: Fused) -> SeenCall:
        *batch, queries, key_dim = call.query.shape
        seen = SeenCall(
            path=self.stack.now,
            form="mha" if self.multi_head else "sdpa",
            heads=call.heads,
            queries=queries,
            keys=call.key.shape[-2],
            key_dim=key_dim,
            batch=math.prod(batch) // (call.heads or 1),
            value_dim=call.value.shape[-1],
        )
        self.seen.append(seen)
        return seen

    def softmax(
        self, scores: Scores, present: Tensor, run: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, SeenCall]:
        *batch, first, second = present.shape
        queries, keys = (first, second) if scores.key_axis == -1 else (second, first)
        event = SeenCall(
            path=shared_visits(scores.origin.path, self.stack.now),
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
        scores.event.path = shared_visits(scores.event.path, self.stack.now)


def shared_visits(one: tuple[Visit, ...], other: tuple[Visit, ...]) -> tuple[Visit, ...]:
    """The visits that both paths have in common, from the outermost on."""
    return tuple(a for a, b in zip(one, other, strict=False) if a == b)


def attention_calls(
    seen: list[SeenCall], model: nn.Module, images: int
) -> list[tuple[SeenCall, AttentionCall]]:
    """The calls among ``seen`` that met values, described."""
    inside: dict[Visit, list[SeenCall]] = defaultdict(list)
    for event in seen:
        inside[event.path[-1]].append(event)
    return [
        (event, _described(event, inside[event.path[-1]], model, images))
        for event in seen
        if event.value_dim
    ]


def _described(
    event: SeenCall, same_visit: list[SeenCall], model: nn.Module, images: int
) -> AttentionCall:
    module = event.path[-1].module
    heads, batch = event.heads, event.batch
    if heads is None:
        alone = len(same_visit) == 1
        heads = _stated_heads(model.get_submodule(module), batch) if alone else 1
        batch //= heads
    return AttentionCall(
        module=module,
        index=same_visit.index(event),
        form=event.form,
        heads=heads,
        queries=event.queries,
        keys=event.keys,
        key_dim=event.key_dim,
        value_dim=event.value_dim,
        windows=max(1, batch // images),
    )


def _stated_heads(module: nn.Module, batch: int) -> int:
    """The module's own number of heads, where the batch can hold them; else 1."""
    for name in ("num_heads", "heads", "num_attention_heads", "n_heads", "n_head"):
        heads = getattr(module, name, None)
        if isinstance(heads, int) and heads > 0 and batch % heads == 0:
            return heads
    return 1


def images_in(inputs: Inputs) -> int:
    """Images in one shadow run: 1, or the first size of the first of several inputs."""
    if isinstance(inputs, tuple):
        first = next((value for value in inputs if isinstance(value, Tensor)), None)
        return 1 if first is None else len(first)
    return 1
