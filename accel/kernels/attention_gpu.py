"""Attention under a fixed mask on a GPU, in Triton: gathered tiles and one short kernel.

Gather: a program takes one tile of queries of a head and walks the list of keys that any of
them keeps, as in FlashAttention (arXiv 2205.14135) but over gathered keys, with a bit word
a key for what each query keeps. Backward: dQ over the same tiles, dK and dV over the tiles
of keys with gathered queries; no atomics, so the same in every run.
Short: up to 256 keys are one tile, masked by bits, with the keys and values read once for
several tiles of queries.

Logarithms and exponentials are to base 2: ``qk_scale`` is scale * log2(e). Pruned scores
are -1e30, not -inf, so that a block without kept entries gives no NaN.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

jit: Any = triton.jit  # what it makes is launched with other types than the source is written in
PRUNED = tl.constexpr(-1.0e30)


@jit
def _rows_at(base, index, stride, dims, dim: tl.constexpr, some, UPCAST: tl.constexpr):
    """Rows ``index`` of a matrix whose rows are ``dim`` long, 0 where ``some`` is False; in
    float32 with ``UPCAST``."""
    inside = some[:, None] & (dims[None, :] < dim)
    rows = tl.load(base + index[:, None] * stride + dims[None, :], mask=inside, other=0.0)
    if UPCAST:
        rows = rows.to(tl.float32)
    return rows


@jit
def _store_rows(base, index, stride, dims, dim: tl.constexpr, some, values):
    inside = some[:, None] & (dims[None, :] < dim)
    at = base + index[:, None] * stride + dims[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=inside)


@jit
def _kept(word, r):
    """[rows r, words]: whether bit r of each word is set."""
    return ((word[None, :] >> r[:, None]) & 1) != 0


@jit
def gather_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    head_ptr, rows_ptr, start_ptr, count_ptr, columns_ptr, bits_ptr,
    qk_scale, heads, queries,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one image."""
    t = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    r, n, d, e = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, DVP)
    h = tl.load(head_ptr + t).to(tl.int64)
    rows = tl.load(rows_ptr + t * BM + r)
    live = rows >= 0
    q = _rows_at(q_ptr + b * q_b + h * q_h, rows, q_n, d, D, live, UPCAST)
    k_base = k_ptr + b * k_b + h * k_h
    v_base = v_ptr + b * v_b + h * v_h
    start = tl.load(start_ptr + t)
    count = tl.load(count_ptr + t)
    most = tl.full([BM], PRUNED, tl.float32)
    mass = tl.zeros([BM], tl.float32)
    mixed = tl.zeros([BM, DVP], tl.float32)
    for j in range(0, count, BN):
        there = j + n < count
        c = tl.load(columns_ptr + start + j + n, mask=there, other=0)
        word = tl.load(bits_ptr + start + j + n, mask=there, other=0)
        k = _rows_at(k_base, c, k_n, d, D, there, UPCAST)
        v = _rows_at(v_base, c, v_n, e, DV, there, UPCAST)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
        kept = _kept(word, r)
        s = tl.where(kept, s, PRUNED)
        higher = tl.maximum(most, tl.max(s, 1))
        p = tl.where(kept, tl.math.exp2(s - higher[:, None]), 0.0)
        fade = tl.math.exp2(most - higher)
        mass = mass * fade + tl.sum(p, 1)
        mixed = tl.dot(p.to(v.dtype), v, mixed * fade[:, None], input_precision=PRECISION)
        most = higher
    mass = tl.where(mass == 0.0, 1.0, mass)
    _store_rows(out_ptr + b * o_b + h * o_h, rows, o_n, e, DV, live, mixed / mass[:, None])
    tl.store(lse_ptr + (b * heads + h) * queries + rows, most + tl.math.log2(mass), mask=live)


