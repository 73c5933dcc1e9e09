"""Token distillation: train some parameters so that a model's tokens match another's.

No labels are needed. Both the recovery of a sparse model (`sievit.sparsify.recover`) and
the training of codecs (`sievit.ae.train_codec`) are this with different parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from ..running import evaluating
from .feeding import Batches
from .loop import Checkpointing, Listener, Trained, train
from .objectives import TokenDistillation, TokenLoss
from .recipe import Recipe


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    parameters: Iterable[nn.Parameter],
    *,
    steps: int | None = None,
    seconds: float | None = None,
    recipe: Recipe = Recipe(),
    loss: TokenLoss = TokenLoss(),
    extra: nn.Module | None = None,
    before_step: Callable[[int], None] | None = None,
    checkpointing: Checkpointing | None = None,
    listener: Listener | None = None,
) -> Trained:
    """Train ``parameters`` so that ``student`` gives ``teacher``'s tokens on ``batches``.

    student     the model as changed (mask, codec attached); runs in eval mode, as
                ``teacher`` does, so that dropout does not blur the target
    teacher     the dense model, a separate copy; never changed
    batches     image tensors, at least as many as steps
    parameters  what to train; the rest of ``student`` is frozen meanwhile

    The rest, and errors, as in `TokenDistillation` and `sievit.models.training.loop.train`.
    """
    objective = TokenDistillation(student, teacher, loss, extra)
    with evaluating(teacher):
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
