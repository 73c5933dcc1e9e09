"""How much of a dense model's features a changed one keeps: the accuracy side of a mask.

Token tensors are [images, tokens, dim] after the final norm. Without labels these are
the figures to judge by; tokens of different photos already have a cosine of about .67
(CLS) and .39 (patches) with DINOv2-small, so always compare with a random mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import features, prefix_tokens
from ..models.features import as_logits
from ..models.running import evaluating, images_for
from ..moved import old_names


@dataclass(frozen=True)
class Fidelity:
    """Means over images (and patch tokens) against the dense model.

    cls_cosine    cosine of the CLS token; None for a model without prefix tokens
    patch_cosine  mean cosine of the patch tokens
    relative_l2   |changed - dense| / |dense| over all tokens of an image
    saliency_iou  intersection over union of saliency above 0.5; None without a decoder
    accuracy      share of images whose largest logit is their class's; None without labels
    """

    images: int
    cls_cosine: float | None
    patch_cosine: float
    relative_l2: float
    saliency_iou: float | None = None
    accuracy: float | None = None


Saliency = Callable[[Tensor, int], Tensor]
"""(patch tokens [images, patches, dim], image size) -> saliency [images, ...] in [0, 1]."""


@torch.no_grad()
def token_features(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Final tokens of every image, float32 [images, tokens, dim] on the CPU, in eval mode.

    ``batches`` as in `average_attention`; each goes where the model is.
    """
    with evaluating(model):
        found = (features(model, images_for(model, batch)) for batch in batches)
        return torch.cat([tokens.float().cpu() for tokens in found])


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Tensor], labels: Sequence[int]) -> float:
    """Share of images whose largest logit is their class's, in eval mode.

    ``labels``: class indices, an image each. Raises ValueError where images are more or less.
    """
    with evaluating(model):
        logits = [as_logits(model(images_for(model, batch))).float().cpu() for batch in batches]
    found = torch.cat(logits).argmax(dim=-1)
    if len(found) != len(labels):
        raise ValueError(f"{len(found)} images, but {len(labels)} labels")
    return float((found == torch.as_tensor(labels)).double().mean())


@torch.no_grad()
def fidelity(
    dense: Tensor,
    changed: Tensor,
    prefix: int,
    saliency: Saliency | None = None,
    image_size: int = 224,
) -> Fidelity:
    """Compare `token_features` of a changed model with the dense model's.

    ``prefix``: tokens before the patches (`sievit.models.prefix_tokens`).
    Raises ValueError where shapes differ.
    """
    if dense.shape != changed.shape:
        raise ValueError(f"features differ in shape: {list(dense.shape)}, {list(changed.shape)}")
    cosine = F.cosine_similarity(dense, changed, dim=-1)  # (images, tokens)
    distance = (changed - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)
    overlap = None
    if saliency is not None:
        overlap = _saliency_iou(dense[:, prefix:], changed[:, prefix:], saliency, image_size)
    return Fidelity(
        images=len(dense),
        cls_cosine=float(cosine[:, 0].mean()) if prefix else None,
        patch_cosine=float(cosine[:, prefix:].mean()),
        relative_l2=float(distance.mean()),
        saliency_iou=overlap,
    )


def _saliency_iou(dense: Tensor, changed: Tensor, saliency: Saliency, image_size: int) -> float:
    """Mean over images; an image with no salient pixel in either map counts as 1."""
    if isinstance(saliency, nn.Module):  # tokens are on the CPU, a decoder may not be
        dense, changed = (images_for(saliency, tokens) for tokens in (dense, changed))
    scores = []
    for one, other in zip(dense.split(8), changed.split(8), strict=True):
        first, second = saliency(one, image_size) > 0.5, saliency(other, image_size) > 0.5
        both = (first & second).flatten(1).sum(1).double()
        either = (first | second).flatten(1).sum(1).double()
        scores.append(torch.where(either > 0, both / either.clamp(min=1), 1.0))
    return float(torch.cat(scores).mean())


def evaluate(
    model: nn.Module,
    dense: Tensor,
    batches: Sequence[Tensor] | Iterable[Tensor],
    saliency: Saliency | None = None,
    image_size: int = 224,
) -> Fidelity:
    """`fidelity` of ``model`` as it stands, on the images that gave ``dense``."""
    changed = token_features(model, batches)
    return fidelity(dense, changed, prefix_tokens(model), saliency, image_size)


__getattr__ = old_names(__name__)
