"""Exploration: figures as `simulate` gives them, from any executor; wrong arguments."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace

import pytest
from explored import GRID, SMALL, tiny_workload

from sievit.accel import area, energy, simulate
from sievit.accel.explore.grid import configured, grid
from sievit.accel.explore.sweep import _Chunk, _settings, _simulated, explore
from sievit.accel.report.profiles import PROFILES


def test_points_are_what_simulate_energy_and_area_say():
    workload = tiny_workload()
    found = explore({"a": workload}, GRID, base=SMALL, jobs=1, profile="horowitz-28nm", batch=2)
    assert [dict(point.labels) for point in found.points] == list(GRID)
    for point, changes in zip(found.points, GRID, strict=True):
        machine = replace(SMALL, **changes)
        report = simulate(workload, machine, batch=2)
        spent = energy(report, PROFILES["horowitz-28nm"])
        assert point.hardware == machine
        assert point.profile == "horowitz-28nm"
        assert point.figures == {
            "cycles": report.cycles,
            "seconds": report.seconds,
            "energy_pj": spent.total_pj(False),
            "dram_bytes": report.dram_bytes(False),
            "attention_cycles": report.attention_cycles,
            "attention_seconds": report.attention_seconds,
            "attention_energy_pj": spent.total_pj(True),
            "attention_dram_bytes": report.dram_bytes(True),
            "macs": report.macs,
            "utilization": report.utilization(),
            "bottleneck": report.bottleneck(),
            "area_mm2": area(machine, PROFILES["horowitz-28nm"]).total_mm2,
            "sram_bytes": machine.sram_bytes,
        }


def test_any_executor_and_none_give_the_same(tmp_path):
    workloads = {"a": tiny_workload(), "b": tiny_workload(kept=0.6)}
    expected = explore(workloads, GRID, base=SMALL, jobs=1)
    assert explore(workloads, GRID, base=SMALL, jobs=2) == expected
    with ThreadPoolExecutor(2) as executor:
        assert explore(workloads, GRID, executor, base=SMALL) == expected
        assert executor.submit(len, "it stays open").result() == 13
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        found = explore(workloads, GRID, executor, tmp_path / "r.jsonl", base=SMALL)
        assert found == expected
    again = explore(workloads, GRID, results=tmp_path / "r.jsonl", base=SMALL)
    assert again == replace(expected, reused=12)


def test_tasks_and_outcomes_go_through_pickle():
    chunk = _Chunk(
        _settings("vitcod", 1, "aladdin-28nm"),
        "a",
        tiny_workload(),
        (("k", configured(SMALL, {})),),
    )
    sent = pickle.loads(pickle.dumps(chunk))
    outcomes = _simulated(sent)
    assert pickle.loads(pickle.dumps(outcomes)) == outcomes == _simulated(chunk)


def test_a_bad_configuration_is_reported_and_the_rest_goes_on(tmp_path):
    path = tmp_path / "r.jsonl"
    machines = [
        {"lines": 8},
        {"lines": 0},
        {"linez": 8},
        {"assignment": "best"},
        {"output_buffer_bytes": 1},
        replace(SMALL, index_buffer_bytes=3),
        {"lines": 4},
    ]
    for reused in (0, 4):
        found = explore({"a": tiny_workload()}, machines, results=path, base=SMALL, jobs=1)
        errors = [point.error for point in found.points]
        assert errors[0] is errors[6] is None
        assert "lines must be an integer in 1..65536, got 0" in errors[1]
        assert "no such field: linez" in errors[2]
        assert "balanced, round_robin, lockstep, got 'best'" in errors[3]
        assert "output_buffer_bytes is 1, one pass needs at least" in errors[4]
        assert "index_buffer_bytes is 3, one pass needs at least" in errors[5]
        assert len(found.done) == 2
        assert found.reused == reused
        assert {point.labels["lines"] for point in found.front()} <= {8, 4}


def test_equal_configurations_run_once(tmp_path):
    path = tmp_path / "r.jsonl"
    machines = [{"lines": 8}, {}, SMALL, {"lines": 8, "name": "again"}]
    found = explore(
        {"a": tiny_workload(), "b": tiny_workload()}, machines, results=path, base=SMALL
    )
    assert path.read_bytes().count(b"\n") == 1
    assert len({json.dumps(dict(point.figures)) for point in found.points}) == 1
    assert [point.workload for point in found.points] == ["a"] * 4 + ["b"] * 4


def test_arguments_are_checked():
    work = {"a": tiny_workload()}
    with pytest.raises(ValueError, match=r"simulator must be one of .*vitcod.* got 'vitcot'"):
        explore(work, GRID, simulator="vitcot")
    with pytest.raises(ValueError, match=r"profile must be one of .*aladdin-28nm.* got 'x'"):
        explore(work, GRID, profile="x")
    for bad in (0, True, 1.5):
        with pytest.raises(ValueError, match="batch must be"):
            explore(work, GRID, batch=bad)
        with pytest.raises(ValueError, match="jobs must be"):
            explore(work, GRID, jobs=bad)
    with pytest.raises(ValueError, match="no such field: linez; fields are"):
        grid({"linez": (1,)})
    for bad in ((), "balanced", 3):
        with pytest.raises(ValueError, match="lines needs a list of values"):
            grid({"lines": bad})
    assert explore({}, GRID).points == explore(work, []).points == ()
