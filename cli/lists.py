"""Options that are lists, as 32,64,128: each reads its text or says what it wants."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

Value = TypeVar("Value")

KILO, GIGA = 1024, 10**9

DECIMAL = re.compile(r"[-+]?(\d+\.\d*|\.\d+)(e[-+]?\d+)?")
"""A number with a point."""


def numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Whole numbers."""
    return _listed(option, text, int, "whole numbers, as 32,64")


def shares(option: str, text: str | None) -> tuple[float, ...]:
    """Numbers in [0, 1)."""

    def share(word: str) -> float:
        value = float(word)
        if not 0.0 <= value < 1.0:
            raise ValueError
        return value

    return _listed(option, text, share, "shares in [0, 1), as 0.8,0.95")


def kilobytes(option: str, text: str | None) -> tuple[int, ...]:
    """KB of 1,024 bytes, as bytes."""
    return _listed(option, text, lambda word: _whole(float(word) * KILO), "KB, as 27,53")


def gigabytes(option: str, text: str | None) -> tuple[int, ...]:
    """Decimal GB, as bytes."""
    return _listed(option, text, lambda word: round(float(word) * GIGA), "GB/s, as 38.4,76.8")


def words(text: str | None) -> tuple[str, ...]:
    """Words between commas."""
    return () if text is None else tuple(word.strip() for word in text.split(","))


def codecs(latent_heads: str, groups: str) -> tuple[tuple[int | None, int], ...]:
    """Every (latent heads or None, groups); without a codec groups mean nothing."""

    def count(word: str) -> int | None:
        return None if word in ("none", "0") else int(word)

    latent = _listed("--latent-heads", latent_heads, count, "'none' and numbers, as none,2,3")
    blocks = numbers("--groups", groups)
    pairs = ((count, 1 if count is None else group) for count in latent for group in blocks)
    return tuple(dict.fromkeys(pairs))


def field_values(text: str) -> tuple[str, tuple[Any, ...]]:
    """FIELD=V1,V2 of --set: numbers, or words where they are none."""
    name, equals, values = text.partition("=")
    if not equals or not name or not values:
        raise ValueError(f"--set wants FIELD=V1,V2, as lines=32,64, got {text!r}")

    def value(word: str) -> int | float | str:
        try:
            return int(word)
        except ValueError:
            return float(word) if DECIMAL.fullmatch(word) else word

    return name.strip(), tuple(value(word) for word in words(values))


def _listed(
    option: str, text: str | None, read: Callable[[str], Value], wanted: str
) -> tuple[Value, ...]:
    try:
        return tuple(dict.fromkeys(read(word) for word in words(text)))
    except (ValueError, OverflowError):
        raise ValueError(f"{option} takes {wanted}, got {text!r}") from None


def _whole(value: float) -> int:
    if value != round(value):
        raise ValueError
    return round(value)
