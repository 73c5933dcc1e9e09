"""Booleans in files, eight to a byte: the one form of mask files, attachments and kernel plans.

Entries in C order, the first in the highest bit; the last byte is filled with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def packed(keep: np.ndarray) -> np.ndarray:
    """uint8 [ceil(entries / 8)] of a bool array of any shape."""
    return np.packbits(keep, axis=None)


def unpacked(bits: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The bool array of ``shape`` that `packed` gave ``bits`` for; ValueError for a length
    that is not its."""
    sizes = tuple(int(size) for size in shape)
    entries = math.prod(sizes)
    if min(sizes, default=1) < 1 or 8 * len(bits) - entries not in range(8):
        raise ValueError(f"{len(bits)} bytes are no {' x '.join(map(str, sizes))} bits")
    return np.unpackbits(bits, count=entries).astype(bool).reshape(sizes)
