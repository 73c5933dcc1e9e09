"""Names for content: what a result depends on, as one short word."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..masks import PolarizedMask


def digest(content: Any) -> str:
    """32 hex digits that equal content shares: numbers, words, sequences and mappings of
    them, dataclasses with their type's name, polarized masks by their own digest."""
    return hashlib.blake2b(repr(_plain(content)).encode(), digest_size=16).hexdigest()


@functools.cache
def code_digest() -> str:
    """Of every source file that a simulated figure depends on, and some more."""
    folder = Path(__file__).parent
    files = sorted(
        path
        for path in (*folder.rglob("*.py"), *folder.parent.glob("*.py"))
        if "kernels" not in path.parts and (path.parent != folder.parent or path.stem in _WAIST)
    )
    made = hashlib.blake2b(digest_size=16)
    for path in files:
        text = path.read_bytes()
        made.update(f"{path.relative_to(folder.parent).as_posix()} {len(text)} ".encode())
        made.update(text)
    return made.hexdigest()


_WAIST = ("masks", "ops", "workload")


def _plain(content: Any) -> Any:
    if isinstance(content, PolarizedMask):
        return content.digest
    if is_dataclass(content):
        values = (_plain(getattr(content, item.name)) for item in fields(content))
        return (type(content).__name__, *values)
    if isinstance(content, Mapping):
        return tuple(sorted((str(key), _plain(value)) for key, value in content.items()))
    if isinstance(content, (tuple, list)):
        return tuple(_plain(value) for value in content)
    if isinstance(content, np.generic):
        return content.item()
    if content is None or isinstance(content, (bool, int, float, str)):
        return content
    raise TypeError(f"no digest of a {type(content).__name__}")
