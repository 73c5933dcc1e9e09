"""Batches for a training that may be taken up anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from torch.utils.data import DataLoader

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]
"""Micro-batches of this process, or a function: number of the first -> batches from there.

A `DataLoader` is gone through again and again. A training that is taken up again sees the
same batches where the loader gives them in the same order: one that shuffles needs a sampler
with ``set_epoch``."""


def repeated(loader: Iterable[Any], start: int = 0) -> Iterator[Any]:
    """The batches of ``loader`` again and again, from the ``start``-th on.

    A sampler with ``set_epoch`` is told the number of the pass. Batches before ``start``
    are read and dropped within their pass; whole passes are not read where the loader
    has a length. Raises ValueError for a loader that gives nothing.
    """
    length = len(loader) if isinstance(loader, Sized) else None
    turn, skip = divmod(start, length) if length else (0, start)
    while True:
        set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(turn)
        empty = True
        for batch in loader:
            empty = False
            if skip:
                skip -= 1
                continue
            yield batch
        if empty:
            raise ValueError("the data gives no batch: fewer images than a batch holds?")
        turn += 1


def steps_of(batches: Batches, done: int, accumulate: int) -> Iterator[list[Any]]:
    """Micro-batches step by step, from step ``done`` on."""
    skip = done * accumulate
    if isinstance(batches, DataLoader):
        stream = repeated(batches, skip)
    elif callable(batches):
        stream = iter(batches(skip))
    else:
        stream = itertools.islice(batches, skip, None)
    while True:
        micro = [batch for _, batch in zip(range(accumulate), stream, strict=False)]
        if len(micro) < accumulate:
            return
        yield micro
