"""The simulator with data: int8 Q, K and V in, the attention output out, by the schedule.

What the cycle engine runs is carried out on numbers (`executor`). The result is that of
`integer_attention.integer_attention`, bit for bit, and comes with its distance from float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ....workload import Attention, HeadCodec, PolarizedMask
from ...arithmetic import Arithmetic, HeadMap, Quantized, quantize, quantize_head_map, scale_for
from ...hardware import Hardware, presets
from ...integer_attention import checked_rules, fixed_bias, score_shift_for
from ...report.report import OpCost
from ...schedule import DEFAULT, Schedule
from ..run import run_attention
from ..simulate import cost_of
from ..threshold import with_thresholds
from .executor import ProgramExecutor

__all__ = ["CodecWeights", "FunctionalResult", "coded_operands", "simulate_attention"]


@dataclass(frozen=True, eq=False)
class CodecWeights:
    """The codec of Q, or of K, in float: x -> decoder (encoder x + b) + c over the heads.

    encoder  [latent_heads, heads / groups]     encoder_bias  [latent_heads]
    decoder  [heads, latent_heads / groups]     decoder_bias  [heads]
    """

    shape: HeadCodec
    encoder: np.ndarray
    encoder_bias: np.ndarray
    decoder: np.ndarray
    decoder_bias: np.ndarray

    def encoded(self, x: np.ndarray) -> np.ndarray:
        """float [(images,) heads, tokens, dim] -> [(images,) latent_heads, tokens, dim]."""
        return _over_heads(x, self.encoder, self.encoder_bias, self.shape.groups)

    def decoded(self, x: np.ndarray) -> np.ndarray:
        return _over_heads(x, self.decoder, self.decoder_bias, self.shape.groups)


def _over_heads(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, groups: int) -> np.ndarray:
    blocks = x.reshape(*x.shape[:-3], groups, -1, *x.shape[-2:])
    mixed = np.einsum("goi,...gitd->...gotd", weight.reshape(groups, -1, weight.shape[1]), blocks)
    return mixed.reshape(*x.shape[:-3], -1, *x.shape[-2:]) + bias[:, None, None]


@dataclass(frozen=True, eq=False)
class FunctionalResult:
    """What the machine computed, how long it took, and how far it is from float.

    output     int64 values and scales, [(images,) heads, queries, value_dim], tokens in the
               order they were given in
    reference  float64, the same attention (mask, codec, bias) without any rounding
    cost       cycles and bytes of this call (`sievit.accel.report.report.OpCost`)
    score_shift  int64 [heads], places behind the point that scores did without
    """

    output: Quantized
    reference: np.ndarray
    cost: OpCost
    score_shift: np.ndarray

    @property
    def max_error(self) -> float:
        """Largest |output - reference|."""
        return float(np.abs(self.output.real - self.reference).max())

    @property
    def relative_error(self) -> float:
        """Norm of the difference over the norm of the reference (0 where both are 0)."""
        norm = float(np.linalg.norm(self.reference))
        distance = float(np.linalg.norm(self.output.real - self.reference))
        return distance / norm if norm else distance


def simulate_attention(
    q: np.ndarray | Quantized,
    k: np.ndarray | Quantized,
    v: np.ndarray | Quantized,
    masks: Sequence[PolarizedMask] | None = None,
    hardware: Hardware = presets["vitcod"],
    *,
    codecs: tuple[CodecWeights, CodecWeights] | None = None,
    softmax_scale: float | None = None,
    output_scale: np.ndarray | float | None = None,
    bias: np.ndarray | None = None,
    score_shift: np.ndarray | int | None = None,
    arithmetic: Arithmetic | None = None,
    schedule: Schedule = DEFAULT,
    on_chip_bytes: int = 0,
) -> FunctionalResult:
    """One attention call on the machine, with data: [(images,) heads, tokens, dim].

    q, k, v        float, quantized here with a scale a head, or already `Quantized`
    masks          one polarized mask a head, shared by all images; None is dense
    codecs         of Q and of K: both are encoded, kept in DRAM as latents, and decoded
    softmax_scale  None is key_dim^-1/2
    output_scale   of the result, a head each; None takes V's
    bias           real [heads, queries, keys], added to the scores before softmax
    score_shift    places behind the point that a head's scores do without; None takes the
                   least at which no kept score saturates
    arithmetic     None takes the widths of ``hardware``
    schedule       how the hardware is used; its mapping, if it has one, is checked for the call
    on_chip_bytes  of Q, K and V (of latents) that a projection may have left on chip

    Raises ValueError for shapes that do not fit, operands beyond their width, sums that the
    accumulator might not hold, and a call that the machine's buffers cannot run.
    """
    arithmetic = arithmetic_of(hardware) if arithmetic is None else arithmetic
    real_q, real_k, real_v = _real(q), _real(k), _real(v)
    q, k, v = (x if isinstance(x, Quantized) else quantize(x, arithmetic) for x in (q, k, v))
    shape = codecs[0].shape if codecs else None
    op = _op(q, k, v, masks, shape, bias)
    op = with_thresholds(op, hardware, schedule, on_chip_bytes)
    sides = coded_operands(q, k, codecs, arithmetic) if codecs else (Side(q), Side(k))
    q_operands, k_operands = sides[0].operands, sides[1].operands
    if score_shift is None:
        largest = _largest_scores(q_operands, k_operands, masks, softmax_scale, bias)
        score_shift = score_shift_for(largest, arithmetic)
    rules = checked_rules(
        q_operands, k_operands, v, softmax_scale, output_scale, arithmetic, score_shift
    )
    images = _images(v.values)
    stepped = run_attention(op, hardware, len(images), schedule, on_chip_bytes)
    added = None if bias is None else fixed_bias(bias, rules)
    memory = (_images(sides[0].stored.values), _images(sides[1].stored.values), images)
    decoders = (sides[0].decoder, sides[1].decoder)
    run = ProgramExecutor(stepped.mapping, stepped.program, memory, decoders, rules, added)
    made = run.all_stages().reshape(*v.values.shape[:-2], op.queries, op.value_dim)
    scale = op.key_dim**-0.5 if softmax_scale is None else softmax_scale
    if codecs:
        real_q, real_k = (
            codec.decoded(codec.encoded(x))
            for codec, x in zip(codecs, (real_q, real_k), strict=True)
        )
    reference = float_attention(real_q, real_k, real_v, masks, scale, bias)
    cost = cost_of(stepped, len(images))
    output = Quantized(made, rules.output_scale)
    return FunctionalResult(output, reference, cost, rules.score_shift)


def arithmetic_of(hardware: Hardware) -> Arithmetic:
    """The machine's widths, the other fields at their defaults."""
    return Arithmetic(
        operand_bits=8 * hardware.operand_bytes,
        weight_bits=8 * hardware.operand_bytes,
        score_bits=8 * hardware.score_bytes,
        accumulator_bits=8 * hardware.accumulator_bytes,
    )


