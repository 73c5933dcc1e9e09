"""The kernels as operators of PyTorch (``torch.ops.sievit``): shapes for tracing, gradients.

Arguments are tensors alone, so that compilers and exporters see all that a kernel reads;
`sparse_attention` takes them from a plan and checks them. Whoever calls an operator
directly answers for shapes and for index arrays that stay inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("sievit::attention_by_rows", mutates_args=(), device_types="cpu")
def _by_rows(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, indptr: Tensor, columns: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    from .attention_cpu import run_forward

    return run_forward(q, k, v, order, indptr, columns, scale)


@_by_rows.register_fake
def _(q, k, v, order, indptr, columns, scale):
    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, heads, queries, 2, dtype=torch.float32)


@torch.library.custom_op("sievit::attention_by_rows_backward", mutates_args=(), device_types="cpu")
def _by_rows_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    order: Tensor,
    indptr: Tensor,
    columns: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from .attention_cpu import run_backward

    return run_backward(grad, q, k, v, out, sums, order, indptr, columns, scale)


@_by_rows_backward.register_fake
def _(grad, q, k, v, out, sums, order, indptr, columns, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _save_rows(ctx, inputs, output):
    q, k, v, order, indptr, columns, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, order, indptr, columns)
    ctx.mark_non_differentiable(output[1])


def _rows_backward(ctx, grad, _):
    q, k, v, *rest = ctx.saved_tensors
    grads = torch.ops.sievit.attention_by_rows_backward(grad, q, k, v, *rest, ctx.scale)
    return *grads, None, None, None, None


_by_rows.register_autograd(_rows_backward, setup_context=_save_rows)


@torch.library.custom_op("sievit::attention_by_tiles", mutates_args=())
def _by_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Sequence[Tensor],
    key_tiles: Sequence[Tensor],
    words: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from .attention_gpu import run_forward

    return run_forward(q, k, v, tiles, words, scale)


@_by_tiles.register_fake
def _(q, k, v, tiles, key_tiles, words, scale):
    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, heads, queries, dtype=torch.float32)


@torch.library.custom_op("sievit::attention_by_tiles_backward", mutates_args=())
def _by_tiles_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    tiles: Sequence[Tensor],
    key_tiles: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from .attention_gpu import run_backward

    return run_backward(grad, q, k, v, out, sums, tiles, key_tiles, scale)


@_by_tiles_backward.register_fake
def _(grad, q, k, v, out, sums, tiles, key_tiles, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _save_tiles(ctx, inputs, output):
    q, k, v, tiles, key_tiles, _, ctx.scale = inputs
    ctx.lists = len(tiles)
    ctx.save_for_backward(q, k, v, *output, *tiles, *key_tiles)
    ctx.mark_non_differentiable(output[1])


def _tiles_backward(ctx, grad, _):
    q, k, v, out, sums, *lists = ctx.saved_tensors
    tiles, key_tiles = lists[: ctx.lists], lists[ctx.lists :]
    grads = torch.ops.sievit.attention_by_tiles_backward(
        grad, q, k, v, out, sums, tiles, key_tiles, ctx.scale
    )
    return *grads, [None] * len(tiles), [None] * len(key_tiles), None, None


_by_tiles.register_autograd(_tiles_backward, setup_context=_save_tiles)
