"""The training loop: AdamW on some parameters of an objective, over minutes or days.

Warm-up and cosine, gradient accumulation, bf16, a moving average of the weights, several
processes, checkpoints that resume to the same losses. What is minimised is an objective
(`objectives`); what is logged goes to a `TrainingLog`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..running import moved
from .checkpoints import newest_checkpoint, save_checkpoint
from .feeding import Batches, steps_of
from .objectives import summed
from .processes import exchanged, from_first, mean_over_processes, over_processes, rank
from .recipe import Recipe, has_bf16, rate_scale, schedule


@dataclass(frozen=True)
class Trained:
    """What a training did: optimizer ``steps`` and wall ``seconds`` of this run, and the
    ``losses`` of all steps, those before a resume included; ``resumed_at`` steps of them."""

    steps: int
    seconds: float
    losses: tuple[float, ...]
    resumed_at: int = 0


Listener = Callable[[int, float, Mapping[str, float], float], None]
"""Told of each step: (step, rate, terms of the loss, share of the budget done)."""


@dataclass(frozen=True)
class Checkpointing:
    """Where and how often the state is kept, and the ``settings`` a resume must agree with."""

    folder: Path
    every: int = 100
    settings: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"a checkpoint is written every N >= 1 steps, got {self.every}")


def train(
    objective: nn.Module,
    batches: Batches,
    parameters: Iterable[nn.Parameter],
    *,
    steps: int | None = None,
    seconds: float | None = None,
    recipe: Recipe = Recipe(),
    before_step: Callable[[int], None] | None = None,
    checkpointing: Checkpointing | None = None,
    listener: Listener | None = None,
) -> Trained:
    """Train ``parameters`` to lower the sum of ``objective``'s terms.

    objective      forward(batch) -> dict of scalar tensors; the rest of it is frozen
    batches        see `feeding.Batches`; with several processes each passes its own share
    steps          optimizer steps; or ``seconds``, then the rate follows the share of the
                   time spent and the steps done are recorded
    before_step    called with the number of each step before it (a sparsity schedule)
    checkpointing  resumes from the newest whole checkpoint in the folder
    listener       called after each step with (step, rate, terms, share of the budget)

    Where `torch.distributed` is initialised the gradients are averaged over processes.
    Raises ValueError for a budget that is not exactly one of the two or not positive, for
    batches that end before the steps do, and for a resume with other settings, naming
    which differ; FloatingPointError with step, rate and last checkpoint when a loss is not
    finite.
    """
    loop = _Loop(objective, list(parameters), recipe, steps, seconds, checkpointing)
    with loop.only_training():
        loop.resume()
        for micro in steps_of(batches, loop.step, recipe.accumulate):
            share = loop.share()
            if share >= 1.0:
                break
            if before_step is not None:
                before_step(loop.step)
            terms, rate = loop.one_step(micro, share)
            if listener is not None:
                listener(loop.step - 1, rate, terms, min(loop.share(), 1.0))
            loop.keep()
        else:
            if steps is not None and loop.step < steps:
                raise ValueError(f"the batches ended after {loop.step} of {steps} steps")
        loop.use_average()
    return loop.trained()


class _Loop:
    """The state of one training."""

    def __init__(
        self,
        objective: nn.Module,
        trained: list[nn.Parameter],
        recipe: Recipe,
        steps: int | None,
        seconds: float | None,
        checkpointing: Checkpointing | None,
    ) -> None:
        if not trained:
            raise ValueError("there is no parameter to train")
        self.objective, self.parameters, self.recipe = objective, trained, recipe
        self.steps, self.seconds, self.checkpointing = steps, seconds, checkpointing
        self.budget = _budget(steps, seconds)
        self.device = trained[0].device
        self.bf16 = has_bf16(self.device) if recipe.bf16 is None else recipe.bf16
        self.optimizer = torch.optim.AdamW(
            trained, lr=0.0, betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        self.average = [p.detach().clone() for p in trained] if recipe.ema_decay else []
        self.losses: list[float] = []
        self.resumed_at, self.spent = 0, 0.0
        self.begin = time.perf_counter()

    @property
    def step(self) -> int:
        return len(self.losses)

    def share(self) -> float:
        """Share of the budget that is used; the first process's, where there are several."""
        if self.steps is not None:
            return self.step / self.budget
        spent = self.spent + time.perf_counter() - self.begin
        return from_first(spent / self.budget, self.device)

    @contextlib.contextmanager
    def only_training(self) -> Iterator[None]:
        """The objective in eval mode, the rest of it frozen; then as they were.

        Eval mode, so that dropout does not blur the target and running statistics stay. A
        module with a ``train`` of its own keeps things from forward to forward in eval mode
        (timm's LeViT its biases), so it alone, not what is inside it, is in training mode.
        """
        chosen = {id(p) for p in self.parameters}
        rest = [p for p in self.objective.parameters() if p.requires_grad and id(p) not in chosen]
        modes = {module: module.training for module in self.objective.modules()}
        for parameter in rest:
            parameter.requires_grad_(False)
        self.objective.eval()
        for module in modes:
            if type(module).train is not nn.Module.train:
                module.train()
                for inside in module.children():
                    inside.eval()
        self.whole = over_processes(self.objective)
        try:
            yield
        finally:
            for parameter in self.parameters:
                parameter.grad = None
            for parameter in rest:
                parameter.requires_grad_(True)
            for module, mode in modes.items():
                module.training = mode

    def one_step(self, micro: list[Any], share: float) -> tuple[dict[str, float], float]:
        """One optimizer step from its micro-batches: (terms of the loss, rate)."""
        sums: dict[str, float] = {}
        for index, batch in enumerate(micro):
            last = index == len(micro) - 1
            with (
                exchanged(self.whole, last),
                torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16),
            ):
                terms = self.whole(moved(batch, self.device))
                loss = summed(terms.values()) / len(micro)
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + float(term.detach()) / len(micro)
            with exchanged(self.whole, last):
                loss.backward()
        sums = mean_over_processes(sums, self.device)
        total = sum(sums.values())
        rate = self._rate(self.losses[0] if self.losses else total, share)
        if not math.isfinite(total):
            raise FloatingPointError(self._not_finite(total, rate))
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._follow()
        self.losses.append(total)
        return sums, rate

    def _rate(self, first_loss: float, share: float) -> float:
        peak = self.recipe.learning_rate * rate_scale(first_loss, self.recipe.full_rate_loss)
        return peak * schedule(self.step, share, self.recipe.warmup_steps)

    def _not_finite(self, loss: float, rate: float) -> str:
        text = f"the loss is {loss} at step {self.step}, rate {rate:.3g}"
        if self.checkpointing is None:
            return text
        found = newest_checkpoint(self.checkpointing.folder)
        return f"{text}; the last good checkpoint is {found[0] if found else 'none'}"

    def _follow(self) -> None:
        """Move the average towards the weights."""
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        for mean, parameter in zip(self.average, self.parameters, strict=self.average != []):
            mean.lerp_(parameter.detach(), 1.0 - decay)

    def use_average(self) -> None:
        with torch.no_grad():
            for parameter, mean in zip(self.parameters, self.average, strict=False):
                parameter.copy_(mean)

    def keep(self) -> None:
        """Write a checkpoint where one is due; the first process does."""
        plan = self.checkpointing
        if plan is None:
            return
        due = self.step % plan.every == 0 or self.step == self.steps
        if due and rank() == 0:
            save_checkpoint(plan.folder, self.step, self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "settings": self._settings(),
            "parameters": [p.detach() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "losses": self.losses,
            "seconds": self.spent + time.perf_counter() - self.begin,
            "random": torch.get_rng_state(),
        }

    def _settings(self) -> dict[str, Any]:
        own = asdict(self.recipe) | {"betas": list(self.recipe.betas), "steps": self.steps}
        given = self.checkpointing.settings if self.checkpointing else None
        return own | {"seconds": self.seconds} | dict(given or {})

    def resume(self) -> None:
        """Take up the newest whole checkpoint, where there is one."""
        found = newest_checkpoint(self.checkpointing.folder) if self.checkpointing else None
        if found is None:
            return
        path, state = found
        _check_settings(path, state["settings"], self._settings())
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
            for mean, value in zip(self.average, state["average"], strict=True):
                mean.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])
        self.resumed_at, self.spent = self.step, state["seconds"]
        torch.set_rng_state(state["random"])

    def trained(self) -> Trained:
        spent = time.perf_counter() - self.begin
        return Trained(self.step - self.resumed_at, spent, tuple(self.losses), self.resumed_at)


def _budget(steps: int | None, seconds: float | None) -> float:
    """Of ``steps`` and ``seconds`` the one that is given."""
    given = [budget for budget in (steps, seconds) if budget is not None]
    if len(given) != 1:
        raise ValueError(f"give either steps or seconds, got steps={steps}, seconds={seconds}")
    if given[0] <= 0:
        raise ValueError(f"the budget must be above 0, got steps={steps}, seconds={seconds}")
    return given[0]


def _check_settings(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = sorted(set(before) | set(now))
    changed = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(f"{path} was written with other settings: {'; '.join(changed)}")
