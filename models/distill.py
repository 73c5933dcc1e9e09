"""Token distillation: train some parameters so that a model's tokens match another's.

No labels are needed. The loss is the mean over all final tokens of 1 - cosine. Both the
recovery of a sparse model (`sievit.sparsify.recover`) and the training of codecs
(`sievit.ae.train_codec`) are this loop with different parameters.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import features


@dataclass(frozen=True)
class Recipe:
    """AdamW settings that work for minutes of recovery at 90 % sparsity, batches of 8.

    Rates tried on a ViT-S/14, 40 steps, patch cosine on 64 photos: 5e-5 gives .878, 1e-4
    .864. They were compared on photos that later judged the recovery, so its figures are
    a little optimistic. AdamW's steps do not shrink with the loss, so a model that is nearly right
    would be moved as far as a broken one, and made worse (at 50 % sparsity .978 fell to
    .945): below ``full_rate_loss`` the rate is scaled by first loss / full_rate_loss.
    """

    learning_rate: float = 5e-5
    full_rate_loss: float = 0.2  # 0: no scaling
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    warmup_steps: int = 10
    bf16: bool | None = None  # None: where the processor has bf16 instructions


@dataclass(frozen=True)
class Distilled:
    """What a distillation did: optimizer ``steps``, wall ``seconds``, ``losses`` a step."""

    steps: int
    seconds: float
    losses: tuple[float, ...]


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Tensor],
    parameters: Iterable[nn.Parameter],
    *,
    steps: int | None = None,
    seconds: float | None = None,
    recipe: Recipe = Recipe(),
    extra_loss: Callable[[], Tensor] | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> Distilled:
    """Train ``parameters`` so that ``student`` gives ``teacher``'s tokens on ``batches``.

    student     the model as changed (mask, codec attached); runs in eval mode, as
                ``teacher`` does, so that dropout does not blur the target
    teacher     the dense model, a separate copy; never changed
    batches     image tensors, at least as many as steps
    parameters  what to train; the rest of ``student`` is frozen meanwhile
    steps       optimizer steps; or ``seconds``, then the rate follows the share of the
                time spent and the steps done are recorded
    extra_loss  called after each student forward, added to the loss (a codec's
                reconstruction)
    progress    called with (share done, loss) after each step

    Raises ValueError for a budget that is not exactly one of the two or not positive or a
    teacher that is the student, and FloatingPointError with step and rate when the loss is
    not finite.
    """
    if student is teacher:
        raise ValueError("the teacher must be a separate copy of the model, not the student itself")
    _check_budget(steps, seconds)
    trained = list(parameters)
    optimizer = torch.optim.AdamW(
        trained, lr=0.0, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    bf16 = has_bf16(trained[0].device) if recipe.bf16 is None else recipe.bf16
    losses: list[float] = []
    begin = time.perf_counter()
    with _training_only(trained, student, teacher):
        for images in batches:
            share = _share(len(losses), steps, time.perf_counter() - begin, seconds)
            if share >= 1.0:
                break
            loss = _loss(student, teacher, images, bf16, extra_loss)
            first = losses[0] if losses else float(loss.detach())
            peak = recipe.learning_rate * _rate_scale(first, recipe.full_rate_loss)
            rate = peak * _schedule(len(losses), share, recipe.warmup_steps)
            _step(optimizer, trained, loss, rate, recipe.clip_norm, len(losses))
            losses.append(float(loss.detach()))
            if progress is not None:
                done = _share(len(losses), steps, time.perf_counter() - begin, seconds)
                progress(min(done, 1.0), losses[-1])
    return Distilled(len(losses), time.perf_counter() - begin, tuple(losses))


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are native there (on a CPU: AVX-512 BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _check_budget(steps: int | None, seconds: float | None) -> None:
    if (steps is None) == (seconds is None):
        raise ValueError(f"give either steps or seconds, got steps={steps}, seconds={seconds}")
    if (steps if steps is not None else seconds) <= 0:
        raise ValueError(f"the budget must be above 0, got steps={steps}, seconds={seconds}")


@contextlib.contextmanager
def _training_only(
    trained: list[nn.Parameter], student: nn.Module, teacher: nn.Module
) -> Iterator[None]:
    """Both models in eval mode and the rest of ``student`` frozen; then as they were."""
    chosen = {id(p) for p in trained}
    frozen = [p for p in student.parameters() if p.requires_grad and id(p) not in chosen]
    was_training = student.training, teacher.training
    for parameter in frozen:
        parameter.requires_grad_(False)
    student.eval()
    teacher.eval()
    try:
        yield
    finally:
        for parameter in trained:
            parameter.grad = None
        for parameter in frozen:
            parameter.requires_grad_(True)
        student.train(was_training[0])
        teacher.train(was_training[1])


def _share(done: int, steps: int | None, spent: float, seconds: float | None) -> float:
    return done / steps if steps is not None else spent / seconds


def _rate_scale(first_loss: float, full_rate_loss: float) -> float:
    """How much of the rate a first loss deserves, at most all of it."""
    return min(1.0, first_loss / full_rate_loss) if full_rate_loss else 1.0


def _schedule(step: int, share: float, warmup_steps: int) -> float:
    """Factor on the rate: linear warm-up by steps, cosine to zero by share of the budget."""
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warm * 0.5 * (1.0 + math.cos(math.pi * share))


def _loss(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    bf16: bool,
    extra_loss: Callable[[], Tensor] | None,
) -> Tensor:
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            wanted = features(teacher, images)
        got = features(student, images)
    cosine = F.cosine_similarity(got.float(), wanted.float(), dim=-1)
    loss = (1.0 - cosine).mean()
    return loss if extra_loss is None else loss + extra_loss()


def _step(
    optimizer: torch.optim.Optimizer,
    trained: list[nn.Parameter],
    loss: Tensor,
    rate: float,
    clip_norm: float,
    step: int,
) -> None:
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {float(loss.detach())} at step {step}, rate {rate:.3g}"
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(trained, clip_norm)
    optimizer.step()
