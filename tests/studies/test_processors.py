"""Real processors beside a machine: what is timed, what is modelled, and that it says so."""

from __future__ import annotations

import json

import pytest
import torch

from sievit.accel import simulate
from sievit.accel.report.roofline import DEVICES, MEASURED
from sievit.models import create, trace
from sievit.studies.processors import beside, logs, modelled, timed_here


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return create("vit_tiny", image_size=32, patch_size=8, dim=32, depth=2, heads=2)


def test_attention_and_network_are_timed_here(model):
    workload = trace(model, 32)
    rows = timed_here(workload, model, image_size=32, batch=2, passes=3)
    assert [row.name for row in rows] == ["here, eager", "here, fused"]
    for row in rows:
        assert row.basis == "measured here"
        assert row.batch == 2
        assert 0 < row.attention_seconds_per_image < row.seconds_per_image
        assert "batch 2 (measured here)" in row.label
        assert "3 passes" in row.source
    (alone,) = timed_here(workload, kernels=("fused",), passes=1)
    assert alone.seconds_per_image is None


def test_rows_beside_a_report(model):
    workload = trace(model, 32)
    report = simulate(workload)
    (alone,) = timed_here(workload, kernels=("eager",), passes=1)
    found = beside(report, (alone, *logs(), *modelled(workload, (1, 4))))
    assert {row.basis for row in found} == {"measured here", "measured log", "modelled"}
    assert (found[0].network_seconds, found[0].network_speedup) == (None, None)
    for row in found:
        factor = row.attention_seconds / report.attention_seconds
        assert row.attention_speedup == pytest.approx(factor)
    tx2 = found[1]
    assert tx2.network_seconds == MEASURED["jetson-tx2"].seconds_per_image
    assert tx2.network_speedup == pytest.approx(tx2.network_seconds / report.seconds)
    assert len(found) == 3 + len(DEVICES) * 2 * 2
    stored = json.loads(json.dumps([row.to_dict() for row in found]))
    assert {row["batch"] for row in stored} == {1, 4, 2048}


def test_each_device_is_modelled_both_ways(model):
    rows = modelled(trace(model, 32), (1,))
    styles = {(row.device.name, row.attention_style) for row in rows}
    assert styles == {(name, style) for name in DEVICES for style in ("eager", "fused")}
    for row in rows:
        peaks = row.device.product_flops_per_s
        if row.attention_style == "fused":
            assert peaks[row.precision] == max(peaks.values())
