"""Channel surgery and Taylor pruning: gates by finite differences, cutting against zeroing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sievit.models import create, trace
from sievit.models.families.conv_layers import fuse
from sievit.sparsify.channels import CutAttention, find_channels, gate_gradient, resize
from sievit.sparsify.taylor import Importance, prune, redistribute, taylor_importance


def vit(**changes) -> nn.Module:
    torch.manual_seed(0)
    settings = {"image_size": 32, "patch_size": 8, "dim": 16, "depth": 2, "heads": 2}
    model = create("vit_tiny", **(settings | {"num_classes": 3} | changes))
    return spread(model)


def efficientvit() -> nn.Module:
    torch.manual_seed(0)
    shape = {"widths": (32, 32, 48), "heads": (2, 2, 2), "depths": (1, 1, 1), "image_size": 112}
    model = create("efficientvit_m0", num_classes=3, **shape)
    return calibrated(spread(model))


def spread(model: nn.Module) -> nn.Module:
    """Every parameter and statistic away from its first value, so that no branch is idle."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim < 2:
                noise = torch.rand(tensor.shape, dtype=tensor.dtype)
                tensor.copy_(noise - 0.3 if name.endswith("bias") else noise + 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(tensor * 3)
    return model.double().eval()


def calibrated(model: nn.Module) -> nn.Module:
    """Batch norms that know the data, so that no layer is dead and none explodes."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        model.train()(batch(model)[0])
    return model.eval()


def batch(model: nn.Module, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, model.image_size, model.image_size, generator=generator)
    return x.double(), torch.arange(count) % 3


def loss(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(data[0]), data[1])


def scale(model: nn.Module, channels, head: int, unit: int, factor: float) -> None:
    """Multiply one channel of a set by ``factor`` where it is computed."""
    module = model.get_submodule(channels.module)
    row = head * channels.units + unit
    with torch.no_grad():
        if hasattr(module, "dws"):
            norm = module.dws[channels.index].bn
            norm.weight[unit] *= factor
            norm.bias[unit] *= factor
        elif hasattr(module, "pw2"):
            module.pw2.c.weight[:, unit] *= factor
        elif channels.kind == "mlp":
            module.fc2.weight[:, unit] *= factor
        elif channels.kind == "v":
            module.proj.weight[:, row] *= factor
        else:
            module.qkv.weight[row] *= factor
            module.qkv.bias[row] *= factor


@pytest.mark.parametrize("build", [vit, efficientvit])
def test_gate_gradients_by_finite_differences(build):
    model = build()
    data = batch(model)
    loss(model, data).backward()
    for channels in find_channels(model):
        gates = gate_gradient(model, channels)
        assert gates.shape == (channels.heads, channels.units)
        head, unit = channels.heads - 1, channels.units // 2
        losses = []
        for step in (1e-5, -1e-5):
            moved = copy.deepcopy(model)
            scale(moved, channels, head, unit, 1 + step)
            losses.append(loss(moved, data).item())
        numeric = (losses[0] - losses[1]) / 2e-5
        assert gates[head, unit].item() == pytest.approx(numeric, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("build", [vit, efficientvit])
def test_cutting_channels_is_silencing_them(build):
    model = build()
    x, _ = batch(model)
    generator = torch.Generator().manual_seed(2)
    kept, silenced = {}, copy.deepcopy(model)
    for channels in find_channels(model):
        stay = channels.units // 2
        order = torch.rand(channels.heads, channels.units, generator=generator).argsort(1)
        kept[channels.name] = order[:, :stay]
        for head in range(channels.heads):
            for unit in order[head, stay:].tolist():
                scale(silenced, channels, head, unit, 0.0)
    cut = resize(model, kept)
    torch.testing.assert_close(cut(x), silenced(x), rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
    halves = {c.name: c.units // 2 for c in find_channels(model)}
    assert {c.name: c.units for c in find_channels(cut)} == halves


@pytest.mark.parametrize("build", [vit, efficientvit])
def test_channels_that_join_change_nothing_and_can_be_trained(build):
    model = build()
    data = batch(model)
    added = {channels.name: 3 for channels in find_channels(model)}
    wider = resize(model, {}, added)
    torch.testing.assert_close(wider(data[0]), model(data[0]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(wider.train()(data[0]), model.train()(data[0]), rtol=1e-9, atol=1e-9)
    wider.eval()
    optimizer = torch.optim.SGD(wider.parameters(), lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        loss(wider, data).backward()
        optimizer.step()
    for channels in find_channels(wider):
        joined = gate_gradient(wider, channels)[:, -3:]
        assert (joined != 0).all(), channels.name


def test_surgery_can_be_repeated():
    model = vit()
    x, _ = batch(model)
    name = "blocks.0.attn.qk"
    once = resize(model, {name: torch.tensor([[0, 3, 5], [1, 2, 7]])})
    twice = resize(once, {name: torch.tensor([[0, 2], [1, 2]])})
    direct = resize(model, {name: torch.tensor([[0, 5], [2, 7]])})
    torch.testing.assert_close(twice(x), direct(x))
    assert isinstance(twice.blocks[0].attn, CutAttention)
    assert twice.blocks[0].attn.scale == 8**-0.5


def test_importance_is_the_mean_of_squares_and_leaves_the_model_alone():
    model = vit()
    model.train()
    model.head.weight.requires_grad_(False)
    x, labels = batch(model, 4)
    batches = [(x[:2], labels[:2]), (x[2:], labels[2:])]
    importance = taylor_importance(model, batches, loss)
    assert importance.batches == 2
    assert model.training
    assert not model.head.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    twin = copy.deepcopy(model).eval()
    squares = []
    for data in batches:
        twin.zero_grad()
        loss(twin, data).backward()
        squares.append([gate_gradient(twin, c).detach().square() for c in importance.channels])
    for values, first, second in zip(importance.values, *squares, strict=True):
        np.testing.assert_allclose(values, ((first + second) / 2).numpy(), rtol=1e-10)


def test_units_join_the_equally_ranked_channels_of_all_heads():
    (channels,) = (c for c in find_channels(vit()) if c.name == "blocks.0.attn.v")
    values = np.array([[3.0, 1, 0, 0, 7, 0, 0, 0], [0, 0, 2, 5, 0, 0, 0, 1]])
    importance = Importance((channels,), (values,), 1)
    assert importance.ranked(0)[:, :3].tolist() == [[4, 0, 1], [3, 2, 7]]
    assert importance.units(0).tolist() == [6, 2.5, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("build", "target"), [(vit, 0.6), (efficientvit, 0.9)])
def test_pruning_reaches_its_target_and_the_result_runs(build, target):
    model = build()
    data = batch(model)
    before = copy.deepcopy(model.state_dict())
    importance = taylor_importance(model, [data], loss)
    pruned = prune(model, importance, target)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert pruned.macs_before == trace(model).macs
    assert pruned.macs_after == trace(pruned.model).macs
    assert target * 0.93 < pruned.macs_after / pruned.macs_before <= target
    assert pruned.counts == {c.name: c.units for c in find_channels(pruned.model)}
    optimizer = torch.optim.SGD(pruned.model.parameters(), lr=1e-5)
    value = loss(pruned.model, data)
    value.backward()
    optimizer.step()
    assert loss(pruned.model, data) < value


def test_dead_channels_go_first():
    model = vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[:, 10:] = 0
    importance = taylor_importance(model, [batch(model)], loss)
    macs = trace(model).macs
    dead = 2 * (64 - 10) * 16 * 17
    pruned = prune(model, importance, (macs - dead + 1) / macs)
    assert pruned.counts["blocks.1.mlp.mlp"] == 10
    kept = dict(zip((c.name for c in pruned.channels), pruned.kept, strict=True))
    assert kept["blocks.1.mlp.mlp"].tolist() == [list(range(10))]
    x, _ = batch(model)
    torch.testing.assert_close(pruned.model(x), model(x))
    rows = {(row["block"], row["kind"]): row for row in pruned.rows()}
    assert rows["blocks.1.mlp", "mlp"]["kept"] == 10
    assert rows["blocks.0.attn", "qk"] == {
        "block": "blocks.0.attn", "kind": "qk", "head": None, "kept": 16, "of": 16, "share": 1.0,
    }  # fmt: skip


def test_counts_can_be_kept_to_multiples():
    model = vit()
    importance = taylor_importance(model, [batch(model)], loss)
    pruned = prune(model, importance, 0.7, multiple=4)
    assert all(count % 4 == 0 for count in pruned.counts.values())


def test_freed_width_is_given_back_where_width_was_kept():
    model = vit()
    importance = taylor_importance(model, [batch(model)], loss)
    pruned = prune(model, importance, 0.6)
    wider = redistribute(pruned)
    macs = trace(wider).macs
    assert 0.9 * pruned.macs_before < macs <= pruned.macs_before
    x, _ = batch(model)
    torch.testing.assert_close(wider(x), pruned.model(x), rtol=1e-9, atol=1e-9)
    counts = {c.name: c.units for c in find_channels(wider)}
    assert all(counts[name] >= count for name, count in pruned.counts.items())


def test_what_cannot_be_pruned_is_named():
    model = vit()
    importance = taylor_importance(model, [batch(model)], loss)
    with pytest.raises(ValueError, match=r"share of the MACs in \(0, 1\), got 1\.5"):
        prune(model, importance, 1.5)
    with pytest.raises(ValueError, match=r"target 0\.01 is out of reach"):
        prune(model, importance, 0.01)
    with pytest.raises(ValueError, match="at least one batch"):
        taylor_importance(model, [], loss)
    with pytest.raises(ValueError, match=r"no channel set 'blocks\.9'"):
        resize(model, {"blocks.9": torch.zeros(1, 1, dtype=torch.int64)})
    with pytest.raises(ValueError, match="needs one channel or more, got 0"):
        resize(model, {"blocks.0.mlp.mlp": torch.zeros(1, 0, dtype=torch.int64)})
    with pytest.raises(ValueError, match="Conv2d has no channels"):
        find_channels(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="batch norms folded"):
        find_channels(fuse(efficientvit()))
    with pytest.raises(ValueError, match="not finite"):
        taylor_importance(model, [batch(model)], lambda m, data: loss(m, data) * float("inf"))
