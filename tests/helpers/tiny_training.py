"""A model small enough to train in a test, its batches and its states."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sievit.models import create
from sievit.models.training.recipe import Recipe
from sievit.sparsify import attach, average_attention, threshold

PLAIN = Recipe(learning_rate=2e-3, full_rate_loss=0.0, warmup_steps=2, bf16=False)


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = create(
        "deit_tiny", image_size=32, patch_size=8, dim=16, heads=2, depth=2, num_classes=3
    ).eval()
    for block in model.blocks:  # so that attention matters
        block.attn.qkv.weight.data *= 8
        block.attn.proj.weight.data *= 3
    return model


def image_batch(index: int, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(index))


def labelled_batch(index: int, count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return image_batch(index, count), torch.randint(0, 3, (count,), generator=generator)


def stream(start: int = 0):
    index = start
    while True:
        yield labelled_batch(index)
        index += 1


def masked_student(seed: int = 1) -> tuple[nn.Module, nn.Module]:
    teacher = tiny(seed)
    student = copy.deepcopy(teacher)
    attach(student, threshold(average_attention(teacher, [image_batch(0)]), sparsity=0.7))
    return student, teacher


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class Killed(BaseException):
    """Stands for a kill: nothing in the library catches it."""
