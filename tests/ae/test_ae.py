"""Codecs over heads: the module, its closed form, the free turn, folding, training."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.ae import (
    HeadMoments,
    QKCodec,
    attach_codec,
    codec_errors,
    fit_closed_form,
    fit_codecs,
    fold,
    head_moments,
    latent_heads_by_layer,
    latent_heads_for,
    train_codec,
)
from sievit.ae.budget import _most as most
from sievit.ae.closed_form import agreeing_turn
from sievit.ae.train import CODEC_RECIPE, error_norm, relative_error
from sievit.models import AttentionHook, create, features, find_attention, intercept
from sievit.models.families.vit import Attention
from sievit.workload import HeadCodec

quick = settings(derandomize=True, deadline=None, max_examples=15)


def random_qk(seed: int, heads: int = 4, tokens: int = 30, dim: int = 6):
    """Q and K whose heads share directions, turned away from each other, with offsets."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    pair = []
    turns = [torch.linalg.qr(draw(dim, dim))[0] for _ in range(heads)]
    for _ in range(2):
        common = draw(2, 2, tokens, dim)
        weights = draw(heads, 2)
        mixed = torch.einsum("hc,bcnd->bhnd", weights, common)
        turned = torch.stack([mixed[:, h] @ turns[h] for h in range(heads)], dim=1)
        pair.append(turned + 0.05 * draw(2, heads, tokens, dim) + draw(heads, 1, dim))
    return tuple(pair)


@pytest.mark.parametrize(("heads", "latent"), [(3, 2), (4, 2), (5, 3), (6, 3), (8, 4), (12, 6)])
def test_latent_heads_of_the_paper(heads, latent):
    assert latent_heads_for(heads) == latent


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


def test_all_heads_kept_is_the_identity():
    q, k = random_qk(2)
    codec, explained = fit_closed_form(HeadMoments.of(q), HeadMoments.of(k), HeadCodec(4, 4))
    for got, expected in zip(codec.double()(q, k), (q, k), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert explained.q == pytest.approx(1.0)


@quick
@given(seed=st.integers(0, 999), latent=st.integers(1, 4), groups=st.sampled_from([1, 2]))
def test_closed_form_is_the_best_linear_codec(seed, latent, groups):
    if latent % groups:
        latent = groups
    q, k = random_qk(seed)
    shape = HeadCodec(4, latent, groups)
    codec, explained = fit_closed_form(HeadMoments.of(q), HeadMoments.of(k), shape)
    rows = q.permute(0, 2, 3, 1).reshape(-1, 4).numpy()
    error = (codec.double()(q, k)[0] - q).square().mean().item()
    assert error == pytest.approx(_svd_error(rows, latent, groups), rel=1e-4, abs=1e-9)
    variance = rows.var(axis=0).mean()
    assert 1 - error / variance == pytest.approx(explained.q, abs=1e-5)


def _svd_error(rows: np.ndarray, latent: int, groups: int) -> float:
    """Mean squared error of keeping the leading singular directions, block by block."""
    total = 0.0
    for block in np.split(rows - rows.mean(axis=0), groups, axis=1):
        total += (np.linalg.svd(block, compute_uv=False)[latent // groups :] ** 2).sum()
    return total / rows.size


def test_moments_stream():
    q, _ = random_qk(3)
    whole, parts = HeadMoments.of(q), HeadMoments.of(q[:1]) + HeadMoments.of(q[1:])
    assert whole.count == parts.count
    np.testing.assert_allclose(whole.second, parts.second, rtol=1e-12)
    shift = np.random.default_rng(0).standard_normal((4, 6))
    moved = HeadMoments.of(q - torch.from_numpy(shift)[:, None])
    np.testing.assert_allclose(whole.shifted(shift).second, moved.second, atol=1e-9)
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 6, 6)))[0]
    turned = HeadMoments.of(q @ torch.from_numpy(turn))
    np.testing.assert_allclose(whole.turned(turn).second, turned.second, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_turn_is_free_and_makes_heads_agree(groups):
    q, k = random_qk(4)
    moments = HeadMoments.of(q), HeadMoments.of(k)
    shape = HeadCodec(4, 2, groups)
    _, plain = fit_closed_form(*moments, shape)
    codec, turned = fit_closed_form(*moments, shape, rotation=True)
    turn = codec.turn.double()
    identity = torch.eye(6, dtype=torch.float64).expand(4, 6, 6)
    torch.testing.assert_close(turn @ turn.transpose(1, 2), identity, rtol=1e-5, atol=1e-5)
    new_q, new_k = codec.double().in_basis(q, k)
    before = (q @ k.transpose(-2, -1)).softmax(-1)
    after = (new_q @ new_k.transpose(-2, -1)).softmax(-1)
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-5)
    assert turned.q + turned.k > plain.q + plain.k + (0.3 if groups == 1 else 0.1)