@jit
def gather_backward_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, dq_ptr, lse_ptr, delta_ptr,
    head_ptr, rows_ptr, start_ptr, count_ptr, columns_ptr, bits_ptr,
    qk_scale, scale, heads, queries,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    g_b, g_h, g_n, dq_b, dq_h, dq_n,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one image, and rowsum(dO O) for the other kernel."""
    t = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    r, n, d, e = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, DVP)
    h = tl.load(head_ptr + t).to(tl.int64)
    rows = tl.load(rows_ptr + t * BM + r)
    live = rows >= 0
    q = _rows_at(q_ptr + b * q_b + h * q_h, rows, q_n, d, D, live, UPCAST)
    grad = _rows_at(grad_ptr + b * g_b + h * g_h, rows, g_n, e, DV, live, UPCAST)
    out = _rows_at(out_ptr + b * o_b + h * o_h, rows, o_n, e, DV, live, UPCAST)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    place = (b * heads + h) * queries + rows
    tl.store(delta_ptr + place, delta, mask=live)
    lse = tl.load(lse_ptr + place, mask=live, other=0.0)
    k_base = k_ptr + b * k_b + h * k_h
    v_base = v_ptr + b * v_b + h * v_h
    start = tl.load(start_ptr + t)
    count = tl.load(count_ptr + t)
    moved = tl.zeros([BM, DP], tl.float32)
    for j in range(0, count, BN):
        there = j + n < count
        c = tl.load(columns_ptr + start + j + n, mask=there, other=0)
        word = tl.load(bits_ptr + start + j + n, mask=there, other=0)
        k = _rows_at(k_base, c, k_n, d, D, there, UPCAST)
        v = _rows_at(v_base, c, v_n, e, DV, there, UPCAST)
        kept = _kept(word, r)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
        p = tl.where(kept, tl.math.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = tl.where(kept, p * (dp - delta[:, None]) * scale, 0.0)  # pyright: ignore[reportArgumentType]
        moved = tl.dot(ds.to(k.dtype), k, moved, input_precision=PRECISION)
    _store_rows(dq_ptr + b * dq_b + h * dq_h, rows, dq_n, d, D, live, moved)


@jit
def gather_backward_keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr,
    head_ptr, rows_ptr, start_ptr, count_ptr, columns_ptr, bits_ptr,
    qk_scale, scale, heads, queries,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one image; its list names queries."""
    t = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    r, n, d, e = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, DVP)
    h = tl.load(head_ptr + t).to(tl.int64)
    rows = tl.load(rows_ptr + t * BM + r)
    live = rows >= 0
    k = _rows_at(k_ptr + b * k_b + h * k_h, rows, k_n, d, D, live, UPCAST)
    v = _rows_at(v_ptr + b * v_b + h * v_h, rows, v_n, e, DV, live, UPCAST)
    q_base = q_ptr + b * q_b + h * q_h
    grad_base = grad_ptr + b * g_b + h * g_h
    start = tl.load(start_ptr + t)
    count = tl.load(count_ptr + t)
    dk = tl.zeros([BM, DP], tl.float32)
    dv = tl.zeros([BM, DVP], tl.float32)
    for j in range(0, count, BN):
        there = j + n < count
        i = tl.load(columns_ptr + start + j + n, mask=there, other=0)
        word = tl.load(bits_ptr + start + j + n, mask=there, other=0)
        q = _rows_at(q_base, i, q_n, d, D, there, UPCAST)
        grad = _rows_at(grad_base, i, g_n, e, DV, there, UPCAST)
        place = (b * heads + h) * queries + i
        lse = tl.load(lse_ptr + place, mask=there, other=0.0)
        delta = tl.load(delta_ptr + place, mask=there, other=0.0)
        kept = _kept(word, r)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * qk_scale
        p = tl.where(kept, tl.math.exp2(s - lse[None, :]), 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = tl.where(kept, p * (dp - delta[None, :]) * scale, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    _store_rows(dk_ptr + b * dk_b + h * dk_h, rows, dk_n, d, D, live, dk)
    _store_rows(dv_ptr + b * dv_b + h * dv_h, rows, dv_n, e, DV, live, dv)


@jit
def short_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, words_ptr,
    qk_scale, heads, queries, keys, tiles,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, NK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``tiles`` tiles of queries after one another, against all keys at once."""
    first = tl.program_id(0) * tiles
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    n, d, e = tl.arange(0, NK), tl.arange(0, DP), tl.arange(0, DVP)
    there = n < keys
    k = _rows_at(k_ptr + b * k_b + h * k_h, n, k_n, d, D, there, UPCAST)
    v = _rows_at(v_ptr + b * v_b + h * v_h, n, v_n, e, DV, there, UPCAST)
    kt = tl.trans(k)
    words_base = words_ptr + h * queries * (NK // 32)
    for t in range(first, first + tiles):
        rows = t * BM + tl.arange(0, BM)
        live = rows < queries
        q = _rows_at(q_ptr + b * q_b + h * q_h, rows, q_n, d, D, live, UPCAST)
        s = tl.dot(q, kt, input_precision=PRECISION) * qk_scale
        at = words_base + rows[:, None] * (NK // 32) + (n[None, :] >> 5)
        word = tl.load(at, mask=live[:, None], other=0)
        kept = ((word >> (n[None, :] & 31)) & 1) != 0
        s = tl.where(kept, s, PRUNED)
        most = tl.max(s, 1)
        p = tl.where(kept, tl.math.exp2(s - most[:, None]), 0.0)  # pyright: ignore[reportArgumentType, reportCallIssue]
        mass = tl.sum(p, 1)
        mass = tl.where(mass == 0.0, 1.0, mass)
        mixed = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / mass[:, None]
        _store_rows(out_ptr + b * o_b + h * o_h, rows, o_n, e, DV, live, mixed)
        tl.store(lse_ptr + (b * heads + h) * queries + rows, most + tl.math.log2(mass), mask=live)


STEP = 32
"""Keys a program takes at a time."""

WARPS = {16: (1, 2), 32: (2, 8), 64: (4, 8)}
"""By tile: warps for rows of up to 64 and for longer ones or float32. With these the kernels
compile for sm_90 without spills, by Triton 3.6 and 3.9 (tests/test_kernels_gpu.py); none was
timed on a GPU."""

SHORT_WARPS = 8


def gather_launch(tile: int, dims: dict[str, int], exact: bool) -> dict[str, int]:
    """Block sizes and resources of the gather kernels; ``exact`` for float32."""
    wide = exact or dims["DP"] + dims["DVP"] > 128
    stages = 1 if exact else 3 if tile == 64 else 2
    warps = max(4, WARPS[tile][1]) if exact else WARPS[tile][wide]
    return {"BM": tile, "BN": STEP, "num_warps": warps, "num_stages": stages}


def short_launch(keys: int, dims: dict[str, int]) -> dict[str, int]:
    """Block sizes and resources of the short kernel for ``keys``, a power of two."""
    rows = 16 if dims["DP"] + dims["DVP"] <= 64 else 32
    return {"BM": rows, "NK": keys, "num_warps": SHORT_WARPS, "num_stages": 1}


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tensor], words: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(output [batch, heads, queries, value_dim], log2 of each query's sum of exponentials,
    float32 [batch, heads, queries]), by the short kernel where ``words`` is not empty.
    Shapes and arrays must be right: they are not checked."""
    q, k, v = (_readable(tensor) for tensor in (q, k, v))
    batch, heads, queries, dim = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if not batch:
        return out, lse
    strides = _strides(q, k, v, out)
    qk_scale = scale * math.log2(math.e)
    dims = _dims(dim, v.shape[-1])
    with _on(q.device):
        if words.numel():
            launch = short_launch(32 * words.shape[2], dims)
            each = _tiles_a_program(batch * heads, triton.cdiv(queries, launch["BM"]))
            short_forward[(triton.cdiv(queries, launch["BM"] * each), heads, batch)](
                q, k, v, out, lse, words,
                qk_scale, heads, queries, k.shape[2], each, *strides,
                **dims, **launch, **_arithmetic(q),
            )  # fmt: skip
        else:
            launch = gather_launch(tiles[1].shape[1], dims, q.dtype == torch.float32)
            gather_forward[(len(tiles[0]), batch)](
                q, k, v, out, lse, *tiles, qk_scale, heads, queries, *strides,
                **dims, **launch, **_arithmetic(q),
            )  # fmt: skip
    return out, lse


def run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Sequence[Tensor],
    key_tiles: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous; the same in every run."""
    grad, q, k, v, out = (_readable(tensor) for tensor in (grad, q, k, v, out))
    batch, heads, queries, dim = q.shape
    grad_q, grad_k, grad_v = (t.new_empty(t.shape) for t in (q, k, v))
    if not batch:
        return grad_q, grad_k, grad_v
    delta = torch.empty_like(lse)
    qk_scale = scale * math.log2(math.e)
    dims, arithmetic = _dims(dim, v.shape[-1]), _arithmetic(q)
    with _on(q.device):
        launch = gather_launch(tiles[1].shape[1], dims, q.dtype == torch.float32)
        gather_backward_queries[(len(tiles[0]), batch)](
            q, k, v, out, grad, grad_q, lse, delta, *tiles,
            qk_scale, scale, heads, queries, *_strides(q, k, v, out, grad, grad_q),
            **dims, **launch, **arithmetic,
        )  # fmt: skip
        launch = gather_launch(key_tiles[1].shape[1], dims, q.dtype == torch.float32)
        gather_backward_keys[(len(key_tiles[0]), batch)](
            q, k, v, grad, grad_k, grad_v, lse, delta, *key_tiles,
            qk_scale, scale, heads, queries, *_strides(q, k, v, grad, grad_k, grad_v),
            **dims, **launch, **arithmetic,
        )  # fmt: skip
    return grad_q, grad_k, grad_v


def _readable(tensor: Tensor) -> Tensor:
    """Rows must be unbroken; no copy where they are."""
    tensor = tensor.detach()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Of image, head and token of each."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _dims(dim: int, value_dim: int) -> dict[str, int]:
    """Lengths of rows, and the powers of two that hold them: at least 16 for a dot."""
    padded = [max(16, triton.next_power_of_2(size)) for size in (dim, value_dim)]
    return {"D": dim, "DV": value_dim, "DP": padded[0], "DVP": padded[1]}


def _arithmetic(q: Tensor) -> dict[str, object]:
    """Float32 products are three of TF32, close to exact, or one where PyTorch's own may be.
    The interpreter's bfloat16 products are wrong; they are made in float32 there."""
    interpreted = q.device.type == "cpu"
    rounded = not interpreted and torch.backends.cuda.matmul.allow_tf32
    return {
        "UPCAST": interpreted and q.dtype == torch.bfloat16,
        "PRECISION": "tf32" if rounded else "tf32x3",
    }


def _tiles_a_program(programs: int, tiles: int) -> int:
    """All tiles of a head where there are heads enough to fill a GPU, which reads keys and
    values once; else one."""
    return tiles if programs >= 256 else 1


def _on(device: torch.device):
    """Launches go to the tensors' device, not to the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
