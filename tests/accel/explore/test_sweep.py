"""Exploration: figures as `simulate` gives them, from any executor; resumed, damaged, wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from sievit.accel import area, energy, presets, simulate
from sievit.accel import explore as explore_face
from sievit.accel.explore.fingerprint import code_fingerprint, fingerprint
from sievit.accel.explore.grid import configured, grid, load_configurations
from sievit.accel.explore.points import ATTENTION_OBJECTIVES, OBJECTIVES, sensitivity
from sievit.accel.explore.sweep import _Chunk, _settings, _simulated, explore
from sievit.accel.report.profiles import PROFILES
from sievit.workload import Attention, Elementwise, Gemm, HeadCodec, Workload, polarize_head

SMALL = replace(presets["vitcod"], lines=8, name="small")


def _workload(name: str = "tiny", kept: float = 0.3, codec: HeadCodec | None = None) -> Workload:
    generator = np.random.default_rng(7)
    masks = []
    for _ in range(2):
        keep = generator.random((17, 17)) < kept
        keep[:, 0] = keep[0] = True
        masks.append(polarize_head(keep, 10))
    calls = [
        Gemm(f"{layer}.qkv", 17, 16, 48, bias=True) if part == "qkv"
        else Attention(f"{layer}.attn", 2, 17, 17, 8, 8, masks=tuple(masks), codec=codec)
        for layer in range(2)
        for part in ("qkv", "attn")
    ]  # fmt: skip
    return Workload(name, tuple(calls))


def _for_the_script() -> Workload:
    """The released script wants a global key, which 50 queries keep, and some others."""
    keep = np.eye(60, dtype=bool)
    keep[:, 0] = True
    call = Attention("a", 1, 60, 60, 8, 8, masks=(polarize_head(keep, 50),))
    return Workload("script", (call,))


GRID = grid({"lines": (4, 8, 16), "dram_bytes_per_s": (4 * 10**9, 8 * 10**9)})


def test_points_are_what_simulate_energy_and_area_say():
    workload = _workload()
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
    workloads = {"a": _workload(), "b": _workload(kept=0.6)}
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
        _settings("vitcod", 1, "aladdin-28nm"), "a", _workload(), (("k", configured(SMALL, {})),)
    )
    sent = pickle.loads(pickle.dumps(chunk))
    outcomes = _simulated(sent)
    assert pickle.loads(pickle.dumps(outcomes)) == outcomes == _simulated(chunk)


def test_resume_computes_only_what_is_missing(tmp_path, monkeypatch):
    path, told = tmp_path / "r.jsonl", []
    explore({"a": _workload()}, GRID[:4], results=path, base=SMALL, jobs=1)
    text = path.read_bytes()
    simulated = []
    module = sys.modules["sievit.accel.explore.sweep"]
    monkeypatch.setattr(
        module, "simulate", lambda *a, **k: simulated.append(a) or simulate(*a, **k)
    )
    found = explore(
        {"renamed": _workload()},
        [configured(replace(SMALL, name="other name"), one) for one in GRID],
        results=path,
        base=SMALL,
        jobs=1,
        progress=lambda point, done, total: told.append((done, total)),
    )
    assert (found.reused, len(simulated)) == (4, 2)
    assert told == [(number, 6) for number in range(1, 7)]
    assert path.read_bytes().startswith(text)
    assert [point.workload for point in found.points] == ["renamed"] * 6
    for change in (
        {"batch": 2},
        {"profile": "horowitz-28nm"},
        {"simulator": "vitcod_plain"},
    ):
        assert explore({"a": _workload()}, GRID[:1], results=path, base=SMALL, jobs=1, **change).reused == 0  # fmt: skip # noqa: E501
    assert explore({"a": _workload(kept=0.31)}, GRID[:1], results=path, base=SMALL, jobs=1).reused == 0  # fmt: skip # noqa: E501


def test_resume_after_a_cut_anywhere_in_the_last_line(tmp_path):
    path = tmp_path / "r.jsonl"
    expected = explore({"a": _workload()}, GRID[:2], results=path, base=SMALL, jobs=1)
    text = path.read_bytes()
    first = text.index(b"\n") + 1
    for cut in (*range(first, len(text), 97), len(text) - 2, len(text) - 1):
        path.write_bytes(text[:cut])
        found = explore({"a": _workload()}, GRID[:2], results=path, base=SMALL, jobs=1)
        assert found.points == expected.points
        assert path.read_bytes() == text


def test_results_of_other_code_stay_and_are_not_used(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    explore({"a": _workload()}, GRID[:2], results=path, base=SMALL, jobs=1)
    text = path.read_bytes()
    monkeypatch.setattr(
        sys.modules["sievit.accel.explore.sweep"], "code_fingerprint", lambda: "other"
    )
    with pytest.warns(UserWarning, match="2 of 2 results.*another version"):
        found = explore({"a": _workload()}, GRID[:2], results=path, base=SMALL, jobs=1)
    assert found.reused == 0
    assert path.read_bytes().startswith(text)


def test_a_bad_configuration_is_reported_and_the_rest_goes_on(tmp_path):
    path = tmp_path / "r.jsonl"
    machines = [
        {"lines": 8},
        {"lines": 0},
        {"linez": 8},
        {"assignment": "best"},
        {"q_buffer_bytes": 1},
        replace(SMALL, k_buffer_bytes=3),
        {"lines": 4},
    ]
    for reused in (0, 4):
        found = explore({"a": _workload()}, machines, results=path, base=SMALL, jobs=1)
        errors = [point.error for point in found.points]
        assert errors[0] is errors[6] is None
        assert "lines must be an integer >= 1, got 0" in errors[1]
        assert "no such field: linez" in errors[2]
        assert "balanced, round_robin, lockstep, got 'best'" in errors[3]
        assert "q_buffer_bytes is 1, one pass needs at least 8" in errors[4]
        assert "k_buffer_bytes is 3, one pass needs at least 8" in errors[5]
        assert len(found.done) == 2
        assert found.reused == reused
        assert {point.labels["lines"] for point in found.front()} <= {8, 4}


def test_an_error_that_is_no_verdict_is_tried_again(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"

    def full(*_args, **_named):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["sievit.accel.explore.sweep"], "simulate", full)
        found = explore({"a": _workload()}, GRID[:1], results=path, base=SMALL, jobs=1)
    assert found.points[0].error == "MemoryError: no room"
    found = explore({"a": _workload()}, GRID[:1], results=path, base=SMALL, jobs=1)
    assert (found.points[0].error, found.reused) == (None, 0)
    found = explore({"a": _workload()}, GRID[:1], results=path, base=SMALL, jobs=1)
    assert (found.points[0].error, found.reused) == (None, 1)


def test_equal_configurations_run_once(tmp_path):
    path = tmp_path / "r.jsonl"
    machines = [{"lines": 8}, {}, SMALL, {"lines": 8, "name": "again"}]
    found = explore({"a": _workload(), "b": _workload()}, machines, results=path, base=SMALL)
    assert path.read_bytes().count(b"\n") == 1
    assert len({json.dumps(dict(point.figures)) for point in found.points}) == 1
    assert [point.workload for point in found.points] == ["a"] * 4 + ["b"] * 4


def test_a_killed_worker_costs_nothing():
    killed = []

    def kill_once(point, done, total):
        if not killed:
            for child in multiprocessing.active_children():
                killed.append(child.pid)
                child.kill()

    machines = grid({"lines": tuple(range(3, 15)), "v_banks": (8, 16)})
    found = explore({"a": _workload()}, machines, base=SMALL, jobs=2, progress=kill_once)
    assert killed
    assert found == explore({"a": _workload()}, machines, base=SMALL, jobs=1)


KILLED = """
import os, signal, sys
import numpy as np
from sievit.accel import Hardware, explore
from sievit.accel.configurations import grid
from sievit.masks import polarize_head
from sievit.workload import Attention, Workload

