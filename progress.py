"""How work that takes a while tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Called with (stage, share of the stage done)."""


def silent(stage: str, share: float) -> None:
    """Tell nothing."""
