"""The machine's attention in integers, as one plain function.

Scores are held in base 2: an int32 sum is multiplied with scale_q x scale_k x softmax scale
x log2(e), with ``fraction_bits`` bits behind the point, so that exp(a - b) is 2^(score
difference): the fraction looks up a table of 2^fraction_bits entries, the whole part shifts
what was found there to the right. 16 bits with 8 behind the point end at 128; a head whose
scores are larger (DINOv2-small reaches 460) holds them ``score_shift`` places coarser and
shifts differences back before the table. All sums are of integers, so no order of computing
changes a bit: the functional mode (`functional`) and the torch twin (`kernels.int8`) are held
to equality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .arithmetic import MOST_SHIFT, Arithmetic, FixedPoint, Quantized

__all__ = ["ScoreRules", "integer_attention", "integer_softmax"]

LOG2_E = math.log2(math.e)
MOST_SCORE_SHIFT = 16


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
