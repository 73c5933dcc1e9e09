"""What tracing charges to which parameter, and what it leaves as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sievit.models import AttentionHook, create, find_attention, intercept, trace
from sievit.workload import Conv, Deform, Elementwise, Gemm, Unused


def traced(model, *inputs):
    workload = trace(model, inputs)
    assert workload.params == sum(p.numel() for p in model.parameters())
    return workload


def test_parts_of_a_weight_are_charged_apart():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x, y):
            return self.mha(x, y, y)[0]

    workload = traced(Cross(), torch.empty(1, 3, 16), torch.empty(1, 5, 16))
    sizes = [(op.rows, op.cols, op.params) for op in workload.ops if isinstance(op, Gemm)]
    assert sizes == [(3, 16, 272), (5, 32, 544), (3, 16, 272)]
    (attention,) = workload.attention
    assert (attention.queries, attention.keys) == (3, 5)


def test_a_parameter_is_charged_once_and_an_unread_one_is_listed():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice = nn.Linear(4, 4)
            self.conv = nn.Conv2d(4, 4, 1)
            self.never = nn.Parameter(torch.zeros(3))
            self.part = nn.Parameter(torch.zeros(10, 4))
            self.left = nn.Parameter(torch.zeros(4, 6))

        def forward(self, x):
            x = self.twice(self.twice(x)) + self.part[:2]
            x = self.conv(self.conv(x.T[None, :, None]))[0, :, 0]
            return self.left.T @ x

    workload = traced(Shared(), torch.empty(2, 4))
    assert [op.weight for op in workload.ops if isinstance(op, Gemm)] == [True, False, True]
    assert [op.weight for op in workload.ops if isinstance(op, Conv)] == [True, False]
    unused = [op for op in workload.ops if isinstance(op, Unused)]
    assert unused == [Unused("never", 3), Unused("part", 32)]
    assert sum(op.elements_read for op in unused) == 0
    assert workload.macs == 2 * (2 * 16) + 2 * (2 * 16) + 6 * 4 * 2


def test_a_module_may_describe_itself():
    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def as_op(self, name, x, *, power):
            return Elementwise(name, f"power_{power}", x.numel(), x.numel(), self.scale.numel())

        def forward(self, x, *, power):
            for _ in range(power):
                x = x * self.scale
            return x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.compiled = Compiled()

        def forward(self, x):
            return self.compiled(x, power=3).relu()

    assert traced(Net(), torch.empty(1, 4)).ops == (
        Elementwise("compiled", "power_3", 4, 4, 4),
        Elementwise("relu", "relu", 4, 4),
    )


def test_tracing_touches_nothing_and_passes_hooks_by():
    model = create("deit_tiny", depth=2)
    model.blocks[0].eval()
    before = trace(model)
    random, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    parameters = {name: id(p) for name, p in model.named_parameters()}
    keep = torch.zeros(3, 197, 197, dtype=torch.bool)
    handle = intercept(model, [AttentionHook(keep=keep, observe=pytest.fail)] * 2)
    assert trace(model) == before
    handle.remove()
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_a_forward_keeps_is_not_kept():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(4))
            self.register_buffer("last", torch.zeros(4))
            self.by_device = {}
            self.seen = []

        def train(self, mode=True):
            self.kept = None if mode else self.table * 3
            return super().train(mode)

        def forward(self, x):
            cached = self.by_device.setdefault(str(x.device), self.table * 2)
            self.seen.append(cached)
            self.last = cached
            return x * cached

    model, x = Caching(), torch.ones(1, 4)
    for mode in (True, False):
        model.train(mode)
        before = {**vars(model), "by_device": {}, "seen": []}
        trace(model, x)
        find_attention(model, x)
        assert vars(model) == before
        assert torch.equal(model.last, torch.zeros(4))
    assert torch.equal(model(x), torch.full((1, 4), 2.0))


def test_attention_is_found_where_it_is_traced():
    for name in ("efficientvit_m0", "levit_128s", "deit_tiny"):
        model = create(name)
        calls, ops = find_attention(model), trace(model).attention
        fields = ("heads", "queries", "keys", "key_dim", "value_dim", "windows")
        assert [[getattr(c, f) for f in fields] for c in calls] == [
            [getattr(op, f) for f in fields] for op in ops
        ]


def test_an_image_size_that_does_not_fit_says_so():
    with pytest.raises(ValueError, match="multiples of the patch size 16, got 100 x 100"):
        trace(create("deit_tiny", depth=1), 100)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        trace(create("deit_tiny", depth=1), 0)
    assert trace(create("deit_tiny", depth=1), (32, 64)).attention[0].queries == 9


def test_inference_mode_changes_nothing():
    model = create("efficientvit_m0", image_size=64)
    expected = trace(model)
    with torch.inference_mode():
        assert trace(model) == expected
        assert trace(create("deit_tiny", depth=1), torch.zeros(1, 3, 32, 32)).macs > 0


def test_a_compiled_core_is_not_run():
    def compiled(value, offset, weight, **geometry):
        pytest.fail("a compiled core was given tensors without storage")

    small = {"channels": 16, "depths": (1, 1, 1, 1)}
    workload = trace(create("internimage_t", core=compiled, **small), 64)
    assert workload == trace(create("internimage_t", **small), 64)
    assert [op.points for op in workload.ops if isinstance(op, Deform)] == [256, 64, 16, 4]
