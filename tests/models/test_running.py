"""Whoever runs a model in eval mode leaves every submodule in the mode that it was in."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sievit.ae import QKCodec, codec_errors, head_moments
from sievit.models import create, find_attention, trace
from sievit.models.costs.run_profile import profile_run
from sievit.models.running import evaluating, image_size_of
from sievit.models.training.distill import distill
from sievit.models.training.recipe import Recipe
from sievit.sparsify import accuracy, average_attention, evaluate, token_features
from sievit.sparsify.finetune import finetune
from sievit.sparsify.int8 import calibrate_int8
from sievit.sparsify.taylor import taylor_importance
from sievit.studies.processors import _network_seconds
from sievit.workload import HeadCodec

SIZE = 16
CODECS = [QKCodec(HeadCodec(2, 1)) for _ in range(2)]
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3])


def network(**overrides) -> nn.Module:
    small = {"image_size": SIZE, "patch_size": 8, "dim": 16, "depth": 2, "heads": 2}
    return create("vit_tiny", **(small | {"num_classes": 5} | overrides))


def cross_entropy(model: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass
class Pass:
    """What a measured row tells of how it is repeated."""

    kernel: str = "fused"
    batch: int = 1
    passes: int = 1


def distilled(teacher: nn.Module):
    student, recipe = network(), Recipe(warmup_steps=0)
    return distill(student, teacher, [IMAGES], student.parameters(), steps=1, recipe=recipe)


def finetuned(teacher: nn.Module):
    recipe = Recipe(warmup_steps=0)
    return finetune(network(), [IMAGES], teacher=teacher, steps=1, recipe=recipe)


def judged(model: nn.Module):
    dense = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    return evaluate(model, dense, [IMAGES], image_size=SIZE)


CALLERS = {
    "token_features": lambda model: token_features(model, [IMAGES]),
    "accuracy": lambda model: accuracy(model, [IMAGES], LABELS.tolist()),
    "evaluate": judged,
    "calibrate_int8": lambda model: calibrate_int8(model, [IMAGES]),
    "head_moments": lambda model: head_moments(model, [IMAGES]),
    "codec_errors": lambda model: codec_errors(model, CODECS, [IMAGES]),
    "taylor_importance": lambda m: taylor_importance(m, [(IMAGES, LABELS)], cross_entropy),
    "average_attention": lambda model: average_attention(model, [IMAGES]),
    "profile_run": lambda model: profile_run(model, repeats=1),
    "find_attention": find_attention,
    "trace": trace,
    "distill, teacher": distilled,
    "finetune, teacher": finetuned,
    "network seconds": lambda model: _network_seconds(Pass(), model, SIZE, "cpu"),
}


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def mixed(training: bool) -> tuple[nn.Module, dict[str, bool]]:
    """A model in one mode with the MLP of its first block in the other."""
    model = network().train(training)
    model.blocks[0].mlp.train(not training)
    return model, modes(model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CALLERS)
def test_every_submodule_keeps_its_mode(name, training):
    model, before = mixed(training)
    seen: list[bool] = []
    model.blocks[0].mlp.register_forward_hook(lambda m, *_: seen.append(m.training))
    CALLERS[name](model)
    assert seen
    assert not any(seen)
    assert modes(model) == before
    assert len(set(before.values())) == 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CALLERS)
def test_every_submodule_keeps_its_mode_when_the_forward_raises(name, training):
    model, before = mixed(training)

    def fail(*_):
        raise RuntimeError("stop here")

    model.blocks[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop here"):
        CALLERS[name](model)
    assert modes(model) == before


def test_evaluating_sets_eval_mode_inside_only():
    model, before = mixed(True)
    with evaluating(model):
        assert not any(modes(model).values())
    assert modes(model) == before


def test_the_size_is_the_given_one_then_the_models_own_then_224():
    model = network()
    assert image_size_of(model) == SIZE
    assert image_size_of(model, 48) == 48
    assert image_size_of(nn.Linear(2, 2)) == 224
    assert image_size_of(nn.Linear(2, 2), 32) == 32


def test_a_size_of_two_sides_is_the_models_own_as_it_stands():
    model = nn.Identity()
    model.image_size = (32, 64)
    assert image_size_of(model) == (32, 64)
    assert image_size_of(model, 48) == 48
    model.image_size = None
    assert image_size_of(model) == 224
