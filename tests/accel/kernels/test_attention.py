"""`sparse_attention` against the equation in float64: values, gradients, operators, errors."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sievit.accel.kernels import (
    SparseAttention,
    attention,
    choose_kernel,
    plan_attention,
    reference_attention,
    sparse_attention,
)
from sievit.workload import AttentionMask

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def operands(seed, batch, heads, queries, keys, key_dim, value_dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((queries, key_dim), (keys, key_dim), (keys, value_dim))
    return [
        torch.randn(batch, heads, *size, generator=generator).to(dtype).requires_grad_()
        for size in sizes
    ]


def random_keep(seed, heads, queries, keys, share=0.1):
    keep = np.random.default_rng(seed).random((heads, queries, keys)) < share
    keep[0, 0] = True
    keep[-1, -1] = False
    return keep


def relative(got: Tensor, wanted: Tensor) -> float:
    difference = (got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)
    return float(difference.detach())


def equation(q, k, v, keep, scale=None):
    """Row by row, as plain as can be, in float64."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            kept = torch.from_numpy(np.flatnonzero(keep[h, i]))
            if len(kept):
                scores = k[:, h, kept].double() @ q[:, h, i, :, None].double() * scale
                out[:, h, i] = (scores.softmax(dim=1).mT @ v[:, h, kept].double())[:, 0]
    return out


def check(q, k, v, plan, keep, scale=None, kernel="auto"):
    tolerance = TOLERANCE[q.dtype]
    out = sparse_attention(q, k, v, plan, scale, kernel=kernel)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    wanted = reference_attention(*exact, torch.from_numpy(keep), scale)
    assert out.dtype == q.dtype
    assert relative(out, wanted) < tolerance
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(q.dtype)
    grads = torch.autograd.grad(out, (q, k, v), slope)
    exact_grads = torch.autograd.grad(wanted, exact, slope.double())
    for got, right in zip(grads, exact_grads, strict=True):
        assert got.dtype == q.dtype
        assert relative(got, right) < tolerance


def test_the_reference_is_the_equation():
    q, k, v = operands(0, 2, 3, 11, 13, 8, 5)
    keep = random_keep(0, 3, 11, 13, 0.3)
    wanted = equation(q, k, v, keep)
    got = reference_attention(q.double(), k.double(), v.double(), torch.from_numpy(keep))
    assert relative(got, wanted) < 1e-14


def test_gradients_of_the_reference():
    q, k, v = (t.detach().double().requires_grad_() for t in operands(1, 1, 2, 5, 6, 3, 4))
    plan = plan_attention(random_keep(1, 2, 5, 6, 0.4))
    assert torch.autograd.gradcheck(lambda *t: sparse_attention(*t, plan), (q, k, v))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    queries=st.integers(1, 80),
    keys=st.integers(1, 80),
    share=st.sampled_from([0.0, 0.03, 0.2, 0.9]),
    dims=st.sampled_from([(64, 64), (24, 40), (16, 100)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    kernel=st.sampled_from(["compiled", "dense"]),
)
def test_any_mask_and_shape(seed, batch, heads, queries, keys, share, dims, dtype, kernel):
    keep = random_keep(seed, heads, queries, keys, share)
    q, k, v = operands(seed, batch, heads, queries, keys, *dims, dtype)
    check(q, k, v, plan_attention(keep), keep, kernel=kernel)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (16, 16), (33, 7), (128, 128)])
def test_head_dims(key_dim, value_dim):
    keep = random_keep(3, 2, 40, 30)
    q, k, v = operands(3, 2, 2, 40, 30, key_dim, value_dim)
    check(q, k, v, plan_attention(keep), keep, scale=0.3, kernel="compiled")


def test_long_sequences():
    keep = np.random.default_rng(4).random((1, 8192, 8192), dtype=np.float32) < 0.002
    keep[0, 0] = True
    q, k, v = (t.detach() for t in operands(4, 1, 1, 8192, 8192, 16, 16))
    out = sparse_attention(q, k, v, plan_attention(keep))
    some = slice(0, 8192, 64)
    wanted = reference_attention(
        q.double()[:, :, some], k.double(), v.double(), torch.from_numpy(keep[:, some])
    )
    assert relative(out[:, :, some], wanted) < 1e-5


def test_real_masks(golden):
    masks = AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy"))
    for layer, keep in enumerate(map(np.array, masks.keep)):
        q, k, v = operands(layer, 2, 3, 197, 197, 64, 64)
        check(q, k, v, plan_attention(keep), keep)


