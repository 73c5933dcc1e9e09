"""What was made before, by the content it was made from: index lists and assignments that
many configurations of the hardware share are made once. Bounded in bytes, per process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Made = TypeVar("Made")


class LruCache:
    """The most recently used results, ``limit_bytes`` of them at most; safe between threads.

    A key must name everything that the result depends on. A result above a quarter of the
    limit is not kept, so that one large network does not push out all else.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = self.hits = self.misses = 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Made], size: Callable[[Made], int]) -> Made:
        """The result of ``key``, made by ``make`` where it is not there; ``size`` in bytes."""
        with self._lock:
            if key in self._kept:
                self.hits += 1
                self._kept.move_to_end(key)
                return self._kept[key][0]
            self.misses += 1
        made = make()
        self._keep(key, made, size(made))
        return made

    def _keep(self, key: Hashable, made: object, size: int) -> None:
        if 4 * size > self.limit_bytes:
            return
        with self._lock:
            if key in self._kept:  # another thread was first
                return
            self._kept[key] = (made, size)
            self.held_bytes += size
            while self.held_bytes > self.limit_bytes:
                self.held_bytes -= self._kept.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self.held_bytes = self.hits = self.misses = 0
