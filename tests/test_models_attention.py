"""Attention found and changed inside modules that were written without knowing of it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sievit.models import AttentionHook, attention_forms, create, find_attention, intercept

HEADS, DIM = 2, 16


def reference(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Masked attention as its equation reads, row by row; a row with nothing kept is 0."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    weights = torch.where(keep, torch.exp(scores), 0.0)
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp_min(1e-30), 0.0) @ v


class Projected(nn.Module):
    """q, k, v and output projections around `core`, which a subclass writes its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        return self.qkv(x).view(b, n, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4).unbind(0)

    def merged(self, y: Tensor) -> Tensor:
        return self.proj(y.transpose(1, 2).reshape(len(y), -1, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.merged(self.core(*self.heads(x)))

    def expected(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.merged(reference(*self.heads(x), keep))


class Fused(Projected):
    def core(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Eager(Projected):
    """As timm and DeiT write it: scale on q, softmax method, a dropout module."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def core(self, q, k, v):
        attn = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return self.drop(attn.softmax(dim=-1)) @ v


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


def tokens(batch: int = 3, count: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, DIM, generator=torch.Generator().manual_seed(seed))


def random_keep(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


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


# ------------------------------------------------------------- torch's own attention


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


# ------------------------------------------------------------- handles and surroundings


def test_intercepts_stack_and_come_off_in_any_order():
    model, x = create("deit_tiny", depth=2, num_classes=5).eval(), torch.randn(1, 3, 32, 32)
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    dense = model(x)
    calls = find_attention(model, x)
    one, two = random_keep(3, 5, 5, seed=1), random_keep(3, 5, 5, seed=2)
    with intercept(model, [AttentionHook(keep=one & two)] * 2, calls):
        both = model(x)
    first = intercept(model, [AttentionHook(keep=one)] * 2, calls)
    alone = model(x)
    second = intercept(model, [AttentionHook(keep=two)] * 2, calls)
    torch.testing.assert_close(model(x), both, atol=1e-6, rtol=1e-5)
    assert list(model.state_dict()) == keys
    assert find_attention(model, x) == calls
    second.remove()
    torch.testing.assert_close(model(x), alone, atol=0, rtol=0)
    second = intercept(model, [AttentionHook(keep=two)] * 2, calls)
    first.remove()
    first.remove()
    with intercept(model, [AttentionHook(keep=one)] * 2, calls):
        torch.testing.assert_close(model(x), both, atol=1e-6, rtol=1e-5)
    second.remove()
    torch.testing.assert_close(model(x), dense, atol=0, rtol=0)
    after = {name: dict(m.__dict__) for name, m in model.named_modules()}
    assert {n: d.keys() for n, d in before.items()} == {n: d.keys() for n, d in after.items()}
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_other_image_sizes_than_the_one_it_was_found_at():
    model, seen = create("dinov2_small", depth=1, dim=24, heads=3).eval(), []
    with intercept(model, [AttentionHook(observe=seen.append)]):
        model(torch.randn(2, 3, 28, 42))
    assert seen[0].shape == (2, 3, 7, 7)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 3, 7))


def test_a_deep_copy_stays_intercepted_on_its_own():
    model, x = Fused().eval(), tokens()
    keep = random_keep(HEADS, 7, 7)
    handle = intercept(model, [AttentionHook(keep=keep)], find_attention(model, x))
    copied = copy.deepcopy(model)
    handle.remove()
    with torch.no_grad():
        model.qkv.weight.zero_()
    torch.testing.assert_close(copied(x), copied.expected(x, keep), atol=1e-5, rtol=1e-5)


def test_checkpointed_blocks_recompute_under_the_mask():
    torch.manual_seed(0)
    model, x, keep = Fused(), tokens(), random_keep(HEADS, 7, 7)
    with intercept(model, [AttentionHook(keep=keep)], find_attention(model, x)):
        model(x).square().sum().backward()
        plain = model.qkv.weight.grad.clone()
        model.zero_grad()
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(model.qkv.weight.grad, plain)


@pytest.mark.parametrize("form", [Fused, Eager])
def test_bfloat16_autocast(form):
    torch.manual_seed(0)
    model, x, keep = form(), tokens(), random_keep(HEADS, 7, 7)
    keep[0, 1] = False
    expected = model.expected(x, keep)
    with intercept(model, [AttentionHook(keep=keep)], find_attention(model, x)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(x)
        got.float().sum().backward()
    torch.testing.assert_close(got.float(), expected, atol=3e-2, rtol=3e-2)
    assert model.qkv.weight.grad.isfinite().all()


def test_an_error_inside_leaves_nothing_behind():
    model, x = Fused().eval(), tokens()
    calls = find_attention(model, x)
    dense = model(x)

    class Interrupted(BaseException):
        pass

    def interrupt(probabilities):
        raise Interrupted

    with intercept(model, [AttentionHook(observe=interrupt)], calls), pytest.raises(Interrupted):
        model(x)
    torch.testing.assert_close(model(x), dense, atol=0, rtol=0)
    assert torch.overrides._get_current_function_mode() is None


def test_finding_attention_touches_nothing():
    model = nn.Sequential(nn.BatchNorm1d(7), Eager(), nn.Dropout(0.5)).train()
    model[1].eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    find_attention(model, tokens())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), random)


def test_errors_name_what_does_not_fit():
    model, x = Fused().eval(), tokens()
    calls = find_attention(model, x)
    with pytest.raises(ValueError, match=r"makes 1 calls of attention, got 2 hooks"):
        intercept(model, [None, None], calls)
    bad = intercept(model, [AttentionHook(keep=random_keep(HEADS, 5, 5))], calls)
    with bad, pytest.raises(ValueError, match=r"\(2, 7, 7\).*\(2, 5, 5\)"):
        model(x)
    twice = nn.Sequential(model, model)
    found = find_attention(twice, x)
    assert len(found) == 2
    with pytest.raises(ValueError, match="runs more than once"):
        intercept(twice, [AttentionHook(), AttentionHook()], found)
    intercept(twice, [None, None], found).remove()


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
