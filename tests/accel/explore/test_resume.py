"""Exploration that was cut off, killed or broken, and what it computes when it resumes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from explored import GRID, SMALL, tiny_workload

from sievit.accel import simulate
from sievit.accel.explore.grid import configured, grid
from sievit.accel.explore.sweep import explore


def test_resume_computes_only_what_is_missing(tmp_path, monkeypatch):
    path, told = tmp_path / "r.jsonl", []
    explore({"a": tiny_workload()}, GRID[:4], results=path, base=SMALL, jobs=1)
    text = path.read_bytes()
    simulated = []
    module = sys.modules["sievit.accel.explore.sweep"]
    monkeypatch.setattr(
        module, "simulate_silently", lambda *a, **k: simulated.append(a) or simulate(*a, **k)
    )
    found = explore(
        {"renamed": tiny_workload()},
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
        assert explore({"a": tiny_workload()}, GRID[:1], results=path, base=SMALL, jobs=1, **change).reused == 0  # fmt: skip # noqa: E501
    assert explore({"a": tiny_workload(kept=0.31)}, GRID[:1], results=path, base=SMALL, jobs=1).reused == 0  # fmt: skip # noqa: E501


def test_resume_after_a_cut_anywhere_in_the_last_line(tmp_path):
    path = tmp_path / "r.jsonl"
    expected = explore({"a": tiny_workload()}, GRID[:2], results=path, base=SMALL, jobs=1)
    text = path.read_bytes()
    first = text.index(b"\n") + 1
    for cut in (*range(first, len(text), 97), len(text) - 2, len(text) - 1):
        path.write_bytes(text[:cut])
        found = explore({"a": tiny_workload()}, GRID[:2], results=path, base=SMALL, jobs=1)
        assert found.points == expected.points
        assert path.read_bytes() == text


def test_results_of_other_code_stay_and_are_not_used(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    explore({"a": tiny_workload()}, GRID[:2], results=path, base=SMALL, jobs=1)
    text = path.read_bytes()
    monkeypatch.setattr(
        sys.modules["sievit.accel.explore.sweep"], "code_fingerprint", lambda: "other"
    )
    with pytest.warns(UserWarning, match="2 of 2 results.*another version"):
        found = explore({"a": tiny_workload()}, GRID[:2], results=path, base=SMALL, jobs=1)
    assert found.reused == 0
    assert path.read_bytes().startswith(text)


def test_an_error_that_is_no_verdict_is_tried_again(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"

    def full(*_args, **_named):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["sievit.accel.explore.sweep"], "simulate_silently", full)
        found = explore({"a": tiny_workload()}, GRID[:1], results=path, base=SMALL, jobs=1)
    assert found.points[0].error == "MemoryError: no room"
    found = explore({"a": tiny_workload()}, GRID[:1], results=path, base=SMALL, jobs=1)
    assert (found.points[0].error, found.reused) == (None, 0)
    found = explore({"a": tiny_workload()}, GRID[:1], results=path, base=SMALL, jobs=1)
    assert (found.points[0].error, found.reused) == (None, 1)


def test_a_killed_worker_costs_nothing():
    killed = []

    def kill_once(point, done, total):
        if not killed:
            for child in multiprocessing.active_children():
                killed.append(child.pid)
                child.kill()

    machines = grid({"lines": tuple(range(3, 15)), "v_banks": (8, 16)})
    found = explore({"a": tiny_workload()}, machines, base=SMALL, jobs=2, progress=kill_once)
    assert killed
    assert found == explore({"a": tiny_workload()}, machines, base=SMALL, jobs=1)


KILLED = """
import os, signal, sys
import numpy as np
from sievit.accel import Hardware, explore
from sievit.accel.explore.grid import grid
from sievit.workload import Attention, Workload, polarize_head

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
        explore({"a": tiny_workload()}, GRID, executor, path, base=SMALL)
    done = path.read_bytes().count(b"\n")
    found = explore({"a": tiny_workload()}, GRID, results=path, base=SMALL, jobs=1)
    assert (found.reused, len(found.done)) == (done, 6)
