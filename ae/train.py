"""Train codecs through the model: reconstruction plus distillation loss.

ViTCoD section V adds to the task loss 1e-4 x the Euclidean norm of the reconstruction
error, summed over layers and over Q and K. The norm of a whole batch grows with its
size; the default here is the relative squared error, ``published`` is the paper's form.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..models.training.distill import distill
from ..models.training.feeding import Batches
from ..models.training.loop import Checkpointing, Listener, Trained
from ..models.training.objectives import summed
from ..models.training.recipe import Recipe
from .adapt import Pair, attach_codec
from .codec import Codecs

PUBLISHED_WEIGHT = 1e-4
RELATIVE_WEIGHT = 0.01
CODEC_RECIPE = Recipe(learning_rate=1e-3, weight_decay=0.0, full_rate_loss=0.0)


class Reconstruction(nn.Module):
    """The codecs' own term of a loss: how far decoded Q and K are from what was coded.

    Attach it with ``attach_codec(model, codecs, watcher=reconstruction.watch)``; its value
    after a forward of the model is the sum over layers and over Q and K.

    published  the paper's form instead of the relative error
    weight     factor; 1e-4 for the paper's form, else 0.01
    """

    def __init__(
        self, codecs: Codecs, published: bool = False, weight: float | None = None
    ) -> None:
        super().__init__()
        self.codecs = codecs if isinstance(codecs, nn.ModuleList) else nn.ModuleList(codecs)
        default = PUBLISHED_WEIGHT if published else RELATIVE_WEIGHT
        self.weight = default if weight is None else weight
        self.measure = error_norm if published else relative_error
        self.errors: dict[int, Tensor] = {}

    def watch(self, layer: int, plain: Pair, coded: Pair) -> None:
        q, k = (self.measure(c, p) for p, c in zip(plain, coded, strict=True))
        self.errors[layer] = q + k

    def forward(self) -> Tensor:
        return self.weight * summed(self.errors.values())


def train_codec(
    student: nn.Module,
    teacher: nn.Module,
    codecs: Codecs,
    batches: Batches,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    published: bool = False,
    weight: float | None = None,
    recipe: Recipe = CODEC_RECIPE,
    checkpointing: Checkpointing | None = None,
    listener: Listener | None = None,
) -> Trained:
    """Train ``codecs`` so that ``student``, coded by them, keeps ``teacher``'s tokens.

    student    the model, with a mask attached or not; its own weights stay. The codecs
               are attached for the training alone: `attach_codec` afterwards
    published  the paper's reconstruction term instead of the relative error
    weight     of the reconstruction term; 1e-4 for the paper's, else 0.01

    The rest, and errors, as in `sievit.models.training.loop.train`.
    """
    reconstruction = Reconstruction(codecs, published, weight)
    with attach_codec(student, codecs, watcher=reconstruction.watch):
        return distill(
            student,
            teacher,
            batches,
            reconstruction.parameters(),
            steps=steps,
            seconds=seconds,
            recipe=recipe,
            extra=reconstruction,
            checkpointing=checkpointing,
            listener=listener,
        )


def error_norm(coded: Tensor, plain: Tensor) -> Tensor:
    """The paper's term: Euclidean norm of the error, over the whole batch."""
    return (coded - plain).norm()


def relative_error(coded: Tensor, plain: Tensor) -> Tensor:
    """Squared error over the squared norm of what was coded."""
    return (coded - plain).square().sum() / plain.square().sum()
