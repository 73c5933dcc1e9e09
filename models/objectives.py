"""What training minimises: modules that take a batch and give named terms of a loss.

An objective holds the student as a submodule, so that it can be trained over several
processes as one module; the teacher is held outside it. Their sum is the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionCall, find_attention
from .features import features
from .intercept import AttentionHook, intercept

Terms = dict[str, Tensor]


class TokenDistillation(nn.Module):
    """The student's final tokens as the teacher's: mean over all tokens of 1 - cosine.

    student           the changed model, trained; its input is [batch, 3, height, width]
    teacher           the dense model, never trained
    attention_weight  of a second term: mean over layers, heads and queries of the
                      Kullback-Leibler divergence of the student's attention from the
                      teacher's, the latter renormalised over what the student keeps
    extra             gives a further term when called after a forward (a codec's
                      reconstruction); its parameters belong to the objective

    Batches are images, or tuples whose first entry they are. No labels are needed.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        attention_weight: float = 0.0,
        extra: nn.Module | None = None,
    ) -> None:
        if student is teacher:
            raise ValueError(
                "the teacher must be a separate copy of the model, not the student itself"
            )
        super().__init__()
        self.student = student
        self.attention_weight = attention_weight
        self.extra = extra
        self._teacher = (teacher,)  # in a tuple: not a submodule, not in the state dict
        self._watched = (_Watched(teacher), _Watched(student))

    def forward(self, batch: Tensor | Sequence[Tensor]) -> Terms:
        images = batch if isinstance(batch, Tensor) else batch[0]
        if self.attention_weight:
            teacher, student = self._watched
            with torch.no_grad():
                wanted, wanted_maps = teacher(images)
            got, maps = student(images)
        else:
            with torch.no_grad():
                wanted = features(self._teacher[0], images)
            got = features(self.student, images)
        cosine = F.cosine_similarity(got.float(), wanted.float(), dim=-1)
        terms = {"tokens": (1.0 - cosine).mean()}
        if self.attention_weight:
            divergences = [_divergence(w, g) for w, g in zip(wanted_maps, maps, strict=True)]
            terms["attention"] = self.attention_weight * torch.stack(divergences).mean()
        if self.extra is not None:
            terms["codec"] = self.extra()
        return terms


class Labelled(nn.Module):
    """Cross entropy of the student's logits; batches are (images, class indices).

    extra  as in `TokenDistillation`
    """

    def __init__(
        self,
        student: nn.Module,
        label_smoothing: float = 0.0,
        extra: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.label_smoothing = label_smoothing
        self.extra = extra

    def forward(self, batch: Sequence[Tensor]) -> Terms:
        if isinstance(batch, Tensor):
            raise ValueError("labelled training needs batches (images, labels), got images alone")
        images, labels = batch[0], batch[1]
        logits = self.student(images)
        logits = logits.logits if hasattr(logits, "logits") else logits
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        terms = {"labels": loss}
        if self.extra is not None:
            terms["codec"] = self.extra()
        return terms


class _Watched:
    """A model whose attention is given beside its tokens."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: tuple[AttentionCall, ...] | None = None

    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Final tokens, and the probabilities [batch, heads, queries, keys] of every call."""
        if self.calls is None:
            self.calls = find_attention(self.model, images[:1])
        maps: list[Tensor] = []
        hooks = [AttentionHook(observe=maps.append) for _ in self.calls]
        with intercept(self.model, hooks, self.calls):
            return features(self.model, images), maps


def _divergence(wanted: Tensor, got: Tensor) -> Tensor:
    """KL(wanted || got) a row, mean over rows; wanted is taken where got is not 0."""
    kept = got > 0
    target = torch.where(kept, wanted.float(), 0.0)
    target = target / target.sum(-1, keepdim=True).clamp_min(1e-12)
    reached = torch.where(kept, got.float(), 1.0)
    ratio = target.clamp_min(1e-12).log() - reached.clamp_min(1e-12).log()
    return (target * ratio).sum(-1).mean()
