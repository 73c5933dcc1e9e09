"""The simulated machine's integer attention in torch, for accuracy studies of real models.

A second account of `sievit.accel.integer_attention`, on batches and on any device: integers are
carried in floating point, where they are exact (float32 for sums below 2^24 of numbers that
TF32 holds, else float64),
changes of scale are one product by multiplier / 2^shift and a rounding half to even, and a
probability is one correctly rounded quotient. The tests hold it to the plain function bit
for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..arithmetic import Arithmetic, scale_for
from ..integer_attention import LOG2_E, ScoreRules, score_shift_for

EXACT_SUM, EXACT_TF32 = 2**24, 2**11
"""Integers up to here are exact in float32, and in TF32, which a GPU may multiply in."""


@dataclass(frozen=True, eq=False)
class Int8Scales:
    """What one unit of each tensor of an attention call is worth: float64 [heads] each.

    ``score_shift``: int64 [heads], places behind the point that scores do without.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    output: np.ndarray
    score_shift: np.ndarray | int = 0

    def __post_init__(self) -> None:
        for name in ("q", "k", "v", "output"):
            value = np.asarray(getattr(self, name), dtype=np.float64)
            if value.shape != np.shape(self.q) or not (np.isfinite(value) & (value > 0)).all():
                raise ValueError(f"scales of {name} must be positive, one a head, got {value}")
            object.__setattr__(self, name, value)


def int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Int8Scales,
    keep: Tensor | None = None,
    softmax_scale: float | None = None,
    bias: Tensor | None = None,
    arithmetic: Arithmetic = Arithmetic(),
) -> Tensor:
    """Integers in (any dtype, float included), integers out as float64.

    q [batch, heads, queries, key_dim], k and v alike over the keys; ``keep`` bool [heads,
    queries, keys]; ``bias`` real, broadcast to the scores. Returns [batch, heads, queries,
    value_dim] in units of ``scales.output``.
    """
    arithmetic.check_sizes(q.shape[-1], k.shape[-2])
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    ends = (scales.q, scales.k, scales.v)
    rules = ScoreRules.of(*ends, scale, scales.output, arithmetic, scales.score_shift)
    shift = torch.from_numpy(rules.score_shift.copy()).to(q.device).view(-1, 1, 1)
    low, high = arithmetic.score_limits
    limit = arithmetic.operand_limit
    sums = _product(q, k.mT, limit, q.shape[-1] * limit**2)
    scores = (sums * _factors(rules.scores, q.device)).round_().clamp_(low, high)
    if bias is not None:
        units = bias.double() * LOG2_E * torch.exp2(arithmetic.fraction_bits - shift.double())
        scores = (scores + units.round().clamp(low, high)).clamp_(low, high)
    weights = _probabilities(scores, keep, shift, arithmetic)
    one = arithmetic.probability_one
    result = _product(weights, v, max(one, limit), (one + k.shape[-2]) * limit)
    result *= _factors(rules.output, q.device)
    return result.round_().clamp_(-limit, limit)


def _product(left: Tensor, right: Tensor, largest: int, most: int) -> Tensor:
    """Exact integers in float64: no operand is beyond ``largest``, no sum beyond ``most``."""
    small = largest <= EXACT_TF32 and most <= EXACT_SUM
    dtype = torch.float32 if small else torch.float64
    with torch.autocast(left.device.type, enabled=False):
        return (left.to(dtype) @ right.to(dtype)).double()


def _factors(fixed, device: torch.device) -> Tensor:
    """multiplier / 2^shift, exactly, [heads, 1, 1]."""
    factors = np.ldexp(fixed.multiplier.astype(np.float64), -fixed.shift)
    return torch.from_numpy(factors).to(device).view(-1, 1, 1)


