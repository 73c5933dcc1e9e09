"""Shares of measured run time, and what the measuring leaves as it was."""

from __future__ import annotations

import pytest
import torch

from sievit.models import create
from sievit.models.costs import run_profile
from sievit.models.costs.run_profile import (
    MEMORY_BOUND,
    RunProfile,
    operation_kind,
    profile_run,
    relative_time,
)


def test_shares_by_hand():
    operations = {
        "aten::addmm": 0.5, "aten::copy_": 0.1, "aten::add_": 0.15, "aten::gelu": 0.1,
        "aten::native_layer_norm": 0.05, "aten::view": 0.05, "aten::mul": 0.05,
    }  # fmt: skip
    profile = RunProfile("m", (8, 8), 1, 1, 1, 1.0, operations)
    assert profile.memory_bound_share == pytest.approx(0.35)
    assert next(iter(profile.kinds)) == "products"
    assert profile.kinds["other element-wise"] == pytest.approx(0.05)
    assert profile.largest("copy") == ("copy_",)
    assert profile.to_dict()["kinds"]["add"]["share"] == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::add_", "add"),
        ("aten::relu_", "activation"),
        ("aten::cat", "copy"),
        ("aten::_unsafe_view", "reshape"),
        ("aten::mkldnn_convolution", "products"),
        ("aten::native_batch_norm", "normalisation"),
        ("sievit::deform_conv", "sampling"),
        ("mine::odd", "other element-wise"),
    ],
)
def test_kinds_of_operations(name, kind):
    assert operation_kind(name) == kind


def test_a_real_run_counts_its_operations_and_leaves_all_as_it_was():
    model = create("deit_tiny", depth=1, image_size=32)
    model.blocks[0].eval()
    threads, shares = torch.get_num_threads(), []
    profile = profile_run(model, batch=2, threads=1, repeats=2, progress=shares.append)
    assert (profile.image_size, profile.batch, profile.threads) == ((32, 32), 2, 1)
    assert profile.seconds > 0
    assert {"products", "activation", *MEMORY_BOUND} <= set(profile.kinds)
    assert 0 < profile.memory_bound_share < 1
    assert shares[-1] == 1
    assert torch.get_num_threads() == threads
    assert model.training
    assert not model.blocks[0].training
    with pytest.raises(ValueError, match="at least 1, got 0"):
        profile_run(model, batch=0)
    with pytest.raises(ValueError, match="multiples of the patch"):
        profile_run(model, 33)


def test_two_runs_take_turns(monkeypatch):
    """A machine that slows down fourfold halfway changes no ratio."""
    now, calls = [0.0], []

    def step(name: str, seconds: float) -> None:
        calls.append(name)
        now[0] += seconds * (4 if len(calls) > 6 else 1)

    monkeypatch.setattr(run_profile.time, "perf_counter", lambda: now[0])
    ratio = relative_time(lambda: step("run", 0.3), lambda: step("base", 0.2), 5)
    assert ratio == pytest.approx(1.5)
    assert calls == ["base", "run"] * 6