def test_strides_are_read():
    """A packed projection, as a ViT makes it, and operands expanded over the batch."""
    keep = random_keep(5, 3, 50, 50)
    plan = plan_attention(keep)
    qkv = torch.randn(2, 50, 3, 3, 64, generator=torch.Generator().manual_seed(5))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    assert not q.is_contiguous()
    wanted = reference_attention(q, k, v, torch.from_numpy(keep))
    assert relative(sparse_attention(q, k, v, plan), wanted.double()) < 1e-5
    turned = [t.mT.contiguous().mT for t in (q, k, v)]
    assert relative(sparse_attention(*turned, plan), wanted.double()) < 1e-5
    wide = [t[:1].expand(2, -1, -1, -1) for t in (q, k, v)]
    wanted = reference_attention(*wide, torch.from_numpy(keep))
    assert relative(sparse_attention(*wide, plan), wanted.double()) < 1e-5


def test_every_element_is_written(monkeypatch):
    keep = random_keep(6, 2, 37, 21)
    plan = plan_attention(keep)
    q, k, v = operands(6, 2, 2, 37, 21, 24, 40)
    empty = Tensor.new_empty

    def poisoned(self, *size, **options):
        return empty(self, *size, **options).fill_(float("nan"))

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    out, sums = torch.ops.sievit.attention_by_rows(
        q, k, v, plan.order, plan.indptr, plan.columns, 0.2
    )
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for tensor in (out, sums, *grads):
        assert not tensor.isnan().any()
    assert (out[:, -1, -1] == 0).all()
    assert (sums[:, -1, -1] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["k", "v"])
def test_nan_and_inf_reach_the_rows_that_keep_them(value, which):
    keep = random_keep(7, 2, 40, 30)
    keep[1, 20] = False
    keep[1, 20, 4] = True  # a row that keeps nothing else
    plan = plan_attention(keep)
    q, k, v = (t.detach() for t in operands(7, 1, 2, 40, 30, 16, 16))
    q = q.abs() + 0.1  # the scores of an infinite key are then all +inf
    clean = sparse_attention(q, k, v, plan)
    spoiled = {"k": k, "v": v}[which].clone()
    spoiled[0, 1, 4] = value
    out = sparse_attention(q, *((spoiled, v) if which == "k" else (k, spoiled)), plan)
    hit = torch.from_numpy(keep[1, :, 4])
    assert not out[0, 1, hit].isfinite().any()
    assert torch.equal(out[0, 1, ~hit], clean[0, 1, ~hit])
    assert torch.equal(out[0, 0], clean[0, 0])


def test_scores_of_any_size():
    """Softmax neither overflows nor loses rows whose scores are huge, tiny or far apart."""
    keep = random_keep(8, 2, 30, 30, 0.3)
    q, k, v = operands(8, 1, 2, 30, 30, 16, 16)
    for scale in (0.0, 1e-6, 20.0, 1e4, -5.0):
        exact = reference_attention(
            q.double(), k.double(), v.double(), torch.from_numpy(keep), scale
        )
        got = sparse_attention(q, k, v, plan_attention(keep), scale)
        assert relative(got, exact) < 1e-5 * max(1.0, abs(scale))


