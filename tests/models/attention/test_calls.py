"""Attention found and changed inside modules that were written without knowing of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_models import DIM, HEADS, Eager, Fused, Projected, random_keep, reference, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sievit.models import AttentionHook, find_attention, intercept


class ScoresInSubmodules(Projected):
    """Product, softmax and second product each in a submodule of their own."""

    class Matmul(nn.Module):
        def forward(self, a, b):
            return a @ b

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.Matmul(), self.Matmul()
        self.softmax = nn.Softmax(dim=-1)

    def core(self, q, k, v):
        attn = self.first(q, k.mT)
        attn /= q.shape[-1] ** 0.5
        return self.second(self.softmax(attn), v)


class Einsum(Projected):
    def core(self, q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (b, n, h, d)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        probabilities = torch.softmax(scores, -1, dtype=torch.float32)
        return torch.einsum("bhij,bjhd->bihd", probabilities, v).transpose(1, 2)


class EllipsisEinsum(Projected):
    def core(self, q, k, v):
        scores = torch.einsum("...id,...jd->...ij", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("...ij,...jd->...id", scores.softmax(-1), v)


class FlatHeads(Projected):
    """[batch * heads, tokens, dim] and bmm; heads are known from ``num_heads`` alone."""

    def core(self, q, k, v):
        b = len(q)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        attn = torch.baddbmm(torch.zeros(1, 1, 1), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5)
        return torch.bmm(F.softmax(attn, dim=-1), v).view(b, HEADS, -1, DIM // HEADS)


class ValuesFirst(Projected):
    """Channels before tokens, v @ p^T, as convolutional transformers write it."""

    def core(self, q, k, v):
        q, k, v = (t.mT for t in (q, k, v))  # (b, h, d, n)
        attn = (q.transpose(-2, -1) @ k) * q.shape[-2] ** -0.5
        return (v @ attn.softmax(dim=-1).transpose(-2, -1)).mT


class KeysAsRows(Projected):
    """k @ q^T with the softmax down the columns."""

    def core(self, q, k, v):
        attn = (k @ q.mT) * q.shape[-1] ** -0.5
        return attn.softmax(dim=-2).mT @ v


class FoldedScores(Projected):
    """Scores reshaped before the softmax and back after it."""

    def core(self, q, k, v):
        b, h, n, _ = q.shape
        attn = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        attn = attn.view(b * h, n, n).clamp(-50.0, 50.0)
        return attn.softmax(2).view(b, h, n, n).to(v.dtype) @ v


FORMS = {
    Fused: "sdpa",
    Eager: "softmax",
    ScoresInSubmodules: "softmax",
    Einsum: "softmax",
    EllipsisEinsum: "softmax",
    FlatHeads: "softmax",
    ValuesFirst: "softmax",
    KeysAsRows: "softmax",
    FoldedScores: "softmax",
}


@pytest.fixture(params=FORMS, ids=lambda form: form.__name__)
def written(request) -> Projected:
    torch.manual_seed(0)
    return request.param().eval()


def test_every_way_to_write_it_is_found(written):
    model = nn.Sequential(nn.LayerNorm(DIM), written)
    (call,) = find_attention(model, (tokens(1),))
    assert (call.module, call.index, call.form) == ("1", 0, FORMS[type(written)])
    assert (call.heads, call.queries, call.keys) == (HEADS, 7, 7)
    assert (call.key_dim, call.value_dim, call.windows) == (DIM // HEADS, DIM // HEADS, 1)


def test_a_mask_gives_plain_masked_attention(written):
    x, keep = tokens(), random_keep(HEADS, 7, 7)
    keep[0, 2] = False  # a query with no key left
    dense = written(x)
    with intercept(written, [AttentionHook(keep=keep)], find_attention(written, (x,))):
        masked = written(x)
    torch.testing.assert_close(masked, written.expected(x, keep), atol=1e-5, rtol=1e-5)
    assert (masked - dense).abs().max() > 1e-3
    torch.testing.assert_close(written(x), dense, atol=0, rtol=0)


def test_probabilities_are_observed(written):
    x, seen = tokens(), []
    keep = random_keep(HEADS, 7, 7)
    calls = find_attention(written, (x,))
    dense = written(x)
    with intercept(written, [AttentionHook(observe=seen.append)], calls):
        torch.testing.assert_close(written(x), dense, atol=1e-6, rtol=1e-5)
    with (
        intercept(written, [AttentionHook(keep=keep)], calls),
        intercept(written, [AttentionHook(observe=seen.append)], calls),
    ):
        written(x)
    q, k, _ = written.heads(x)
    identity = torch.eye(7).expand(3, HEADS, 7, 7)
    for probabilities, kept in zip(seen, (torch.ones_like(keep), keep), strict=True):
        expected = reference(q, k, identity, kept)
        torch.testing.assert_close(probabilities, expected, atol=1e-6, rtol=1e-5)


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


def test_queries_and_keys_are_transformed_and_learn(written):
    x, mix = tokens(), Mix()
    with intercept(written, [mix], find_attention(written, (x,))):
        got = written(x)
    q, k, v = written.heads(x)
    everything = torch.ones(HEADS, 7, 7, dtype=torch.bool)
    expected = written.merged(reference(*mix.transform(q, k), v, everything))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    got_grads = torch.autograd.grad(got.square().sum(), (mix.q, mix.k, written.qkv.weight))
    grads = torch.autograd.grad(expected.square().sum(), (mix.q, mix.k, written.qkv.weight))
    for one, other in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


def test_gradients_of_masked_attention(written):
    x, keep = tokens(), random_keep(HEADS, 7, 7)
    keep[1, 3] = False
    (expected,) = torch.autograd.grad(
        written.expected(x, keep).square().sum(), (written.qkv.weight,)
    )
    with intercept(written, [AttentionHook(keep=keep)], find_attention(written, (x,))):
        written(x).square().sum().backward()
    torch.testing.assert_close(written.qkv.weight.grad, expected, atol=2e-4, rtol=2e-4)


def test_a_kernel_takes_over_where_it_can(written):
    x, keep, calls = tokens(), random_keep(HEADS, 7, 7), []

    def kernel(q, k, v, scale):
        calls.append((q.shape, scale))
        return reference(q * scale * q.shape[-1] ** 0.5, k, v, keep)

    with intercept(written, [AttentionHook(keep=keep, kernel=kernel)], find_attention(written, x)):
        got = written(x)
    torch.testing.assert_close(got, written.expected(x, keep), atol=1e-5, rtol=1e-5)
    fused = FORMS[type(written)] == "sdpa"
    assert calls == ([((3, HEADS, 7, DIM // HEADS), (DIM // HEADS) ** -0.5)] if fused else [])


def test_an_observer_beside_a_kernel_gets_dense_probabilities():
    model, x, keep, seen = Fused().eval(), tokens(), random_keep(HEADS, 7, 7), []
    calls = find_attention(model, x)
    with intercept(model, [AttentionHook(keep=keep, kernel=None)], calls):
        expected = model(x)
    kernel = AttentionHook(keep=keep, kernel=lambda *_: pytest.fail("the kernel ran"))
    with (
        intercept(model, [kernel], calls),
        intercept(model, [AttentionHook(observe=seen.append)], calls),
    ):
        torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(seen[0] == 0, ~keep.expand(3, -1, -1, -1))


def test_a_kernel_without_a_mask_says_where_it_cannot_act():
    model, x = Eager().eval(), tokens()
    handle = intercept(
        model, [AttentionHook(kernel=lambda q, k, v, s: v)], find_attention(model, x)
    )
    with handle, pytest.raises(ValueError, match="needs keep"):
        model(x)


def test_values_that_steer_the_forward_are_refused():
    class Steered(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="depends on the values"):
        find_attention(Steered(), tokens())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(list(FORMS)),
    batch=st.integers(1, 3),
    count=st.integers(1, 9),
    density=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_any_mask_in_any_form(form, batch, count, density, seed):
    torch.manual_seed(seed)
    model, x = form().eval(), tokens(batch, count, seed)
    keep = torch.rand(HEADS, count, count) < density
    with torch.no_grad(), intercept(model, [AttentionHook(keep=keep)], find_attention(model, x)):
        torch.testing.assert_close(model(x), model.expected(x, keep), atol=1e-5, rtol=1e-5)