@dataclass(frozen=True, eq=False)
class Side:
    """Q or K as DRAM holds it, and as the lines see it.

    stored   the operands themselves, or latents [(images,) latent_heads, tokens, dim]
    decoder  None without a codec
    """

    stored: Quantized
    decoder: HeadMap | None = None

    @property
    def operands(self) -> Quantized:
        """[(images,) heads, tokens, dim], decoded."""
        if self.decoder is None:
            return self.stored
        return Quantized(self.decoder(self.stored.values), self.decoder.scale)


def coded_operands(
    q: Quantized,
    k: Quantized,
    codecs: tuple[CodecWeights, CodecWeights],
    arithmetic: Arithmetic = Arithmetic(),
) -> tuple[Side, Side]:
    """Q and K through their encoders, and the integer decoders.

    The scale of each latent, and of each decoded head, puts the largest value that float
    arithmetic gives at the limit.
    """
    limit, made = arithmetic.operand_limit, []
    for x, codec in zip((q, k), codecs, strict=True):
        latent, back = codec.encoded(x.real), codec.decoded(codec.encoded(x.real))
        scales = [scale_for(_largest(part), limit) for part in (latent, back)]
        shape = codec.shape
        encoder = quantize_head_map(
            codec.encoder, codec.encoder_bias, shape, x.scale, scales[0], arithmetic
        )
        decoder = quantize_head_map(
            codec.decoder, codec.decoder_bias, shape, scales[0], scales[1], arithmetic
        )
        made.append(Side(Quantized(encoder(x.values), scales[0]), decoder))
    return made[0], made[1]


def float_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    masks: Sequence[PolarizedMask] | None,
    scale: float,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """float64 attention over the kept entries; a row with none kept gives 0."""
    scores = q @ k.swapaxes(-1, -2) * scale + (0.0 if bias is None else bias)
    if masks is not None:
        scores = np.where(np.stack([mask.dense() for mask in masks]), scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    terms = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    sums = terms.sum(axis=-1, keepdims=True)
    return terms / np.where(sums > 0, sums, 1.0) @ v


def _real(x: np.ndarray | Quantized) -> np.ndarray:
    return x.real if isinstance(x, Quantized) else np.asarray(x, dtype=np.float64)


def _largest_scores(
    q: Quantized,
    k: Quantized,
    masks: Sequence[PolarizedMask] | None,
    scale: float | None,
    bias: np.ndarray | None,
) -> np.ndarray:
    """Largest magnitude of each head's scaled scores, bias before and after, kept ones."""
    scale = q.values.shape[-1] ** -0.5 if scale is None else scale
    scores = np.abs(_images(q.real @ k.real.swapaxes(-1, -2))) * scale
    if bias is not None:
        scores = scores + np.abs(bias)
    if masks is not None:
        scores = scores * np.stack([mask.dense() for mask in masks])
    return scores.max(axis=(0, 2, 3))


def _largest(x: np.ndarray) -> np.ndarray:
    """Of each head of [(images,) heads, tokens, dim]."""
    return np.abs(_images(x)).max(axis=(0, 2, 3))


def _images(x: np.ndarray) -> np.ndarray:
    """[images, heads, tokens, dim]"""
    return x if x.ndim == 4 else x[None]


def _op(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    masks: Sequence[PolarizedMask] | None,
    codec: HeadCodec | None,
    bias: np.ndarray | None,
) -> Attention:
    heads, queries, key_dim = q.values.shape[-3:]
    keys, value_dim = v.values.shape[-2:]
    if bias is not None and np.shape(bias) != (heads, queries, keys):
        raise ValueError(f"bias must be {[heads, queries, keys]}, got {list(np.shape(bias))}")
    kept = None if masks is None else tuple(masks)
    return Attention("attention", heads, queries, keys, key_dim, value_dim, masks=kept, codec=codec)
