"""The machine's integer arithmetic: widths, changes of scale, quantized tensors, head maps.

Symmetric int8 Q, K and V with a scale a head; int32 sums; scores held in 16 bits; softmax in
fixed point; probabilities as uint8; int8 output. ViTCoD (HPCA 2023, section V) states int8
alone, the rest is a choice, and every width is a field of `Arithmetic`. Each change of scale
is an integer multiplier and a shift (`FixedPoint`), rounded half to even, saturated.
`integer_attention` makes attention of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from ..checks import check_fields
from ..workload import HeadCodec

__all__ = [
    "Arithmetic",
    "FixedPoint",
    "HeadMap",
    "Quantized",
    "quantize",
    "quantize_head_map",
]

MOST_SHIFT = 62
"""Of a 64-bit product; a number that wants more is less than half of the last place."""


@dataclass(frozen=True)
class Arithmetic:
    """Widths in bits. Signed but for terms and probabilities, which are not negative.

    Raises ValueError, naming the field, for a width that is out of range.
    """

    operand_bits: int = 8  # ViTCoD: int8 Q, K, V and output; symmetric, -127..127
    weight_bits: int = 8  # choice: of the codec's weights
    accumulator_bits: int = 32  # choice
    score_bits: int = 16  # choice
    fraction_bits: int = 8  # choice: of a score; the exp2 table has 2^8 = 256 entries
    term_bits: int = 16  # choice: of one exponential
    probability_bits: int = 8  # choice
    multiplier_bits: int = 16  # choice: of the multiplier of a change of scale

    def __post_init__(self) -> None:
        limits = {item.name: (2, 16) for item in fields(self)}
        check_fields(self, limits | {"accumulator_bits": (2, 32), "fraction_bits": (0, 12)})
        if self.fraction_bits >= self.score_bits:
            raise ValueError(
                f"fraction_bits must be below score_bits = {self.score_bits}, "
                f"got {self.fraction_bits}"
            )

    @property
    def operand_limit(self) -> int:
        """Largest magnitude of an operand: symmetric, so that a sign change never overflows."""
        return 2 ** (self.operand_bits - 1) - 1

    @property
    def weight_limit(self) -> int:
        return 2 ** (self.weight_bits - 1) - 1

    @property
    def accumulator_limit(self) -> int:
        return 2 ** (self.accumulator_bits - 1) - 1

    @property
    def score_limits(self) -> tuple[int, int]:
        return -(2 ** (self.score_bits - 1)), 2 ** (self.score_bits - 1) - 1

    @property
    def probability_one(self) -> int:
        """What a probability of 1 is stored as: 255 for 8 bits."""
        return 2**self.probability_bits - 1

    @cached_property
    def exp2_table(self) -> np.ndarray:
        """int64 [2^fraction_bits]: entry f is 2^(-f / 2^fraction_bits), 1 being all ones."""
        entries = 2**self.fraction_bits
        one = 2**self.term_bits - 1
        return np.rint(one * np.exp2(-np.arange(entries) / entries)).astype(np.int64)

    def check_sizes(self, key_dim: int, keys: int) -> None:
        """Raises ValueError where a sum might not fit the accumulator, whatever the data."""
        sums = {
            f"scores of key_dim {key_dim}": key_dim * self.operand_limit**2,
            f"softmax sums of {keys} keys": keys * (2**self.term_bits - 1),
            f"weighted values of {keys} keys": (self.probability_one + keys) * self.operand_limit,
        }
        for name, most in sums.items():
            if most > self.accumulator_limit:
                raise ValueError(
                    f"{name} reach {most}, more than {self.accumulator_bits} bits hold "
                    f"({self.accumulator_limit})"
                )


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """Factors multiplier / 2^shift, one a head: a change of scale without floating point."""

    multiplier: np.ndarray
    shift: np.ndarray

    @classmethod
    def of(cls, factors: np.ndarray, bits: int) -> FixedPoint:
        """The nearest with multipliers of ``bits`` bits (times a power of two, where a
        factor is larger than they). Factors must be positive and below 2^30."""
        factors = np.asarray(factors, dtype=np.float64)
        if not ((factors > 0) & (factors < 2**30)).all():
            raise ValueError(f"a change of scale must be positive and below 2^30, got {factors}")
        mantissa, exponent = np.frexp(factors)  # factor = mantissa * 2^exponent, [.5, 1)
        multiplier = np.rint(np.ldexp(mantissa, bits)).astype(np.int64)
        shift = bits - exponent.astype(np.int64)
        over = multiplier == 2**bits
        multiplier, shift = np.where(over, multiplier // 2, multiplier), shift - over
        multiplier, shift = multiplier << np.maximum(-shift, 0), np.maximum(shift, 0)
        gone = shift > MOST_SHIFT
        return cls(np.where(gone, 0, multiplier), np.where(gone, 0, shift))

    def __call__(self, values: np.ndarray, low: int, high: int, head: int | None = None):
        """``values`` (int64 [..., heads, rows, columns], or any shape of one ``head``)
        rescaled: rounded half to even, then saturated to low..high."""
        chosen = np.s_[:, None, None] if head is None else head
        product, shift = values * self.multiplier[chosen], self.shift[chosen]
        whole = product >> shift
        rest, half = product - (whole << shift), (np.int64(1) << shift) >> 1
        up = (rest > half) | ((rest == half) & (whole & 1 == 1) & (shift > 0))
        return np.clip(whole + up, low, high)


@dataclass(frozen=True, eq=False)
class Quantized:
    """Integers with a scale a head: value = ``values`` * ``scale[head]``.

    values  int64 [heads, tokens, dim], or [images, heads, tokens, dim], within
            -limit..limit of their width
    scale   float64 [heads], the same for all images
    """

    values: np.ndarray
    scale: np.ndarray

    def __post_init__(self) -> None:
        values, scale = np.asarray(self.values), np.asarray(self.scale, dtype=np.float64)
        if values.ndim not in (3, 4) or 0 in values.shape or values.dtype.kind not in "iu":
            raise ValueError(
                "values are integers [heads, tokens, dim] or [images, heads, tokens, dim], got "
                f"{values.dtype} {list(values.shape)}"
            )
        scale = np.broadcast_to(scale, values.shape[-3:-2])
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"scales must be positive and finite, got {scale}")
        object.__setattr__(self, "values", values.astype(np.int64))
        object.__setattr__(self, "scale", scale)

    @property
    def real(self) -> np.ndarray:
        """float64 of the shape of ``values``."""
        return self.values * self.scale[:, None, None]

    def check(self, name: str, limit: int) -> None:
        """Raises ValueError, naming the tensor, where a value is beyond +-limit."""
        most = int(np.abs(self.values).max(initial=0))
        if most > limit:
            raise ValueError(f"{name} must lie in {-limit}..{limit}, it reaches {most}")


def quantize(
    real: np.ndarray, arithmetic: Arithmetic = Arithmetic(), scale: np.ndarray | float | None = None
) -> Quantized:
    """float [(images,) heads, tokens, dim] as symmetric integers, rounded half to even,
    saturated.

    scale  one a head, or one for all; None makes each head's largest magnitude the limit
    """
    real = np.asarray(real, dtype=np.float64)
    if real.ndim not in (3, 4) or 0 in real.shape or not np.isfinite(real).all():
        raise ValueError(
            "need finite numbers [heads, tokens, dim] or [images, heads, tokens, dim], got "
            f"{list(real.shape)}"
        )
    limit = arithmetic.operand_limit
    if scale is None:
        others = tuple(axis for axis in range(real.ndim) if axis != real.ndim - 3)
        scale = scale_for(np.abs(real).max(axis=others), limit)
    scale = np.broadcast_to(np.asarray(scale, dtype=np.float64), real.shape[-3:-2])
    values = np.clip(np.rint(real / scale[:, None, None]), -limit, limit)
    return Quantized(values.astype(np.int64), scale)


def scale_for(largest: np.ndarray, limit: int) -> np.ndarray:
    """Scales that put ``largest`` at ``limit``; 1 for a head that is all zero."""
    return np.where(largest > 0, largest / limit, 1.0)


@dataclass(frozen=True, eq=False)
class HeadMap:
    """One encoder or decoder of a codec in integers: latents from heads, or heads from
    latents, block-diagonal over ``groups`` (ViTCoD section V).

    weight  int64 [out_heads, in_heads / groups]; the scales of the inputs are folded in
    bias    int64 [out_heads], in units of the sums
    rescale from a sum to the output's width
    scale   float64 [out_heads], of the output
    """

    weight: np.ndarray
    bias: np.ndarray
    rescale: FixedPoint
    scale: np.ndarray
    groups: int
    limit: int

    def __call__(self, x: np.ndarray, heads: slice = slice(None)) -> np.ndarray:
        """int64 [..., in_heads, tokens, dim] -> output heads ``heads`` of the same rank."""
        block_in = x.shape[-3] // self.groups
        block_out = len(self.weight) // self.groups
        made = []
        for head in np.arange(len(self.weight))[heads]:
            first = head // block_out * block_in
            block = x[..., first : first + block_in, :, :]
            sums = np.einsum("i,...itd->...td", self.weight[head], block)
            made.append(self.rescale(sums + self.bias[head], -self.limit, self.limit, head))
        return np.stack(made, axis=-3)


def quantize_head_map(
    weight: np.ndarray,
    bias: np.ndarray,
    codec: HeadCodec,
    in_scale: np.ndarray,
    out_scale: np.ndarray,
    arithmetic: Arithmetic = Arithmetic(),
) -> HeadMap:
    """A float map over heads [out_heads, in_heads / groups] as integers.

    Input head i of the integer map is worth ``in_scale[i]``, output head o ``out_scale[o]``.
    Weights get a scale a row. Raises ValueError where a sum might not fit the accumulator.
    """
    weight, bias = np.asarray(weight, np.float64), np.asarray(bias, np.float64)
    inputs = len(in_scale) // codec.groups
    if weight.shape != (len(out_scale), inputs) or bias.shape != (len(out_scale),):
        raise ValueError(
            f"weights must be {[len(out_scale), inputs]} and biases {[len(out_scale)]}, got "
            f"{list(weight.shape)} and {list(bias.shape)}"
        )
    block = np.arange(len(weight)) // (len(weight) // codec.groups)
    worth = weight * np.asarray(in_scale).reshape(codec.groups, inputs)[block]
    row = scale_for(np.abs(worth).max(axis=1), arithmetic.weight_limit)
    rounded = np.rint(worth / row[:, None]).astype(np.int64)
    offset = np.rint(bias / row)
    most = np.abs(rounded).sum(axis=1) * arithmetic.operand_limit + np.abs(offset)
    if most.max() > arithmetic.accumulator_limit:
        raise ValueError(
            f"a codec's sums reach {most.max():.0f}, more than {arithmetic.accumulator_bits} "
            f"bits hold ({arithmetic.accumulator_limit})"
        )
    rescale = FixedPoint.of(row / out_scale, arithmetic.multiplier_bits)
    return HeadMap(
        rounded,
        offset.astype(np.int64),
        rescale,
        np.asarray(out_scale, dtype=np.float64),
        codec.groups,
        arithmetic.operand_limit,
    )
