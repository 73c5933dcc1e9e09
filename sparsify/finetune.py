"""Recover and fine-tune a model with its mask, and its codec, fixed in the graph.

`recover` distils the dense model's tokens into the sparse one without labels: what minutes
give. `finetune` is the same loop in full: labels or a teacher, gradual sparsity, a moving
average, checkpoints, several processes. ViTCoD fine-tunes with labels for 100 epochs
(section VI-A).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from torch import nn

from ..models import Handle
from ..models.running import evaluating
from ..models.training.blocks import checkpoint_activations, transformer_blocks
from ..models.training.distill import distill
from ..models.training.feeding import Batches
from ..models.training.loop import Checkpointing, Listener, Trained, train
from ..models.training.objectives import Labelled, TokenDistillation, TokenLoss
from ..models.training.recipe import Recipe
from ..workload import AttentionMask
from .adapt import attach
from .threshold import threshold


def recover(
    student: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    loss: TokenLoss = TokenLoss(),
    recipe: Recipe = Recipe(),
    listener: Listener | None = None,
) -> Trained:
    """Train the blocks of ``student``, mask and codec attached, to give ``teacher``'s tokens.

    The budget is ``steps`` or ``seconds``; other arguments and errors as in
    `sievit.models.training.loop.train`.
    """
    return distill(
        student,
        teacher,
        batches,
        block_parameters(student),
        steps=steps,
        seconds=seconds,
        loss=loss,
        recipe=recipe,
        listener=listener,
    )


def finetune(
    student: nn.Module,
    batches: Batches,
    *,
    teacher: nn.Module | None = None,
    loss: TokenLoss = TokenLoss(),
    label_smoothing: float = 0.0,
    extra: nn.Module | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    recipe: Recipe = Recipe(),
    gradual: GradualMask | None = None,
    recompute: bool = False,
    checkpointing: Checkpointing | None = None,
    listener: Listener | None = None,
) -> Trained:
    """Fine-tune ``student``, with what is attached to it.

    batches     (images, labels); images alone will do where there is a ``teacher``
    teacher     the dense model: its tokens are distilled, weighed as ``loss`` says, and
                labels are not used. None: cross entropy of the logits
    extra       a further term of the loss, with its parameters (`sievit.ae.Reconstruction`)
    parameters  what to train; None is the blocks with a teacher, all of the model without,
                and in both cases those of ``extra``
    gradual     masks that grow sparser as the steps go on; needs ``steps``
    recompute   compute the inside of each block again in the backward pass, for memory

    The rest, and errors, as in `TokenDistillation`, `Labelled` and
    `sievit.models.training.loop.train`.
    """
    before_step = None
    if gradual is not None:
        if steps is None:
            raise ValueError("a gradual mask follows the steps; give steps, not seconds")
        before_step = gradual.on(student, steps)
    if teacher is None:
        objective: nn.Module = Labelled(student, label_smoothing, extra)
    else:
        objective = TokenDistillation(student, teacher, loss, extra)
    if parameters is None:
        own = student.parameters() if teacher is None else block_parameters(student)
        parameters = [*own, *(extra.parameters() if extra is not None else ())]
    still = contextlib.nullcontext() if teacher is None else evaluating(teacher)
    with still, _recomputed(student) if recompute else contextlib.nullcontext():
        return train(
            objective,
            batches,
            parameters,
            steps=steps,
            seconds=seconds,
            recipe=recipe,
            before_step=before_step,
            checkpointing=checkpointing,
            listener=listener,
        )


class GradualMask:
    """Masks of averaged attention that grow sparser, in ``changes`` stages.

    The sparsity after a share t of the ramp is final * (1 - (1 - t)^3) (Zhu & Gupta 2017,
    from 0); the ramp ends at ``ramp`` of the steps, and the final mask stays. The handle of
    the mask in place is ``handle``.
    """

    def __init__(
        self,
        maps: Sequence[np.ndarray],
        sparsity: float,
        *,
        prefix_tokens: int = 1,
        image_size: int | None = None,
        ramp: float = 0.5,
        changes: int = 10,
    ) -> None:
        if not 0.0 < ramp <= 1.0:
            raise ValueError(f"ramp is a share of the steps in (0, 1], got {ramp}")
        if changes < 1:
            raise ValueError(f"changes must be at least 1, got {changes}")
        self.maps, self.sparsity, self.prefix_tokens = maps, sparsity, prefix_tokens
        self.image_size, self.ramp, self.changes = image_size, ramp, changes
        self.handle: Handle | None = None
        self.stage = 0

    def sparsity_at(self, stage: int) -> float:
        """Sparsity of stage 1 .. changes, the last of which is the final one."""
        return self.sparsity * (1.0 - (1.0 - stage / self.changes) ** 3)

    def mask_at(self, stage: int) -> AttentionMask:
        return threshold(
            self.maps, sparsity=self.sparsity_at(stage), prefix_tokens=self.prefix_tokens
        )

    def on(self, model: nn.Module, steps: int) -> Callable[[int], None]:
        """What `train` calls before each step: puts the stage's mask in where it changes."""

        def before_step(step: int) -> None:
            share = min(1.0, step / (self.ramp * steps))
            stage = min(self.changes, 1 + int(share * (self.changes - 1) + 1e-9))
            if stage == self.stage:
                return
            if self.handle is not None:
                self.handle.remove()
            self.handle = attach(model, self.mask_at(stage), image_size=self.image_size)
            self.stage = stage

        return before_step


@contextlib.contextmanager
def _recomputed(model: nn.Module) -> Iterator[None]:
    undo = checkpoint_activations(model)
    try:
        yield
    finally:
        undo()


def block_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the transformer blocks; all parameters where no block list is found.

    Embeddings, positions, the final norm and the head stay as they were pretrained.
    """
    for block in transformer_blocks(model):
        yield from block.parameters()
