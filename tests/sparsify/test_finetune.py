"""Recovery: the blocks of a sparse model distilled from the dense one."""

from __future__ import annotations

import copy

import pytest
import torch
from sparse_cases import photos, tiny

from sievit.models.training.distill import distill
from sievit.models.training.recipe import Recipe, rate_scale
from sievit.sparsify import (
    attach,
    average_attention,
    recover,
    threshold,
)
from sievit.sparsify.finetune import block_parameters


def recovery(steps=None, seconds=None, **recipe):
    teacher, images = tiny(1), photos(8, 1)
    student = copy.deepcopy(teacher)
    mask = threshold(average_attention(teacher, [images]), sparsity=0.75)
    attach(student, mask)
    before = {n: p.clone() for n, p in student.named_parameters()}
    settings = {"learning_rate": 2e-3, "full_rate_loss": 0.0, "warmup_steps": 2, "bf16": False}
    settings |= recipe
    log = recover(
        student,
        teacher,
        [images] * 60,
        steps=steps,
        seconds=seconds,
        recipe=Recipe(**settings),
    )
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    return student, log, changed


def test_recovery_trains_blocks_alone_and_comes_closer():
    student, log, changed = recovery(steps=25)
    assert log.steps == len(log.losses) == 25
    assert log.losses[-1] < 0.7 * log.losses[0]
    assert changed
    assert all(name.startswith("blocks.") for name in changed)
    assert all(p.requires_grad for p in student.parameters())


def test_recovery_repeats():
    first, again = recovery(steps=5), recovery(steps=5)
    assert first[1].losses == again[1].losses
    for one, other in zip(first[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_rate_shrinks_with_a_small_first_loss():
    assert rate_scale(0.4, 0.2) == rate_scale(0.05, 0.0) == 1.0
    assert rate_scale(0.05, 0.2) == pytest.approx(0.25)
    bold, careful = recovery(steps=1), recovery(steps=1, full_rate_loss=100.0)
    moved = []
    for student, log, _ in (bold, careful):
        start = tiny(1)
        pairs = zip(student.blocks.parameters(), start.blocks.parameters(), strict=True)
        moved.append(max(float((a - b).detach().abs().max()) for a, b in pairs))
        assert log.losses[0] < 1.0
    assert moved[1] < 0.02 * moved[0]


def test_recovery_by_seconds_records_its_steps():
    _, log, _ = recovery(seconds=0.2)
    assert 1 <= log.steps == len(log.losses) <= 60
    assert log.seconds >= 0.2 or log.steps == 60


@pytest.mark.parametrize(
    "budget", [{}, {"steps": 1, "seconds": 1.0}, {"steps": 0}, {"seconds": -1}]
)
def test_budgets_that_make_no_sense(budget):
    with pytest.raises(ValueError, match=r"steps.*seconds"):
        recover(tiny(), tiny(), [], **budget)


def test_a_loss_that_is_not_finite_stops_with_step_and_rate():
    student, teacher = tiny(), tiny()
    student.norm.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="nan at step 0, rate"):
        distill(student, teacher, [photos(2)], block_parameters(student), steps=1,
                recipe=Recipe(learning_rate=2.5e-3, warmup_steps=0, bf16=False))  # fmt: skip
    assert all(p.requires_grad for p in student.parameters())


def test_block_parameters_of_a_model_without_blocks_are_all():
    plain = torch.nn.Linear(3, 3)
    assert len(list(block_parameters(plain))) == 2
