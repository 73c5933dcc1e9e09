"""The machine's integer arithmetic of attention, as one plain function.

Symmetric int8 Q, K and V with a scale a head; int32 sums; scores held in 16 bits; softmax in
fixed point; probabilities as uint8; int8 output. ViTCoD (HPCA 2023, section V) states int8
alone, the rest is a choice, and every width is a field of `Arithmetic`.

Scores are held in base 2: an int32 sum is multiplied with scale_q x scale_k x softmax scale
x log2(e), with ``fraction_bits`` bits behind the point, so that exp(a - b) is 2^(score
difference): the fraction looks up a table of 2^fraction_bits entries, the whole part shifts
what was found there to the right. 16 bits with 8 behind the point end at 128; a head whose
scores are larger (DINOv2-small reaches 460) holds them ``score_shift`` places coarser and
shifts differences back before the table. Each change of scale is an integer multiplier and a shift
(`FixedPoint`), rounded half to even, saturated. All sums are of integers, so no order of
computing changes a bit: the functional mode (`functional`) and the torch twin
(`kernels.int8`) are held to equality.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from ..ops import HeadCodec

__all__ = [
    "Arithmetic",
    "FixedPoint",
    "HeadMap",
    "Quantized",
    "ScoreRules",
    "integer_attention",
    "integer_softmax",
    "quantize",
    "quantize_head_map",
]

LOG2_E = math.log2(math.e)
MOST_SCORE_SHIFT = 16
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
        most = {"accumulator_bits": 32, "fraction_bits": 12}
        for name, value in asdict(self).items():
            least, limit = (0 if name == "fraction_bits" else 2), most.get(name, 16)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= limit:
                raise ValueError(f"{name} must be an integer in {least}..{limit}, got {value!r}")
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


@dataclass(frozen=True, eq=False)
class ScoreRules:
    """The two changes of scale of one attention call, and its widths.

    scores       from an int32 sum of q k to a score in base 2
    score_shift  int64 [heads], places behind the point that scores do without
    output       from an int32 sum of probability x value to the output
    """

    scores: FixedPoint
    score_shift: np.ndarray
    output: FixedPoint
    output_scale: np.ndarray
    arithmetic: Arithmetic

    @classmethod
    def of(
        cls,
        q_scale: np.ndarray,
        k_scale: np.ndarray,
        v_scale: np.ndarray,
        softmax_scale: float,
        output_scale: np.ndarray | float | None = None,
        arithmetic: Arithmetic = Arithmetic(),
        score_shift: np.ndarray | int = 0,
    ) -> ScoreRules:
        """``output_scale`` None takes that of V, which always fits: rows are its means."""
        made = np.asarray(v_scale if output_scale is None else output_scale, dtype=np.float64)
        made = np.broadcast_to(made, np.shape(v_scale))
        shift = np.broadcast_to(np.asarray(score_shift, dtype=np.int64), np.shape(v_scale))
        if not ((shift >= 0) & (shift <= MOST_SCORE_SHIFT)).all():
            raise ValueError(f"score_shift must lie in 0..{MOST_SCORE_SHIFT}, got {score_shift}")
        places = 2.0 ** (arithmetic.fraction_bits - shift)
        base_2 = q_scale * k_scale * softmax_scale * LOG2_E * places
        out = v_scale / (arithmetic.probability_one * made)
        bits = arithmetic.multiplier_bits
        scores, output = FixedPoint.of(base_2, bits), FixedPoint.of(out, bits)
        return cls(scores, shift, output, made, arithmetic)

    def score(self, sums: np.ndarray, head: int | None = None) -> np.ndarray:
        return self.scores(sums, *self.arithmetic.score_limits, head)

    def result(self, sums: np.ndarray, head: int | None = None) -> np.ndarray:
        limit = self.arithmetic.operand_limit
        return self.output(sums, -limit, limit, head)


def score_shift_for(largest: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """The least ``score_shift`` at which scaled scores of magnitude ``largest`` do not
    saturate: int64 of its shape."""
    units = np.asarray(largest, np.float64) * LOG2_E * 2**arithmetic.fraction_bits
    over = np.maximum(units / arithmetic.score_limits[1], 1.0)
    return np.minimum(np.ceil(np.log2(over)), MOST_SCORE_SHIFT).astype(np.int64)


def integer_softmax(
    scores: np.ndarray, keep: np.ndarray, arithmetic: Arithmetic, shift: np.ndarray | int = 0
) -> np.ndarray:
    """Probabilities int64 [..., keys] of base-2 ``scores`` over the kept entries.

    ``shift``: the scores' `ScoreRules.score_shift`, broadcast to them.

    Subtract the row's maximum, look up and shift (bits that fall out are dropped), add up,
    divide (rounded half to even). Pruned entries, and rows with none kept, give 0.
    """
    lowest = arithmetic.score_limits[0]
    top = np.where(keep, scores, lowest).max(axis=-1, keepdims=True, initial=lowest)
    below = np.where(keep, top - scores, 0) << shift
    whole, fraction = below >> arithmetic.fraction_bits, below & (2**arithmetic.fraction_bits - 1)
    found = arithmetic.exp2_table[fraction] >> np.minimum(whole, MOST_SHIFT)
    terms = np.where(keep, found, 0)
    return _divided(terms * arithmetic.probability_one, terms.sum(axis=-1, keepdims=True))


def _divided(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Rounded half to even; 0 where the denominator is 0."""
    below = np.maximum(denominator, 1)
    whole = numerator // below
    twice = 2 * (numerator - whole * below)
    return whole + ((twice > below) | ((twice == below) & (whole & 1 == 1)))


