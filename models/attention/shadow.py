"""Run a module's own forward without its weights or any arithmetic: on fake tensors.

Parameters, buffers and inputs are replaced by tensors that have shape and type but no
storage, so a forward takes milliseconds and no memory, random numbers and running
statistics stay untouched, and function and dispatch modes see every operation.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

Inputs = int | tuple[int, int] | Tensor | tuple[Any, ...]
"""An image size in pixels, (height, width), one input tensor, or all of forward's inputs."""


@dataclass(frozen=True)
class Visit:
    """One forward of one submodule; ``number`` counts the visits of a run."""

    module: str
    number: int


class _Thread(threading.local):
    def __init__(self) -> None:
        self.running = False


_THREAD = _Thread()


def in_shadow() -> bool:
    """Whether this thread is inside a shadow run, where intercepts must not act."""
    return _THREAD.running


class ModuleStack:
    """Which submodules are being run, outermost first, as a list of `Visit`.

    A subclass may act in `entered` and `left`.
    """

    def __init__(self) -> None:
        self.visits: list[Visit] = []
        self._count = 0

    @property
    def now(self) -> tuple[Visit, ...]:
        return tuple(self.visits)

    @contextlib.contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Keep the stack while ``model`` runs inside the block."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name), prepend=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def entered(self, module: nn.Module) -> None:
        """``module`` is about to run; it is the last of ``visits``."""

    def left(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """``module`` has run; it is still the last of ``visits``."""

    def _entering(self, name: str):
        def enter(module: nn.Module, args: tuple) -> None:
            self._count += 1
            self.visits.append(Visit(name, self._count))
            self.entered(module)

        return enter

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.left(module, args, kwargs, output)
        self.visits.pop()


def shadow_run(
    model: nn.Module,
    inputs: Inputs,
    stack: ModuleStack,
    *modes: AbstractContextManager,
    prepare: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> None:
    """One forward of ``model`` in eval mode for one image, under ``modes``.

    An example tensor gives shape and type only, of its first image; a tuple of inputs is
    taken whole. ``prepare`` is given the fake parameters and buffers by name before the
    run. The model is as it was afterwards. Raises whatever the forward raises, such as for
    an image size that it cannot take, and ``ValueError`` where the forward looks at the
    values of its tensors.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.inference_mode(False), fake, torch.no_grad():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        state = {name: _like(tensor) for name, tensor in tensors}
        args = _arguments(inputs, model)
    if prepare is not None:
        prepare(state)
    surroundings = (
        _unchanged(model),
        stack.following(model),
        _marked(),
        torch.inference_mode(False),  # in which operations pass the modes by
        torch.no_grad(),
        fake,
        *modes,
    )
    with contextlib.ExitStack() as entered:
        for context in surroundings:
            entered.enter_context(context)
        _call(model, state, args)


def _call(model: nn.Module, state: dict[str, Tensor], args: tuple) -> None:
    try:
        torch.func.functional_call(model, state, args)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"the forward of {type(model).__name__} depends on the values of its tensors "
            f"({error}); it cannot be followed without them"
        ) from error


def _like(tensor: Tensor) -> Tensor:
    """A tensor of that shape, layout and type under the present fake mode."""
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


def _arguments(inputs: Inputs, model: nn.Module) -> tuple:
    if isinstance(inputs, Tensor):
        return (torch.empty((1, *inputs.shape[1:]), dtype=inputs.dtype, device=inputs.device),)
    pair = (inputs, inputs) if isinstance(inputs, int) else inputs
    if len(pair) == 2 and all(isinstance(side, int) for side in pair):
        if min(pair) < 1:
            raise ValueError(f"an image size is at least 1 pixel, got {inputs!r}")
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        return (torch.empty((1, 3, *pair), dtype=weight.dtype, device=weight.device),)
    return tuple(_like(value) if isinstance(value, Tensor) else value for value in pair)


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module's attributes are what they were, since a
    forward may keep what it computed (a gathered bias, a grid), here without values."""
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    containers = [
        (value, value.copy())
        for _, saved in attributes
        for value in saved.values()
        if isinstance(value, (dict, list, set))
    ]
    if any(module.training for module in model.modules()):
        model.eval()
    try:
        yield
    finally:
        for present, saved in attributes:
            present.clear()
            present.update(saved)
        for value, saved in containers:
            value.clear()
            value.extend(saved) if isinstance(value, list) else value.update(saved)


@contextlib.contextmanager
def _marked() -> Iterator[None]:
    before, _THREAD.running = _THREAD.running, True
    try:
        yield
    finally:
        _THREAD.running = before