def test_agreeing_turn_never_lowers_the_explained_energy(monkeypatch):
    q, k = (HeadMoments.of(x) for x in random_qk(5))
    shape = HeadCodec(4, 2)
    shares = []
    for sweeps in (0, 1, 2, 5, 15):
        monkeypatch.setattr("sievit.ae.closed_form.TURN_SWEEPS", sweeps)
        turn = agreeing_turn(q, k, shape)
        energies = [np.einsum("higi->hg", m.turned(turn).second) for m in (q, k)]
        shares.append(sum(np.linalg.eigvalsh(e)[-2:].sum() / np.trace(e) for e in energies))
    assert all(b >= a - 1e-9 for a, b in pairwise(shares))
    assert shares[-1] > shares[0] + 0.3


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


def tiny_vit(seed: int = 0):
    torch.manual_seed(seed)
    model = create("vit_tiny", image_size=32, patch_size=8, dim=32, depth=2, heads=4, num_classes=0)
    for block in model.blocks:  # attention far from uniform, so that Q and K matter
        block.attn.qkv.weight.data *= 8
        block.attn.proj.weight.data *= 3
    return model.eval()


def test_moments_and_fit_through_a_model():
    model = tiny_vit()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moments = head_moments(model, [images[:2], images[2:]])
    assert [q.count for q, _ in moments] == [3 * 17, 3 * 17]
    fitted = fit_codecs(moments)
    assert fitted.shapes == (HeadCodec(4, 2),) * 2
    assert [k.q <= 1 and k.k <= 1 for k in fitted.explained] == [True, True]
    with pytest.raises(ValueError, match="got none"):
        head_moments(model, [])
    with pytest.raises(ValueError, match=r"1\.\.4, got 7"):
        fit_codecs(moments, latent_heads=7)


def test_layers_whose_heads_agree_least_get_more_latent_heads():
    """Heads made of 2 common parts need 2; heads of their own need all."""
    generator = torch.Generator().manual_seed(5)
    alike = [HeadMoments.of(x) for x in random_qk(1, heads=6)]
    apart = [
        HeadMoments.of(torch.randn(2, 6, 30, 6, generator=generator).double()) for _ in range(2)
    ]
    assert latent_heads_by_layer([alike, apart], mean=3) == (2, 4)
    more, less = latent_heads_by_layer([apart, alike], mean=3.5)
    assert more + less == 7
    assert more > less
    assert latent_heads_by_layer([alike, apart], mean=2, groups=2) == (2, 2)
    assert latent_heads_by_layer([apart, alike], mean=3, groups=2) == (4, 2)
    fitted = fit_codecs([alike, apart], latent_heads=(2, 4))
    assert fitted.shapes == (HeadCodec(6, 2), HeadCodec(6, 4))
    with pytest.raises(ValueError, match="3 numbers, the model 2 layers"):
        fit_codecs([alike, apart], latent_heads=(2, 4, 4))
    with pytest.raises(ValueError, match=r"must be in 1\.\.5 .* got 6"):
        latent_heads_by_layer([alike, apart], mean=6)
    with pytest.raises(ValueError, match=r"groups must divide .* got 4"):
        latent_heads_by_layer([alike, apart], mean=3, groups=4)


