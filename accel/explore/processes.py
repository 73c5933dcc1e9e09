"""Work in processes of our own that may die: out of memory, killed, interrupted.

Workers are started afresh (never forked: compiled code and threads do not survive that),
leave Ctrl-C to the process that started them, and end when it does, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

Task = TypeVar("Task")


class WorkerDied(Exception):
    """A worker process ended while it had this task alone."""


def run_in_processes(
    function: Callable[[Task], Any],
    tasks: Sequence[Task],
    jobs: int,
    split: Callable[[Task], Sequence[Task]] = lambda task: (task,),
) -> Iterator[tuple[Task, Any]]:
    """(task, its result or a `WorkerDied`) as they end, ``jobs`` at a time.

    When a worker dies its pool is lost with it: the tasks that were in work are cut by
    ``split`` and run one at a time, so that the guilty one is known; the others go on.
    An exception that ``function`` raises is raised here. Leaving the iterator early ends
    all workers.
    """
    waiting = deque(tasks)
    while waiting:
        in_work = yield from _until_broken(function, waiting, jobs, jobs + 1)
        suspects = deque(part for task in in_work for part in split(task))
        while suspects:
            for guilty in (yield from _until_broken(function, suspects, 1, 1)):
                yield guilty, WorkerDied("its worker process died: killed, or out of memory")


def _until_broken(
    function: Callable[[Task], Any], waiting: deque[Task], jobs: int, at_once: int
) -> Iterator[tuple[Task, Any]]:
    """Run what is ``waiting``, ``at_once`` tasks handed out at a time; returns those that
    were when a worker died."""
    with _pool(min(jobs, len(waiting))) as pool:
        running: dict[Future, Task] = {}
        while waiting or running:
            try:
                while waiting and len(running) < at_once:
                    running[pool.submit(function, waiting[0])] = waiting[0]
                    waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield running.pop(future), result
            except BrokenExecutor:
                return list(running.values())
    return []


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose workers have started; all of them end with the block."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_in_worker)
    try:
        try:
            pool.submit(os.getpid).result()
        except BrokenExecutor:
            raise RuntimeError(
                "worker processes do not start. A script that explores needs its start under "
                "`if __name__ == '__main__':`; one job, or an executor of your own, does not"
            ) from None
        yield pool
    finally:
        _end(pool)


def _end(pool: ProcessPoolExecutor) -> None:
    """Stop now, also in the middle of a task (`terminate_workers` of Python 3.14)."""
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.terminate()
    pool.shutdown(wait=True, cancel_futures=True)


def _in_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
