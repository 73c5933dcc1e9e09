"""What surrounds an intercepted model: handles, copies, checkpoints, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from attention_models import HEADS, Eager, Fused, random_keep, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from sievit.models import AttentionHook, create, find_attention, intercept


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
