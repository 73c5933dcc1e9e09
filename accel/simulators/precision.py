"""Narrow operands on MACs of the hardware's width: how many of their products one makes a cycle.

A multiplier of 8 x 8 bits adds partial products of all pairs of bits. Split into smaller ones it
has room for the square of the ratio (Bit Fusion, ISCA 2018: four products of 4 bits, which take
two operands' worth of 4-bit ones from either side); where operands are only laid side by side
(subword parallelism, as DVAFS, DATE 2017), for the ratio itself.
"""

from __future__ import annotations

from collections.abc import Callable

BITS = (1, 2, 4, 8)
"""Of a narrow operand; the hardware's has 8."""

PRODUCTS_PER_MAC: dict[str, Callable[[int], int]] = {
    "bit_fusion": lambda bits: (8 // bits) ** 2,
    "subword_parallel": lambda bits: 8 // bits,
}
"""How a MAC is split -> products of operands of so many bits that it makes in a cycle."""


def narrow_bytes(whole: int, bits: int) -> int:
    """Bytes of operands of ``bits``, of ``whole`` bytes as the hardware has them."""
    return -(-whole * bits // 8)