def integer_attention(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    keep: np.ndarray | None = None,
    *,
    softmax_scale: float | None = None,
    output_scale: np.ndarray | float | None = None,
    bias: np.ndarray | None = None,
    score_shift: np.ndarray | int = 0,
    arithmetic: Arithmetic = Arithmetic(),
) -> Quantized:
    """The machine's attention, computed plainly: [(images,) heads, queries, value_dim].

    keep           bool [heads, queries, keys]; False entries get no weight, None keeps all
    softmax_scale  None is key_dim^-1/2
    output_scale   of the result, a head each; None takes V's, which never saturates
    bias           real [heads, queries, keys], added to the scaled scores before softmax;
                   rounded to the scores' last place
    score_shift    places behind the point that a head's scores do without

    Raises ValueError for operands beyond their width, shapes that do not fit, and sums that
    the accumulator might not hold.
    """
    rules = checked_rules(q, k, v, softmax_scale, output_scale, arithmetic, score_shift)
    scores = rules.score(q.values @ k.values.swapaxes(-1, -2))
    if bias is not None:
        scores = np.clip(scores + fixed_bias(bias, rules), *arithmetic.score_limits)
    wanted = scores.shape[-3:]
    keep = np.ones(wanted, dtype=bool) if keep is None else np.asarray(keep)
    if keep.dtype != np.bool_ or keep.shape != wanted:
        raise ValueError(f"keep is bool {list(wanted)}, got {keep.dtype} {list(keep.shape)}")
    shift = rules.score_shift[:, None, None]
    probabilities = integer_softmax(scores, keep, arithmetic, shift)
    return Quantized(rules.result(probabilities @ v.values), rules.output_scale)


def fixed_bias(bias: np.ndarray, rules: ScoreRules) -> np.ndarray:
    """A real bias on scaled scores [heads, queries, keys] as scores are held, saturated."""
    places = 2.0 ** (rules.arithmetic.fraction_bits - rules.score_shift[:, None, None])
    units = np.asarray(bias, np.float64) * LOG2_E * places
    return np.clip(np.rint(units), *rules.arithmetic.score_limits).astype(np.int64)


def checked_rules(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    softmax_scale: float | None,
    output_scale: np.ndarray | float | None,
    arithmetic: Arithmetic,
    score_shift: np.ndarray | int = 0,
) -> ScoreRules:
    """`ScoreRules` of a call whose operands fit each other and their widths."""
    (*batch, _, dim), keys = q.values.shape, k.values.shape[-2]
    if k.values.shape != (*batch, keys, dim) or v.values.shape[:-1] != (*batch, keys):
        raise ValueError(
            f"q, k, v do not fit: {list(q.values.shape)}, {list(k.values.shape)}, "
            f"{list(v.values.shape)} as [heads, tokens, dim]"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        tensor.check(name, arithmetic.operand_limit)
    arithmetic.check_sizes(dim, keys)
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    return ScoreRules.of(q.scale, k.scale, v.scale, scale, output_scale, arithmetic, score_shift)
