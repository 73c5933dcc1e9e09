"""How the simulator's compiled cores are made: options, the disk cache, the word to the user.

Numba compiles on the first call and caches on disk (beside the package, or in the user's
cache folder where that cannot be written).
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from numba import njit
from numba.core import event
from numba.core.options import DefaultOptions

core_options: dict[str, object] = {"error_model": "numpy"}
if hasattr(DefaultOptions, "_nrt"):
    # The core allocates nothing, and counting references to its arrays would take most of
    # the time. Numba keeps this option to itself; without it the core runs, but slower.
    core_options["_nrt"] = False

core = njit(forceinline=True, **core_options)
"""Decorator of the functions of a core: they become one, with no calls left."""


def sources_digest(*names: str) -> str:
    """Of modules beside this one, for a core that is spread over them: Numba's cache looks
    at one file alone, so the digest becomes part of what it compares."""
    folder = Path(__file__).parent
    text = b"".join((folder / f"{name}.py").read_bytes() for name in names)
    return hashlib.sha256(text).hexdigest()


class _Announcer(event.Listener):
    """Says once, under the logger ``sievit.accel``, that something is being compiled."""

    def __init__(self) -> None:
        self.said = False

    def on_start(self, event: event.Event) -> None:
        module = event.data["dispatcher"].py_func.__module__
        if not self.said and module.startswith(f"{__package__}."):
            self.said = True
            logging.getLogger("sievit.accel").info(
                "compiling the simulator, once on this machine: about 10 seconds"
            )

    def on_end(self, event: event.Event) -> None:
        """Nothing to say."""


_announcer = _Announcer()
event.register("numba:compile", _announcer)
