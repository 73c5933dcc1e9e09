"""Short recovery: distil the dense model's tokens into the sparse one, without labels.

The mask (and the codec) stay fixed in the graph; the blocks' weights move so that the
final tokens come back to the dense model's. ViTCoD itself fine-tunes with labels for 100
epochs (section VI-A); this is what minutes give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from ..models.distill import Distilled, Recipe, distill


def recover(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Tensor],
    *,
    steps: int | None = None,
    seconds: float | None = None,
    recipe: Recipe = Recipe(),
    progress: Callable[[float, float], None] | None = None,
) -> Distilled:
    """Train the blocks of ``student``, mask and codec attached, to give ``teacher``'s tokens.

    The budget is ``steps`` or ``seconds``; other arguments and errors as in
    `sievit.models.distill.distill`.
    """
    return distill(
        student,
        teacher,
        batches,
        block_parameters(student),
        steps=steps,
        seconds=seconds,
        recipe=recipe,
        progress=progress,
    )


def block_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the transformer blocks; all parameters where no block list is found.

    Embeddings, positions, the final norm and the head stay as they were pretrained.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    blocks = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=model)
    return blocks.parameters()
