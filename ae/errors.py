"""What codecs do to each layer of a model as it runs: errors of Q, of K and of the attention.

Explained variance is what a closed form keeps of the photos it was fitted to; these are
errors on any photos, of any codec, with the mask in place or not, and with what the layers
before have changed already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from ..models import AttentionHook, find_attention, intercept
from ..models.running import evaluating, image_size_of, images_for
from .adapt import Pair, attach_codec
from .codec import Codecs
from .train import relative_error


@dataclass(frozen=True)
class CodecErrors:
    """Of one layer, means over the images.

    q, k       squared error of the decoded vectors over the squared norm of the coded ones,
               in the codec's basis
    attention  half the absolute difference of attention with and without the codecs, summed
               over the keys, mean over heads and queries: the share of the attention that
               has moved to other keys, 0 to 1
    """

    q: float
    k: float
    attention: float


class _Seen(AttentionHook):
    """The last probabilities of one call."""

    def __init__(self) -> None:
        super().__init__(observe=self._take)
        self._last: Tensor | None = None

    def _take(self, probabilities: Tensor) -> None:
        self._last = probabilities.detach()

    @property
    def probabilities(self) -> Tensor:
        if self._last is None:
            raise RuntimeError("this call of attention was not made in the forward")
        return self._last


@torch.no_grad()
def codec_errors(
    model: nn.Module,
    codecs: Codecs,
    batches: Iterable[Tensor],
    image_size: int | None = None,
) -> tuple[CodecErrors, ...]:
    """The errors of ``codecs`` in ``model``, a layer each, over all batches.

    model  without these codecs, with a mask attached or not; it is left as it was

    One batch's attention maps are held at a time. Raises ValueError for no images.
    """
    calls = find_attention(model, image_size_of(model, image_size))
    pairs: dict[int, tuple[float, float]] = {}

    def watch(layer: int, plain: Pair, coded: Pair) -> None:
        of_q, of_k = (relative_error(c, p) for p, c in zip(plain, coded, strict=True))
        pairs[layer] = float(of_q), float(of_k)

    sums, images = torch.zeros(len(calls), 3, dtype=torch.float64), 0
    with evaluating(model):
        for batch in batches:
            inputs = images_for(model, batch)
            plain, coded = [_Seen() for _ in calls], [_Seen() for _ in calls]
            with intercept(model, plain, calls):
                model(inputs)
            with (
                attach_codec(model, codecs, image_size, watch),
                intercept(model, coded, calls),
            ):
                model(inputs)
            for layer, (one, other) in enumerate(zip(plain, coded, strict=True)):
                moved = (one.probabilities - other.probabilities).abs().sum(dim=-1).mean() / 2
                sums[layer] += len(inputs) * torch.tensor([*pairs[layer], float(moved)])
            images += len(inputs)
    if not images:
        raise ValueError("errors of codecs are measured on images, got none")
    return tuple(CodecErrors(*row) for row in (sums / images).tolist())


def mean_errors(rows: Sequence[CodecErrors]) -> CodecErrors:
    """Mean over the layers."""
    columns = zip(*map(astuple, rows), strict=True)
    return CodecErrors(*(sum(column) / len(rows) for column in columns))
