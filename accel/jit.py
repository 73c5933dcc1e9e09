"""How the simulator's compiled functions are made: options, disk cache, the word to the user.

Numba compiles on the first call and caches on disk: beside the package, or in the user's
cache folder where that cannot be written, or not at all.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event
from numba.core.options import DefaultOptions

_OPTIONS: dict[str, Any] = {"error_model": "numpy"}
_CORE_OPTIONS = dict(_OPTIONS)
if hasattr(DefaultOptions, "_nrt"):
    # A core allocates nothing, and counting references to its arrays would take most of the
    # time. Numba keeps this option to itself; without it cores run, but slower.
    _CORE_OPTIONS["_nrt"] = False

compiled: Any = njit(**_OPTIONS)
"""Decorator of a compiled function that may make arrays."""

core: Any = njit(forceinline=True, **_CORE_OPTIONS)
"""Decorator of a part of a core, which works on its arguments alone: all parts become one
function, with no calls left."""


part: Any = njit(**_CORE_OPTIONS)
"""Decorator of a part of a core that stays a function of its own."""


def cached(function: Callable) -> Any:
    """As `compiled`, for a function called from Python: cached on disk."""
    return _cached(function, _OPTIONS)


def cached_core(function: Callable) -> Any:
    """As `core`, for the function that Python calls: cached on disk."""
    return _cached(function, _CORE_OPTIONS)


def _cached(function: Callable, options: dict[str, Any]) -> Any:
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder that can be written
        return njit(**options)(function)


def sources_digest(*names: str) -> str:
    """Of modules of `sievit.accel`, as "dram/state", for a core that is spread over them:
    Numba's cache looks at one file alone, so the digest becomes part of what it compares."""
    folder = Path(__file__).parent
    text = b"".join((folder / f"{name}.py").read_bytes() for name in names)
    return hashlib.sha256(text).hexdigest()


class _Announcer(event.Listener):
    """Says once, under the logger ``sievit.accel``, that something is being compiled."""

    def __init__(self) -> None:
        self.said = False

    def on_start(self, event: event.Event) -> None:
        if self.said or event.data is None:
            return
        module = str(event.data["dispatcher"].py_func.__module__)  # None where it has no file
        if module.startswith(f"{__package__}."):
            self.said = True
            logging.getLogger("sievit.accel").info(
                "compiling the simulator, once on this computer: about 20 seconds"
            )

    def on_end(self, event: event.Event) -> None:
        """Nothing to say."""


_announcer = _Announcer()
event.register("numba:compile", _announcer)