def test_the_same_in_every_run_and_from_many_threads():
    keep = random_keep(9, 3, 197, 197, 0.05)
    plan = plan_attention(keep)
    q, k, v = operands(9, 8, 3, 197, 197, 64, 64)

    def step():
        out = sparse_attention(q, k, v, plan)
        return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = step()
        torch.set_num_threads(3)
        results: list = []
        threads = [threading.Thread(target=lambda: results.append(step())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert len(results) == 4
    for result in results:
        assert all(map(torch.equal, result, alone))


def test_the_operator_passes_opcheck():
    plan = plan_attention(random_keep(10, 2, 9, 7, 0.4))
    q, k, v = operands(10, 2, 2, 9, 7, 16, 24)
    arguments = (q, k, v, plan.order, plan.indptr, plan.columns, 0.25)
    torch.library.opcheck(torch.ops.sievit.attention_by_rows.default, arguments)
    out, sums = torch.ops.sievit.attention_by_rows(*arguments)
    back = (torch.ones_like(out), *arguments[:3], out, sums, *arguments[3:])
    back = tuple(t.detach() if isinstance(t, Tensor) else t for t in back)
    torch.library.opcheck(torch.ops.sievit.attention_by_rows_backward.default, back)


@pytest.mark.parametrize("kernel", ["auto", "dense"])
def test_it_compiles_whole_and_exports(kernel):
    module = SparseAttention(plan_attention(random_keep(11, 2, 20, 20)), kernel)
    q, k, v = operands(11, 2, 2, 20, 20, 16, 16)
    wanted = module(q, k, v)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = compiled(q, k, v)
    assert torch.allclose(got, wanted, atol=1e-6)
    slope = torch.ones_like(got)
    for one, other in zip(
        torch.autograd.grad(got, (q, k, v), slope),
        torch.autograd.grad(wanted, (q, k, v), slope),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-5)
    exported = torch.export.export(module, tuple(t.detach() for t in (q, k, v)))
    assert torch.allclose(exported.module()(q, k, v), wanted, atol=1e-6)


def test_autocast_casts_like_fused_attention():
    plan = plan_attention(random_keep(12, 2, 20, 20))
    q, k, v = operands(12, 1, 2, 20, 20, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_attention(q, k, v, plan)
        assert out.dtype == torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_the_module_holds_no_state():
    module = SparseAttention(plan_attention(random_keep(13, 2, 20, 20)))
    assert not module.state_dict()
    assert module.to("meta").plan.device.type == "meta"
    assert "kept=" in repr(module)


def test_the_choice_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(attention, "_said", set())
    sparse = plan_attention(random_keep(14, 2, 20, 20))
    dense = plan_attention(np.ones((2, 20, 20), bool))
    fuller = plan_attention(np.arange(20) < np.full((2, 20, 1), 15))
    cpu = torch.device("cpu")
    assert choose_kernel(sparse, cpu, torch.float32).kernel == "compiled"
    assert choose_kernel(dense, cpu, torch.float32).kernel == "dense"
    assert choose_kernel(sparse, cpu, torch.float64).kernel == "reference"
    q, k, v = operands(14, 1, 2, 20, 20, 16, 16)
    with caplog.at_level(logging.INFO, "sievit.accel.kernels"):
        for plan in (dense, dense, fuller):
            sparse_attention(q, k, v, plan)
    assert [r.getMessage() for r in caplog.records] == [
        "sparse attention on cpu: dense (100% is kept, above 50% dense is faster)"
    ]


def test_without_numba_it_works_and_says_so_once(monkeypatch):
    monkeypatch.setattr(attention, "HAVE_NUMBA", False)
    monkeypatch.setattr(attention, "_said", set())
    keep = random_keep(16, 2, 20, 20)
    q, k, v = operands(16, 1, 2, 20, 20, 16, 16)
    with pytest.warns(RuntimeWarning, match="numba is not installed: .* densely") as said:
        outs = [sparse_attention(q, k, v, plan_attention(keep)) for _ in range(3)]
    assert len(said) == 1
    wanted = reference_attention(q, k, v, torch.from_numpy(keep))
    assert all(torch.allclose(out, wanted, atol=1e-6) for out in outs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (1, 3, 20, 16)}, r"for 2 heads, 20 queries and 30 keys; q is \[1, 3, 20, 16\]"),
        ({"k": (1, 2, 31, 16)}, r"30 keys; k is \[1, 2, 31, 16\]"),
        ({"v": (1, 2, 20, 16)}, r"30 keys; v is \[1, 2, 20, 16\]"),
        ({"q": (2, 20, 16)}, r"are \[batch, heads, tokens, dim\], got \[2, 20, 16\]"),
        ({"q": (2, 2, 20, 16)}, "q is of 2 images, k of 1"),
        ({"q": (1, 2, 20, 17)}, "q has key_dim 17, k 16"),
        ({"v": (1, 2, 30, 257)}, "must be 1 to 256, v is"),
        ({"k": torch.float16}, r"q is torch.float32 on cpu, k is torch.float16 on cpu"),
        ({"q": torch.int32, "k": torch.int32, "v": torch.int32}, "got torch.int32"),
        ({"v": torch.device("meta")}, "v is torch.float32 on meta"),
        ({n: torch.device("meta") for n in "qkv"}, "on meta, the plan on cpu: use plan.to"),
        ({"kernel": "tiles"}, "kernel 'tiles' needs triton and a GPU; .* tensors are on cpu"),
        ({"kernel": "fast"}, "one of compiled, tiles, short, dense, reference, got 'fast'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    plan = plan_attention(random_keep(15, 2, 20, 30))
    given = dict(zip("qkv", (t.detach() for t in operands(15, 1, 2, 20, 30, 16, 16)), strict=True))
    kernel = change.get("kernel", "auto")
    for name, value in change.items():
        if name in given:
            given[name] = torch.zeros(value) if isinstance(value, tuple) else given[name].to(value)
    with pytest.raises(ValueError, match=message):
        sparse_attention(**given, plan=plan, kernel=kernel)
