"""The codec over heads: a linear layer on the heads, attached to a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from codec_cases import random_qk, tiny_vit

from sievit.ae import (
    HeadMoments,
    QKCodec,
    attach_codec,
    fit_closed_form,
    fit_codecs,
    head_moments,
)
from sievit.ae.train import error_norm
from sievit.models import features
from sievit.models.families.vit import Attention
from sievit.workload import HeadCodec


@pytest.mark.parametrize("groups", [1, 2])
def test_parameters_as_counted(groups):
    shape = HeadCodec(4, 2, groups)
    codec = QKCodec(shape)
    assert sum(p.numel() for p in codec.parameters()) == 2 * shape.params_per_side


def test_the_codec_is_a_linear_layer_over_heads():
    codec = QKCodec(HeadCodec(4, 2)).double()
    q, k = random_qk(0)
    rows = q.permute(0, 2, 3, 1)  # heads last, as the released code arranges them
    down = torch.nn.functional.linear(rows, codec.encoder_q.weight, codec.encoder_q.bias)
    up = torch.nn.functional.linear(down, codec.decoder_q.weight, codec.decoder_q.bias)
    torch.testing.assert_close(codec(q, k)[0], up.permute(0, 3, 1, 2))


def test_groups_are_blocks():
    codec = QKCodec(HeadCodec(4, 2, groups=2)).double()
    q, k = random_qk(1)
    whole = codec(q, k)[0]
    changed = q.clone()
    changed[:, 2:] += 1.0
    assert torch.equal(codec(changed, k)[0][:, :2], whole[:, :2])
    assert not torch.allclose(codec(changed, k)[0][:, 2:], whole[:, 2:])


@pytest.mark.parametrize("case", ["plain", "ae"])
def test_golden_attention(golden, case):
    stored = np.load(golden("golden/vitcod_algorithm.npz"))
    prefix = f"attn_h4_{case}/sd/"
    state = {
        name.removeprefix(prefix): torch.from_numpy(stored[name]).double()
        for name in stored.files
        if name.startswith(prefix)
    }
    attention = Attention(64, 4).double()
    parts = ("encoder_q", "decoder_q", "encoder_k", "decoder_k")
    codec = QKCodec(HeadCodec(4, 2)).double()
    attention.load_state_dict({n: v for n, v in state.items() if not n.startswith(parts)})
    model = Holder(attention)
    x = torch.from_numpy(stored[f"attn_h4_{case}/x"])
    wanted = torch.from_numpy(stored[f"attn_h4_{case}/y"])
    losses: list[torch.Tensor] = []
    if case == "ae":
        codec.load_state_dict({n: v for n, v in state.items() if n.startswith(parts)})
        attach_codec(
            model,
            [codec],
            watcher=lambda layer, plain, coded: losses.extend(map(error_norm, coded, plain)),
        )
    with torch.no_grad():
        got = model(x)
    assert (got - wanted).abs().max() <= 1e-10 * wanted.abs().max()
    assert float(sum(losses)) == pytest.approx(
        float(stored[f"attn_h4_{case}/recon_loss"]), abs=1e-10
    )


class Holder(torch.nn.Module):
    """A module whose input is tokens; images become tokens for the search of its calls."""

    def __init__(self, attention: torch.nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x if x.ndim == 3 else x.new_zeros(1, 9, 64))


def test_a_lossless_codec_changes_nothing_and_a_handle_restores():
    model = tiny_vit()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    names = list(model.state_dict())
    with torch.no_grad():
        before = features(model, images)
        fitted = fit_codecs(head_moments(model, [images]), latent_heads=4, rotation=True)
        handle = attach_codec(model, fitted.codecs)
        coded = features(model, images)
        handle.remove()
        after = features(model, images)
    assert (coded - before).abs().max() < 1e-4
    assert torch.equal(before, after)
    assert list(model.state_dict()) == names


def test_codecs_of_the_wrong_number_or_heads_are_named():
    model = tiny_vit()
    with pytest.raises(ValueError, match="makes 2 calls of attention, got 1 codecs"):
        attach_codec(model, [QKCodec(HeadCodec(4, 2))])
    attach_codec(model, [QKCodec(HeadCodec(6, 3))] * 2)
    with pytest.raises(ValueError, match="layer 0 has 4 heads, its codec 6"):
        model(torch.randn(1, 3, 32, 32))


def test_codecs_are_taken_as_a_module_and_anything_else_in_it_is_named():
    model, codecs = tiny_vit(), [QKCodec(HeadCodec(4, 2)) for _ in range(2)]
    images, made = torch.randn(1, 3, 32, 32), []
    for held in (codecs, torch.nn.ModuleList(codecs)):
        with attach_codec(model, held), torch.no_grad():
            made.append(model(images))
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=0)
    with pytest.raises(TypeError, match="layer 1 needs a QKCodec, got Linear"):
        attach_codec(model, torch.nn.ModuleList([codecs[0], torch.nn.Linear(1, 1)]))


def test_a_stored_rotation_loads_under_its_name_of_today_and_of_before():
    fitted, _ = fit_closed_form(*map(HeadMoments.of, random_qk(8)), HeadCodec(4, 2), rotation=True)
    stored = fitted.state_dict()
    assert {"rotation", "key_shift"} < set(stored)
    older = {("turn" if name == "rotation" else name): value for name, value in stored.items()}
    q, k = (x.float() for x in random_qk(9))
    for state in (stored, older):
        codec = QKCodec(HeadCodec(4, 2))
        codec.load_state_dict(state)
        assert torch.equal(codec.rotation, fitted.rotation)
        assert all(map(torch.equal, codec(q, k), fitted(q, k)))
    held = torch.nn.ModuleList([QKCodec(HeadCodec(4, 2))])
    held.load_state_dict({f"0.{name}": value for name, value in older.items()})
    assert torch.equal(held[0].rotation, fitted.rotation)
    assert held[0].rotation is not fitted.rotation


def test_the_rotation_is_reached_by_its_old_name_with_a_warning():
    codec, rotation = QKCodec(HeadCodec(4, 2)), torch.eye(6).expand(4, 6, 6)
    with pytest.warns(DeprecationWarning, match="turn is called rotation"):
        codec.turn = rotation
    assert codec.rotation is rotation
    assert "rotation" in codec.state_dict()
    with pytest.warns(DeprecationWarning, match="turn is called rotation"):
        assert codec.turn is rotation
    moments = HeadMoments.of(random_qk(8)[0])
    with pytest.warns(DeprecationWarning, match="turned is called rotated"):
        turned = moments.turned(rotation.numpy())
    np.testing.assert_array_equal(turned.second, moments.rotated(rotation.numpy()).second)