def _probabilities(
    scores: Tensor, keep: Tensor | None, shift: Tensor, arithmetic: Arithmetic
) -> Tensor:
    """Integers 0..probability_one in float64, as `arithmetic.integer_softmax`: one table of
    all terms that are not 0, by the difference from the row's maximum."""
    if keep is not None:
        scores = scores.masked_fill(~keep, arithmetic.score_limits[0])
    below = (scores.amax(dim=-1, keepdim=True) - scores).long() << shift
    whole = np.arange((arithmetic.term_bits << arithmetic.fraction_bits) + 1)
    table = arithmetic.exp2_table[whole % 2**arithmetic.fraction_bits]
    table = (table >> (whole >> arithmetic.fraction_bits)).astype(np.float64)
    terms = torch.from_numpy(table).to(scores.device)[below.clamp_(max=len(table) - 1)]
    if keep is not None:
        terms = terms * keep
    sums = terms.sum(dim=-1, keepdim=True).clamp_(min=1)
    return (terms * arithmetic.probability_one / sums).round_()


class Int8Attention:
    """A kernel for `sievit.models.AttentionHook`: float in and out, the machine's integers
    between. ``keep`` bool [heads, queries, keys] or None. No gradient flows through it."""

    takes_bias = True

    def __init__(
        self, keep: Tensor | None, scales: Int8Scales, arithmetic: Arithmetic = Arithmetic()
    ) -> None:
        self.keep, self.scales, self.arithmetic = keep, scales, arithmetic

    @torch.no_grad()
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
    ) -> Tensor:
        self.keep = _fitting(self.keep, q, k)
        scales, limit = self.scales, self.arithmetic.operand_limit

        def whole(x: Tensor, by: np.ndarray) -> Tensor:
            return (x.double() / _column(by, x)).round_().clamp_(-limit, limit)

        q_int, k_int, v_int = whole(q, scales.q), whole(k, scales.k), whole(v, scales.v)
        made = int8_attention(q_int, k_int, v_int, scales, self.keep, scale, bias, self.arithmetic)
        return (made * _column(scales.output, q)).to(v.dtype)


RANGES = ("q", "k", "v", "output", "scores")


class RangeWatcher:
    """A kernel that computes in float and notes how large each head's tensors get."""

    takes_bias = True

    def __init__(self, keep: Tensor | None) -> None:
        self.keep = keep
        self.largest: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
    ) -> Tensor:
        self.keep = _fitting(self.keep, q, k)
        result = _float_attention(q, k, v, self.keep, scale, bias)
        scores = (q @ k.mT * scale).abs() + (0.0 if bias is None else bias.abs())
        if self.keep is not None:
            scores = scores * self.keep
        for name, tensor in zip(RANGES, (q, k, v, result, scores), strict=True):
            seen = tensor.detach().abs().amax(dim=(0, 2, 3)).double().cpu()
            self.largest[name] = torch.maximum(self.largest.get(name, seen), seen)
        return result

    def scales(self, arithmetic: Arithmetic = Arithmetic()) -> Int8Scales:
        """The largest magnitude seen becomes the largest integer, and no kept score seen
        saturates. Raises ValueError where nothing was seen."""
        if not self.largest:
            raise ValueError("scales are calibrated on images, this call of attention saw none")
        limit = arithmetic.operand_limit
        largest = {name: self.largest[name].numpy() for name in RANGES}
        return Int8Scales(
            q=scale_for(largest["q"], limit),
            k=scale_for(largest["k"], limit),
            v=scale_for(largest["v"], limit),
            output=scale_for(largest["output"], limit),
            score_shift=score_shift_for(largest["scores"], arithmetic),
        )


def _float_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float, bias: Tensor | None
) -> Tensor:
    """Masked attention in the inputs' own precision; a row with none kept gives 0."""
    if keep is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    empty = ~keep.any(dim=-1, keepdim=True)
    mask = torch.zeros(keep.shape, dtype=q.dtype, device=q.device) if bias is None else bias
    mask = mask.masked_fill(~(keep | empty), float("-inf"))
    mask = mask if mask.ndim == 4 else mask[None]
    result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return result.masked_fill(empty, 0.0)


def _column(scale: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(scale).to(like.device).view(-1, 1, 1)


def _fitting(keep: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """``keep`` on the device of ``q``. Raises ValueError where it is for other shapes."""
    if keep is None:
        return None
    got = (q.shape[1], q.shape[2], k.shape[2])
    if got != tuple(keep.shape):
        raise ValueError(
            f"attention has (heads, queries, keys) = {got}, the mask is for {tuple(keep.shape)}"
        )
    return keep.to(q.device)