def test_sharing_out_finds_the_best_of_all_ways():
    generator = np.random.default_rng(0)
    for _ in range(20):
        layers = [{n: float(generator.random()) for n in (2, 4, 6)} for _ in range(4)]
        total = int(generator.integers(4, 12)) * 2
        ways = [way for way in product((2, 4, 6), repeat=4) if sum(way) <= total]
        best = max(sum(gains[n] for gains, n in zip(layers, way, strict=True)) for way in ways)
        found = most(layers, total)
        assert sum(found) <= total
        assert sum(gains[n] for gains, n in zip(layers, found, strict=True)) == pytest.approx(best)


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


def test_fold_moves_the_turn_into_the_projections():
    model = tiny_vit()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    fitted = fit_codecs(head_moments(model, [images]), rotation=True)
    with torch.no_grad():
        plain = features(model, images)
        with attach_codec(model, fitted.codecs):
            carried = features(model, images)
        fold(model, fitted.codecs)
        assert all(c.turn is None and c.key_shift is None for c in fitted.codecs)
        assert (features(model, images) - plain).abs().max() < 1e-4
        with attach_codec(model, fitted.codecs):
            folded = features(model, images)
    assert (folded - carried).abs().max() < 1e-4


def test_fold_refuses_a_model_without_key_bias():
    model = create(
        "vit_tiny", image_size=32, patch_size=8, dim=32, depth=1, heads=4, qkv_bias=False
    )
    images = torch.randn(2, 3, 32, 32)
    fitted = fit_codecs(head_moments(model, [images]), rotation=True)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn"):
        fold(model, fitted.codecs)


def test_errors_of_a_layer_by_hand():
    model = tiny_vit(6)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    codecs = fit_codecs(head_moments(model, [images]), latent_heads=2, rotation=True).codecs
    seen: list = []

    class Recorder(AttentionHook):
        def transform(self, q, k):
            seen.append((q, k))
            return q, k

    calls = find_attention(model, 32)
    with torch.no_grad(), intercept(model, [Recorder() for _ in calls], calls):
        model(images)
        q, k = seen[0]  # nothing is coded before the first layer
        plain, coded = codecs[0].in_basis(q, k), codecs[0](q, k)
        maps = [(a @ b.mT * a.shape[-1] ** -0.5).softmax(-1) for a, b in (plain, coded)]
    found = codec_errors(model, codecs, images.split(2), 32)
    assert len(found) == len(codecs)
    # means over batches of two and of one image, as the errors are
    parts = [(slice(0, 2), 2), (slice(2, 3), 1)]
    for name, one, other in zip("qk", plain, coded, strict=True):
        wanted = sum(n * float(relative_error(other[s], one[s])) for s, n in parts) / 3
        assert getattr(found[0], name) == pytest.approx(wanted, rel=1e-4)
    moved = (maps[0] - maps[1]).abs().sum(-1).mean() / 2
    assert found[0].attention == pytest.approx(float(moved), rel=1e-3)
    assert 0 < found[0].q < 1
    assert 0 < found[0].attention < 1


def test_errors_of_a_lossless_codec_are_none_and_need_images():
    model = tiny_vit(7)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    codecs = fit_codecs(head_moments(model, [images]), latent_heads=4).codecs
    before = features(model, images)
    for row in codec_errors(model, codecs, [images], 32):
        assert max(row.q, row.k, row.attention) < 1e-4
    assert torch.equal(features(model, images), before)
    with pytest.raises(ValueError, match="measured on images"):
        codec_errors(model, codecs, [], 32)


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


def test_a_teacher_that_is_the_student_is_refused():
    model = tiny_vit()
    with pytest.raises(ValueError, match="separate copy"):
        train_codec(model, model, [QKCodec(HeadCodec(4, 2))] * 2, [], steps=1)
