"""Train codecs through the model: reconstruction plus distillation loss.

ViTCoD section V adds to the task loss 1e-4 x the Euclidean norm of the reconstruction
error, summed over layers and over Q and K. The norm of a whole batch grows with its
size; the default here is the relative squared error, ``published`` is the paper's form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from ..models.distill import Distilled, Recipe, distill
from .adapt import Pair, attach_codec
from .codec import QKCodec

PUBLISHED_WEIGHT = 1e-4
RELATIVE_WEIGHT = 0.01
CODEC_RECIPE = Recipe(learning_rate=1e-3, weight_decay=0.0, full_rate_loss=0.0)


def train_codec(
    student: nn.Module,
    teacher: nn.Module,
    codecs: Sequence[QKCodec],
    batches: Iterable[Tensor],
    *,
    steps: int | None = None,
    seconds: float | None = None,
    published: bool = False,
    weight: float | None = None,
    recipe: Recipe = CODEC_RECIPE,
    progress: Callable[[float, float], None] | None = None,
) -> Distilled:
    """Train ``codecs`` so that ``student``, coded by them, keeps ``teacher``'s tokens.

    student    the model, with a mask attached or not; its own weights stay. The codecs
               are attached for the training alone: `attach_codec` afterwards
    published  the paper's reconstruction term instead of the relative error
    weight     of the reconstruction term; 1e-4 for the paper's, else 0.01

    Budget, progress and errors as in `sievit.models.distill.distill`.
    """
    factor = weight if weight is not None else PUBLISHED_WEIGHT if published else RELATIVE_WEIGHT
    measure = error_norm if published else relative_error
    terms: list[Tensor] = []

    def watch(plain: Pair, coded: Pair) -> None:
        terms.extend(measure(c, p) for p, c in zip(plain, coded, strict=True))

    def reconstruction() -> Tensor:
        total = factor * sum(terms)
        terms.clear()
        return total

    with attach_codec(student, codecs, watcher=watch):
        return distill(
            student,
            teacher,
            batches,
            (parameter for codec in codecs for parameter in codec.parameters()),
            steps=steps,
            seconds=seconds,
            recipe=recipe,
            extra_loss=reconstruction,
            progress=progress,
        )


def error_norm(coded: Tensor, plain: Tensor) -> Tensor:
    """The paper's term: Euclidean norm of the error, over the whole batch."""
    return (coded - plain).norm()


def relative_error(coded: Tensor, plain: Tensor) -> Tensor:
    """Squared error over the squared norm of what was coded."""
    return (coded - plain).square().sum() / plain.square().sum()
