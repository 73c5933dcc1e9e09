"""The benchmark of the simulator: its masks, its rows, and peers that are not there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "bench_simulator.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_simulator", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("side", [16, 32])
def test_long_masks_keep_five_percent(bench, side):
    keep = bench._long_mask(side, np.random.default_rng(0))
    assert keep.mean() == pytest.approx(0.05, abs=0.003)
    assert (keep.sum(axis=0) > 0.25 * side * side).any()  # keys that are global
    assert keep[np.arange(side * side), np.arange(side * side)].all()  # the nearest token


def test_a_timed_row_and_its_line(bench):
    from sievit.accel import simulate
    from sievit.workload import Attention, Workload, polarize_head

    mask = polarize_head(np.random.default_rng(0).random((16, 16)) < 0.4, 8)
    workload = Workload("tiny", (Attention("a", 1, 16, 16, 8, 8, masks=(mask,)),))
    row = bench.timed(workload, "vitcod", 3)
    assert row["cycles"] == simulate(workload).cycles
    assert 0 < row["fastest_seconds"] <= row["seconds"]
    assert json.loads(json.dumps(row)) == row
    (name, (figure, bar)) = next(iter(bench.BARS.items()))
    line = bench.show({"simulator": name, **row})
    assert f"{figure} {row[figure]:.3g} of at most {bar:g}" in line


def test_a_peer_that_is_not_installed_is_left_out(bench, tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"No module named 'scalesim'\" >&2\nexit 1\n")
    python.chmod(0o755)
    assert bench.scale_sim(str(python)) is None
    assert "SCALE-Sim was not run: No module named 'scalesim'" in capsys.readouterr().err


def test_the_published_script_beside_ours(bench, golden):
    mask = golden("vitcod-deit-tiny-masks/info_0.95.npy")
    assert bench.released_case(str(mask), 1)["cycles"] == 9492 + 2043156
    assert bench.deit_tiny(None).attention[0].masks[0].queries == 197
