"""Work given to PyTorch's own threads, or to a pool where they cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections import deque

import pytest

from sievit.accel.kernels import threads


@pytest.fixture(params=["openmp", "pool"])
def team(request, monkeypatch) -> str:
    if request.param == "pool":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("PyTorch's OpenMP library is not found here")
    return request.param


def test_every_share_is_done_once(team):
    done: list[int] = []
    threads.share_out(done.append, deque(range(100)), 3)
    assert sorted(done) == list(range(100))


def test_threads_work_at_the_same_time(team):
    both = threading.Barrier(2, timeout=30)
    seen: list[int] = []

    def work(share: int) -> None:
        both.wait()  # passes where two are inside
        seen.append(threading.get_ident())

    threads.share_out(work, deque(range(2)), 2)
    assert len(set(seen)) == 2


def test_an_error_in_any_thread_reaches_the_caller(team):
    here = threading.get_ident()
    both = threading.Barrier(2, timeout=30)

    def work() -> None:
        both.wait()
        if threading.get_ident() != here:
            raise ValueError("in the other thread")

    with pytest.raises(ValueError, match="in the other thread"):
        threads.in_team(work, 2)


def test_one_thread_is_the_callers(team):
    seen: list[int] = []
    threads.in_team(lambda: seen.append(threading.get_ident()), 1)
    assert seen == [threading.get_ident()]


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch uses GNU OpenMP on Linux")
def test_pytorchs_threads_are_found_on_linux():
    assert threads._openmp() is not None


FORKED = """
    import os, numpy as np, torch
    from sievit.accel.kernels import plan_attention, sparse_attention

    torch.set_num_threads(2)
    plan = plan_attention(np.random.default_rng(0).random((3, 100, 100)) < 0.3)
    q = torch.randn(32, 3, 100, 16)
    before = sparse_attention(q, q, q, plan).numpy()
    if os.fork() == 0:  # PyTorch's own operations would wait forever here
        os._exit(0 if np.array_equal(sparse_attention(q, q, q, plan).numpy(), before) else 1)
    _, status = os.wait()
    print("child", os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_computes_too():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORKED)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "child 0", done.stderr
