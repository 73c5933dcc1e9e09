"""Training of the codecs alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from codec_cases import tiny_vit

from sievit.ae import (
    QKCodec,
    attach_codec,
    fit_codecs,
    head_moments,
    train_codec,
)
from sievit.ae.train import CODEC_RECIPE, error_norm, relative_error
from sievit.models import features
from sievit.workload import HeadCodec


@pytest.mark.parametrize("published", [False, True])
def test_training_moves_the_codecs_alone(published):
    teacher, student = tiny_vit(3), tiny_vit(3)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    fitted = fit_codecs(head_moments(student, [images]), latent_heads=2, rotation=True)
    weights = {n: v.clone() for n, v in student.state_dict().items()}
    recipe = replace(CODEC_RECIPE, learning_rate=5e-3, warmup_steps=2, bf16=False)
    log = train_codec(
        student,
        teacher,
        fitted.codecs,
        [images] * 40,
        steps=25,
        published=published,
        weight=0.0,
        recipe=recipe,
    )
    assert log.steps == len(log.losses) == 25
    assert log.losses[-1] < 0.9 * log.losses[0]
    assert all(torch.equal(v, weights[n]) for n, v in student.state_dict().items())
    assert all(p.requires_grad for p in student.parameters())


def test_the_reconstruction_term_is_in_the_loss():
    model, teacher = tiny_vit(4), tiny_vit(4)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    losses = {}
    for published in (False, True):
        for weight in (0.0, 0.5):
            fitted = fit_codecs(head_moments(model, [images]), latent_heads=2)
            recipe = replace(CODEC_RECIPE, bf16=False)
            log = train_codec(
                model,
                teacher,
                fitted.codecs,
                [images],
                steps=1,
                published=published,
                weight=weight,
                recipe=recipe,
            )
            losses[published, weight] = log.losses[0]
    fitted = fit_codecs(head_moments(model, [images]), latent_heads=2)
    terms: dict[bool, list[torch.Tensor]] = {False: [], True: []}

    def watch(layer, plain, coded):
        terms[False].extend(map(relative_error, coded, plain))
        terms[True].extend(map(error_norm, coded, plain))

    with torch.no_grad(), attach_codec(model, fitted.codecs, watcher=watch):
        features(model, images)
    for published in (False, True):
        added = losses[published, 0.5] - losses[published, 0.0]
        assert added == pytest.approx(0.5 * float(sum(terms[published])), rel=1e-4)


def test_a_teacher_that_is_the_student_is_refused():
    model = tiny_vit()
    with pytest.raises(ValueError, match="separate copy"):
        train_codec(model, model, [QKCodec(HeadCodec(4, 2))] * 2, [], steps=1)
