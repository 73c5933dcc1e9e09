"""What a field of a dataclass may hold: its type, its least and its most.

Every dataclass of sizes and policies checks itself with `check_fields`, so that a value that
a machine cannot have is refused where it is given, by its name, rather than met later as an
overflow or a run that never ends. Integers of NumPy are taken, and held as Python's.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

MOST = 2**40
"""Of a size for which no other limit is given."""


def integer(field: str, value: object, least: int = 1, most: int = MOST) -> int:
    """``value`` as an int in ``least``..``most``; raises ValueError, naming ``field``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{field} must be an integer in {least}..{most}, got {value!r}")
    whole = int(value)
    if not least <= whole <= most:
        raise ValueError(f"{field} must be an integer in {least}..{most}, got {whole}")
    return whole


def share(field: str, value: object, least: float = 0.0, most: float = 1.0) -> float:
    """``value`` as a float in [least, most]; raises ValueError, naming ``field``."""
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
    if not least <= number <= most:
        raise ValueError(f"{field} must be a number in [{least}, {most}], got {value!r}")
    return number


def truth(field: str, value: object) -> bool:
    """``value`` as a bool; raises ValueError, naming ``field``."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{field} must be True or False, got {value!r}")
    return bool(value)


def text(field: str, value: object) -> str:
    """``value`` if it is a string; raises ValueError, naming ``field``."""
    if not isinstance(value, str):
        raise ValueError(f"{field} must be a string, got {value!r}")
    return value


def one_of(field: str, value: object, allowed: tuple[str, ...]) -> str:
    """``value`` if it is among ``allowed``; raises ValueError, naming ``field``."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def pair(field: str, value: object, least: int = 1, most: int = MOST) -> tuple[int, int]:
    """``value`` as two ints in ``least``..``most``; raises ValueError, naming ``field``."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"{field} must be two integers in {least}..{most}, got {value!r}")
    first, second = (integer(field, item, least, most) for item in value)
    return first, second


_KINDS: dict[str, Callable[..., Any]] = {
    "int": integer, "float": share, "bool": truth, "str": text, "tuple[int, int]": pair
}  # fmt: skip
_RANGED = (integer, share, pair)


def check_fields(
    made: Any, ranges: Mapping[str, tuple[float, float]] | None = None, least: int = 1
) -> None:
    """Check every field of the frozen dataclass ``made`` by its annotation: int, float, bool,
    str, tuple[int, int], each also "| None". Fields with another annotation are their class's
    own affair.

    ranges  field -> (least, most); integers without one are in ``least``..`MOST`, floats in
            [0, 1]

    Raises ValueError, naming the field, its value and what is allowed.
    """
    limits = ranges or {}
    for item in fields(made):
        kind, optional, _ = str(item.type).partition(" | None")
        value, check = getattr(made, item.name), _KINDS.get(kind)
        if check is None or (optional and value is None):
            continue
        given = limits.get(item.name, (least, MOST) if check in (integer, pair) else ())
        held = check(item.name, value, *(given if check in _RANGED else ()))
        object.__setattr__(made, item.name, held)