def stop(point, done, total):
    if done == int(sys.argv[2]):
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))

mask = polarize_head(np.random.default_rng(1).random((9, 9)) < 0.5, 6)
workload = Workload("w", (Attention("a", 1, 9, 9, 8, 8, masks=(mask,)),))
found = explore({"w": workload}, grid({"lines": tuple(range(1, 9))}), results=sys.argv[1], jobs=1, progress=stop)
print(found.reused, len(found.done))
"""  # noqa: E501


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_killed_and_interrupted_then_finished(tmp_path):
    script, path = tmp_path / "run.py", tmp_path / "r.jsonl"
    script.write_text(KILLED)

    def run(after: int, how: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(script), str(path), str(after), how],
            capture_output=True,
            text=True,
            check=False,
        )

    assert run(3, "SIGKILL").returncode == -9
    assert path.read_bytes().count(b"\n") == 3
    interrupted = run(5, "SIGINT")  # three known, two new
    assert "KeyboardInterrupt" in interrupted.stderr
    assert path.read_bytes().count(b"\n") == 5
    assert path.read_bytes().endswith(b"}\n")
    assert run(99, "SIGINT").stdout == "5 8\n"


class _Broken(ThreadPoolExecutor):
    """Breaks at the third task, as a pool of processes does."""

    def __init__(self):
        super().__init__(1)
        self.tasks = 0

    def submit(self, function, chunk):
        from concurrent.futures.process import BrokenProcessPool

        self.tasks += 1
        if self.tasks < 3:
            return super().submit(function, chunk)
        future = super().submit(int)
        future.result()
        future._state, future._result = "FINISHED", None
        future._exception = BrokenProcessPool("a process died")
        return future


def test_a_broken_executor_of_the_caller(tmp_path):
    path = tmp_path / "r.jsonl"
    with _Broken() as executor, pytest.raises(RuntimeError, match=r"executor broke.*results file"):
        explore({"a": _workload()}, GRID, executor, path, base=SMALL)
    done = path.read_bytes().count(b"\n")
    found = explore({"a": _workload()}, GRID, results=path, base=SMALL, jobs=1)
    assert (found.reused, len(found.done)) == (done, 6)


def test_arguments_are_checked():
    work = {"a": _workload()}
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


def test_front_and_missing_figures():
    found = explore({"a": _workload()}, GRID, base=SMALL, jobs=1)
    for objectives in (OBJECTIVES, ATTENTION_OBJECTIVES, ("sram_bytes",)):
        front = found.front(objectives)
        assert front
        assert [p.cost(objectives[0]) for p in front] == sorted(
            p.cost(objectives[0]) for p in front
        )
    with pytest.raises(ValueError, match=r"no figure 'bottleneck'.* has cycles, seconds"):
        found.front(("bottleneck",))
    released = explore({"a": _for_the_script()}, [{}], simulator="released", jobs=1)
    assert released.points[0].figures["energy_pj"] is None
    with pytest.raises(ValueError, match="no figure 'energy_pj' under simulator 'released'"):
        released.front()
    assert released.front(("seconds", "area_mm2")) == released.points


def test_sensitivity_compares_like_with_like():
    values = {
        "lines": (4, 8),
        "q_buffer_bytes+k_buffer_bytes": (1024, 2048),
        "dram_bytes_per_s": (4 * 10**9, 8 * 10**9),
    }
    work = {"a": _workload(), "b": _workload(kept=0.7)}
    labels = {"a": {"sparsity": 0.7}, "b": {"sparsity": 0.3}}
    found = explore(work, grid(values), base=SMALL, jobs=1, labels=labels)
    assert found.axes() == {
        "sparsity": ("sparsity",),
        "lines": ("lines",),
        "q, k_buffer_bytes": ("q_buffer_bytes", "k_buffer_bytes"),
        "dram_bytes_per_s": ("dram_bytes_per_s",),
    }
    effects = sensitivity(found, "attention_cycles")["lines"]
    assert [effect.value for effect in effects] == [4, 8]
    assert effects[0][1:] == (1.0, 1.0, 1.0, 8)
    ratios = []
    for slow in found.points:
        if slow.labels["lines"] == 4:
            same = {**slow.labels, "lines": 8}
            fast = next(point for point in found.points if point.labels == same)
            ratios.append(fast.cost("attention_cycles") / slow.cost("attention_cycles"))
    assert effects[1] == (8, min(ratios), float(np.median(ratios)), max(ratios), 8)


def test_lists_of_configurations(tmp_path):
    toml = tmp_path / "c.toml"
    toml.write_text(
        '[grid]\nlines = [4, 8]\n"q_banks+k_banks" = [2]\n'
        '[[configuration]]\nname = "x"\nlines = 0\n'
    )
    both = (
        {"lines": 4, "q_banks": 2, "k_banks": 2},
        {"lines": 8, "q_banks": 2, "k_banks": 2},
        {"name": "x", "lines": 0},
    )
    assert load_configurations(toml) == both
    found = explore({"a": _workload()}, both, base=SMALL, jobs=1)
    assert [point.error is None for point in found.points] == [True, True, False]
    listed = tmp_path / "c.json"
    listed.write_text('[{"lines": 4}, {"lines": 8}]')
    assert load_configurations(listed) == ({"lines": 4}, {"lines": 8})
    for text in (
        "lines = 3",
        "[grid",
        "grid = 3",
        "configuration = [3]",
        "",
        "[grid]\nlinez = [1]",
    ):
        toml.write_text(text)
        with pytest.raises(ValueError, match=r"c\.toml: not a list of configurations"):
            load_configurations(toml)


def test_digests():
    assert fingerprint(_workload().ops) == fingerprint(_workload("other name").ops)
    seen = {
        fingerprint(_workload().ops),
        fingerprint(_workload(kept=0.4).ops),
        fingerprint(_workload(codec=HeadCodec(2, 1)).ops),
        fingerprint((*_workload().ops, Elementwise("n", "add", 3, 3))),
        fingerprint(_workload().ops[:3]),
        fingerprint(PROFILES["aladdin-28nm"]),
        fingerprint(PROFILES["horowitz-28nm"]),
    }
    assert len(seen) == 7
    assert fingerprint((np.int64(3), 2.0, None)) == fingerprint([3, 2.0, None])
    assert len(code_fingerprint()) == 32
    assert explore_face is explore
    with pytest.raises(TypeError, match="no digest of a object"):
        fingerprint(object())
