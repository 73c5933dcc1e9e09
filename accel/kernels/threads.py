"""Heads of images spread over threads, for compiled loops that release the interpreter.

As many threads as PyTorch uses, held in a pool of their own: compiled code that made its own
threads could not be called from several at once, nor follow `torch.set_num_threads`.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

_ROW_COST = 12
"""What a query costs beside its entries, in entries (measured: about 0.1 us)."""

_LEAST_COST = 30_000
"""A share of less than this is not worth a thread (measured: about 0.2 ms)."""


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

    def some() -> None:
        while True:
            try:
                share = waiting.popleft()
            except IndexError:
                return
            work(share)

    others = [_pool(threads).submit(some) for _ in range(min(threads, shares) - 1)]
    some()
    for other in others:
        other.result()


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="sievit-attention")


os.register_at_fork(after_in_child=_pool.cache_clear)
