"""Threads for compiled loops that release the interpreter: PyTorch's own, where they can be had.

Between two operations PyTorch's OpenMP threads stay awake for some milliseconds and wait for
the next. Threads of another pool would have to share the cores with them for just that long;
so work is given to the same team, through the OpenMP library that PyTorch has loaded. Where
that is not found (another platform's OpenMP), and in a forked child, where a team of GNU
OpenMP does not come to life again, a pool of our own does it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

_ROW_COST = 12
"""What a query costs beside its entries, in entries (measured: about 0.1 us)."""

_LEAST_COST = 30_000
"""A share of less than this is not worth a thread (measured: about 0.2 ms)."""

_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def in_team(work: Callable[[], None], threads: int) -> None:
    """Call ``work`` in up to ``threads`` threads at once, this one included, and wait for all.

    OpenMP may give fewer: so each call must go on until nothing is left to do. The first
    exception of any of them is raised here.
    """
    if threads <= 1:
        work()
        return
    raised: list[BaseException] = []

    def guarded(*_: object) -> None:
        try:
            work()
        except BaseException as error:  # nothing may leave through foreign frames
            raised.append(error)

    parallel = _openmp()
    if parallel is not None:
        parallel(_REGION(guarded), None, threads, 0)
    else:
        others = [_pool(threads).submit(guarded) for _ in range(threads - 1)]
        guarded()
        for other in others:
            other.result()
    if raised:
        raise raised[0]


def spread(
    work: Callable[[tuple[int, int]], None],
    batch: int,
    heads: int,
    parts: int,
    indptr: np.ndarray,
) -> None:
    """Call ``work`` on ranges of items until all are done, in as many threads as PyTorch
    uses, this one included: each takes the next share, of equal cost, until none is left.

    Items are ``parts`` equal parts of the queries of a head, those of a head together, the
    heads of an image together; ``indptr`` is a plan's, and says what each head costs.
    """
    threads = torch.get_num_threads()
    items = batch * heads * parts
    rows = (len(indptr) - 1) * batch
    cost = int(indptr[-1]) * batch + _ROW_COST * rows
    if threads == 1 or items < 2 or cost < 2 * _LEAST_COST:
        work((0, items))
        return
    of_head = np.diff(indptr[:: (len(indptr) - 1) // heads]) + _ROW_COST * rows / (heads * batch)
    done = np.cumsum(np.tile(np.repeat(of_head / parts, parts), batch))
    shares = min(4 * threads, items, cost // _LEAST_COST)
    cuts = np.searchsorted(done, done[-1] * np.arange(1, shares) / shares).tolist()
    waiting = deque(itertools.pairwise([0, *cuts, items]))
    share_out(work, waiting, min(threads, shares))


def share_out(work: Callable[[tuple[int, int]], None], shares: deque, threads: int) -> None:
    """Call ``work`` on every one of ``shares``, each thread taking the next one left."""

    def some() -> None:
        while True:
            try:
                share = shares.popleft()
            except IndexError:
                return
            work(share)

    in_team(some, threads)


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """``GOMP_parallel`` of the OpenMP that PyTorch runs on, or None."""
    if _forked or "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel  # it, or what it was linked with
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads beside the caller's own."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="sievit")


_forked = False
"""Whether this process is a forked child."""


def _in_child() -> None:
    global _forked
    _forked = True
    _openmp.cache_clear()
    _pool.cache_clear()  # its threads did not come along


os.register_at_fork(after_in_child=_in_child)
