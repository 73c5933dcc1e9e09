"""Worker processes that die, and processes that start them and are killed or interrupted.

Tasks are Python expressions given to the built-in `eval`: a worker can only run what it
can import.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from sievit.accel.explore.processes import WorkerDied, run_in_processes

DIE = "__import__('os')._exit(3)"


def test_all_tasks_end_once():
    tasks = [f"{number} ** 2" for number in range(9)]
    made = dict(run_in_processes(eval, tasks, 2))
    assert made == {task: number**2 for number, task in enumerate(tasks)}
    assert list(run_in_processes(eval, [], 2)) == []


def test_a_death_costs_only_the_guilty_task():
    tasks = ["1", DIE, "2", "3", "4"]
    made = list(run_in_processes(eval, tasks, 2))
    assert sorted(task for task, _ in made) == sorted(tasks)
    for task, result in made:
        assert isinstance(result, WorkerDied) if task == DIE else result == int(task)


def test_a_group_of_tasks_is_cut_to_find_the_guilty_one():
    group = f"[1, {DIE}]"
    made = dict(run_in_processes(eval, [group], 2, lambda task: ("1", DIE) if task == group else (task,)))  # fmt: skip # noqa: E501
    assert made["1"] == 1
    assert isinstance(made[DIE], WorkerDied)


def test_an_error_of_the_function_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(run_in_processes(eval, ["1 / 0"], 1))


def test_leaving_early_ends_the_workers():
    begin = time.monotonic()
    tasks = ["__import__('os').getpid()", "__import__('time').sleep(60)", "2"]
    running = run_in_processes(eval, tasks, 2)
    _, pid = next(running)
    running.close()
    assert time.monotonic() - begin < 30
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


PARENT = """
import sys
from sievit.accel.workers import run_in_processes
if __name__ == "__main__":
    for task, made in run_in_processes(eval, ["__import__('os').getpid()"] + ["__import__('time').sleep(60)"] * 3, 1):
        print(made, flush=True)
"""  # noqa: E501


def _parent(tmp_path) -> tuple[subprocess.Popen, int]:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    started = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    return started, int(started.stdout.readline())


def _gone(pid: int, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if _is_zombie(pid):
            return True
        time.sleep(0.05)
    return False


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_workers_end_when_their_parent_is_killed(tmp_path):
    parent, worker = _parent(tmp_path)
    parent.kill()
    parent.communicate()
    assert _gone(worker)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_interrupt_ends_all_at_once_and_only_the_parent_says_so(tmp_path):
    parent, worker = _parent(tmp_path)
    os.killpg(parent.pid, signal.SIGINT)  # what Ctrl-C sends: to the whole group
    _, errors = parent.communicate(timeout=30)
    assert _gone(worker)
    assert errors.count(b"KeyboardInterrupt") == 1
