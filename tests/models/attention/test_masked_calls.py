"""A mask beside what a module's attention has of its own: torch's fused paths, biases,
windows, causal order, several calls in one module."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_models import DIM, HEADS, Fused, Projected, random_keep, reference, tokens
from torch import nn

from sievit.models import AttentionHook, find_attention, intercept
from sievit.models.attention import forms as attention_forms


class Mix(AttentionHook):
    """Heads mixed by a learned matrix, q and k each their own way: a codec's shape of work."""

    def __init__(self) -> None:
        self.q = torch.tensor([[0.9, -0.2], [0.3, 0.7]], requires_grad=True)
        self.k = torch.tensor([[1.1, 0.4], [-0.5, 0.8]], requires_grad=True)

    def transform(self, q, k):
        return (
            torch.einsum("gh,bhnd->bgnd", self.q, q),
            torch.einsum("gh,bhnd->bgnd", self.k, k),
        )


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_multihead_attention(batch_first, need_weights, grad):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first).eval()
    query, key = tokens(count=5), tokens(count=9, seed=3)
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = module

        def forward(self, query, key):
            return self.attn(query, key, key, need_weights=need_weights)

    model, keep = Cross(), random_keep(HEADS, 5, 9)
    (call,) = find_attention(model, (query, key))
    assert (call.module, call.form, call.heads) == ("attn", "mha", HEADS)
    assert (call.queries, call.keys) == (5, 9)
    additive = torch.zeros(keep.shape).masked_fill(~keep, -math.inf).repeat(3, 1, 1)
    with torch.set_grad_enabled(grad):
        expected = module(query, key, key, attn_mask=additive, need_weights=need_weights)
        with intercept(model, [AttentionHook(keep=keep)], [call]):
            got = model(query, key)
    torch.testing.assert_close(got[0], expected[0], atol=1e-6, rtol=1e-5)
    if need_weights:
        torch.testing.assert_close(got[1], expected[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_the_encoder_layers_fused_path_is_avoided(stacked):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, batch_first=True)
    if stacked:
        model = nn.TransformerEncoder(model, 2)
    model.eval()
    x, keep, seen = tokens(), random_keep(HEADS, 7, 7), []
    keep |= torch.eye(7, dtype=torch.bool)
    calls = find_attention(model, x)
    assert [call.form for call in calls] == ["mha"] * (2 if stacked else 1)
    additive = torch.zeros(keep.shape).masked_fill(~keep, -math.inf).repeat(3, 1, 1)
    with torch.no_grad():
        expected = model(x, additive)
        dense = model(x)
        hooks = [AttentionHook(keep=keep, observe=seen.append) for _ in calls]
        with intercept(model, hooks, calls):
            got = model(x)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert len(seen) == len(calls)
        assert (got - dense).abs().max() > 1e-3
        torch.testing.assert_close(model(x), dense, atol=0, rtol=0)


# ------------------------------------------------------------- masks, biases, windows


class Biased(Projected):
    """A learned bias of every head and a key padding mask, eager or fused."""

    def __init__(self, fused: bool, boolean: bool = False) -> None:
        super().__init__()
        self.fused, self.boolean = fused, boolean
        self.bias = nn.Parameter(torch.randn(HEADS, 7, 7))
        self.register_buffer("allowed", random_keep(3, 1, 1, 7, seed=5))

    def core(self, q, k, v):
        mask = self.allowed if self.boolean else self.full_bias()
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        attn = q @ k.mT / q.shape[-1] ** 0.5
        attn = attn.masked_fill(~mask, -math.inf) if self.boolean else attn + mask
        return attn.softmax(-1) @ v

    def full_bias(self):
        return self.bias + torch.zeros(3, 1, 1, 7).masked_fill(~self.allowed, -math.inf)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("watched", [True, False])
def test_a_mask_joins_the_modules_own(fused, boolean, watched):
    torch.manual_seed(0)
    model, x = Biased(fused, boolean).eval(), tokens()
    keep = random_keep(HEADS, 7, 7)
    keep[0, 0] = ~model.allowed[0, 0, 0]  # that row is empty for the first image alone
    q, k, v = model.heads(x)
    both = keep & model.allowed
    assert not both[0, 0, 0].any()
    assert both[1, 0, 0].any()
    bias = 0.0 if boolean else model.bias
    expected = model.merged(reference(q, k, v, both, bias))
    calls = find_attention(model, (x,))
    hook = AttentionHook(keep=keep, observe=(lambda p: None) if watched else None)
    with intercept(model, [hook], calls):
        got = model(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


class Windowed(Projected):
    """Windows of 4 tokens as Swin has them, with a mask over five-dimensional scores."""

    def forward(self, x):
        b, n, _ = x.shape
        windows = x.reshape(b * n // 4, 4, DIM)
        q, k, v = self.heads(windows)
        attn = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        attn = attn.view(b, n // 4, HEADS, 4, 4) + torch.zeros(n // 4, 4, 4)[:, None][None]
        attn = F.softmax(attn.view(-1, HEADS, 4, 4), dim=-1)
        return self.merged(attn @ v).view(b, n, DIM)


def test_windows_share_the_mask():
    model, x = Windowed().eval(), tokens(count=12)
    (call,) = find_attention(model, x)
    assert (call.heads, call.queries, call.keys, call.windows) == (HEADS, 4, 4, 3)
    keep, seen = random_keep(HEADS, 4, 4), []
    with intercept(model, [AttentionHook(keep=keep, observe=seen.append)], [call]):
        got = model(x)
    expected = model.expected(x.reshape(9, 4, DIM), keep).view(3, 12, DIM)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert seen[0].shape == (9, HEADS, 4, 4)


class Overwritten(Projected):
    """A bias written into a part of the scores, as models with a class token do."""

    def core(self, q, k, v):
        attn = q @ k.mT * q.shape[-1] ** -0.5
        attn[..., 1:, 1:] = attn[..., 1:, 1:] + 0.5
        return attn.softmax(-1) @ v


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_scores_changed_in_place_are_masked_but_not_recomputed(mode):
    model, x, keep = Overwritten().eval(), tokens(), random_keep(HEADS, 7, 7)
    calls = find_attention(model, x)
    bias = F.pad(torch.full((6, 6), 0.5), (1, 0, 1, 0))
    with mode():
        q, k, v = model.heads(x)
        expected = model.merged(reference(q, k, v, keep, bias))
        with intercept(model, [AttentionHook(keep=keep)], calls):
            torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        with intercept(model, [Mix()], calls), pytest.raises(ValueError, match="in place"):
            model(x)


class Causal(Projected):
    def core(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)


@pytest.mark.parametrize("watched", [True, False])
def test_causal_attention_keeps_its_order_and_scale(watched):
    model, x, keep = Causal().eval(), tokens(), random_keep(HEADS, 7, 7)
    q, k, v = model.heads(x)
    lower = torch.ones(7, 7, dtype=torch.bool).tril()
    expected = model.merged(reference(q * 0.25 * q.shape[-1] ** 0.5, k, v, keep & lower))
    hook = AttentionHook(keep=keep, observe=(lambda p: None) if watched else None)
    with intercept(model, [hook], find_attention(model, x)):
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


class Cascade(nn.Module):
    """Two calls of one head each in one module, three-dimensional, as EfficientViT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.one, self.two = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, 3 * DIM)

    def forward(self, x):
        for linear in (self.one, self.two):
            q, k, v = linear(x).chunk(3, dim=-1)
            x = x + (q @ k.mT * DIM**-0.5).softmax(-1) @ v
        return x


def test_a_mask_reaches_the_fast_kernels_in_four_axes(monkeypatch):
    """PyTorch computes attention under a mask of three axes by its slow, plain path."""
    model, x, shapes = Fused().eval(), tokens(), []
    fused = F.scaled_dot_product_attention

    def spy(*args, attn_mask, **kwargs):
        shapes.append(attn_mask.shape)
        return fused(*args, attn_mask=attn_mask, **kwargs)

    handle = intercept(
        model, [AttentionHook(keep=random_keep(HEADS, 7, 7))], find_attention(model, x)
    )
    run = attention_forms.Fused.run

    def run_with_spy(call):
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", spy)
            return run(call)

    monkeypatch.setattr(attention_forms.Fused, "run", run_with_spy)
    with handle:
        model(x)
    assert shapes == [(1, HEADS, 7, 7)]


def test_several_calls_in_one_module_are_told_apart():
    model, x = Cascade().eval(), tokens(batch=4)
    calls = find_attention(model, x)
    assert [(c.module, c.index, c.heads) for c in calls] == [("", 0, 1), ("", 1, 1)]
    keep = random_keep(1, 7, 7)
    y = x
    for linear, kept in ((model.one, torch.ones_like(keep)), (model.two, keep)):
        q, k, v = (t[:, None] for t in linear(y).chunk(3, dim=-1))
        y = y + reference(q, k, v, kept)[:, 0]
    with intercept(model, [None, AttentionHook(keep=keep)], calls):
        torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)


class Unrelated(nn.Module):
    """A softmax of no product, a product without softmax, scores that meet no values."""

    def forward(self, x):
        gates = x.softmax(-1) @ x.mT
        scores = (x @ x.mT).relu() @ x
        similarity = (x @ x.mT).softmax(-1)
        return gates.sum() + scores.sum() + similarity.sum()


def test_other_softmaxes_are_left_alone():
    assert find_attention(Unrelated(), tokens()) == ()
