"""The transformer blocks of a model: what is trained, what is recomputed, what they give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(model: nn.Module) -> Callable[[], None]:
    """Recompute each transformer block in the backward pass instead of keeping its inside.

    Returns a function that undoes it.
    """
    blocks = list(transformer_blocks(model))
    previous = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = _Recomputed(block.forward)

    def undo() -> None:
        for block, forward in zip(blocks, previous, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward

    return undo


class _Recomputed:
    """A forward whose inside is computed again for the gradient."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


@contextlib.contextmanager
def block_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """The tokens that each transformer block gives in a forward inside, in order.

    Of a tuple the first entry counts; a block that gives no tensor is left out.
    """
    found: list[Tensor] = []

    def keep(block: nn.Module, given: Any, made: Any) -> None:
        made = made[0] if isinstance(made, tuple) else made
        if isinstance(made, Tensor):
            found.append(made)

    blocks = [block for block in transformer_blocks(model) if block is not model]
    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def transformer_blocks(model: nn.Module) -> Iterable[nn.Module]:
    """The blocks of ``model``: the module list with most parameters; ``model`` without one."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    lists = [m for m in lists if len(m) > 1]
    largest = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=None)
    return [model] if largest is None else list(largest)
