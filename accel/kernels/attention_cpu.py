"""Attention under a fixed mask on a CPU: compiled loops over the kept entries alone.

One call of a compiled function does some heads of some images; `run_forward` and
`run_backward` spread those over a pool of threads. A query's kept keys are a list, so
scores, softmax (Rabe and Staats, arXiv 2112.05682, for the sums saved) and product touch
nothing else. The plan's order of queries puts those that share keys next to each other:
their keys and values are then in the cache. Arithmetic is float32.
"""

from __future__ import annotations

import functools
import math
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .vectors import (
    LANES,
    add_scaled,
    exp_minus,
    larger,
    load_row,
    plus_scaled_at,
    row_dot,
    row_max,
    row_sum,
    scaled,
    store_dots,
    store_row,
    zero_row,
)

_BYTES = 4
_SOURCE = zlib.crc32(Path(__file__).with_name("vectors.py").read_bytes())
"""Numba's cache looks at this file and at what a function closes over; so they close over
this, in a test that never holds."""


@njit(inline="always")
def _dots(row, base, stride, columns, first, count, target):
    """Dot products of ``row`` with the rows of a matrix that ``columns`` names."""
    last = count - 1
    for t in range(0, count, 4):
        store_dots(
            target + _BYTES * t,
            row,
            base + stride * columns[first + t],
            base + stride * columns[first + min(t + 1, last)],
            base + stride * columns[first + min(t + 2, last)],
            base + stride * columns[first + min(t + 3, last)],
        )


def _forward(key_dim: int, value_dim: int) -> Callable:
    """The compiled forward for these lengths of a row."""
    source = _SOURCE

    def forward(tasks, heads, order, indptr, columns, q, k, v, out, lse, scale):
        if source < 0:
            return
        queries = order.shape[1]
        longest = 0
        for i in range(heads * queries):
            longest = max(longest, indptr[i + 1] - indptr[i])
        scores = np.empty(longest + 2 * LANES, np.float32)
        at = scores.ctypes.data
        for task in range(len(tasks)):
            batch, head, begin, end = tasks[task]
            q_base = q[0] + batch * q[1] + head * q[2]
            k_base = k[0] + batch * k[1] + head * k[2]
            v_base = v[0] + batch * v[1] + head * v[2]
            out_base = out[0] + batch * out[1] + head * out[2]
            lse_base = (batch * heads + head) * queries
            for position in range(begin, end):
                i = order[head, position]
                first = indptr[head * queries + position]
                count = indptr[head * queries + position + 1] - first
                if count == 0:
                    lse[lse_base + i] = -np.inf
                    store_row(out_base + i * out[3], zero_row(value_dim))
                    continue
                query = scaled(load_row(q_base + i * q[3], key_dim), scale)
                _dots(query, k_base, k[3], columns, first, count, at)
                padded = (count + LANES - 1) // LANES * LANES
                for t in range(count, padded):
                    scores[t] = -np.inf
                most = load_row(at, LANES)
                for t in range(LANES, padded, LANES):
                    most = larger(most, load_row(at + _BYTES * t, LANES))
                top = row_max(most)
                total = zero_row(LANES)
                for t in range(0, padded, LANES):
                    weights = exp_minus(load_row(at + _BYTES * t, LANES), top)
                    store_row(at + _BYTES * t, weights)
                    total = plus_scaled_at(total, np.float32(1.0), at + _BYTES * t)
                mass = row_sum(total)
                mixed = zero_row(value_dim)
                for t in range(count):
                    mixed = plus_scaled_at(mixed, scores[t], v_base + v[3] * columns[first + t])
                store_row(out_base + i * out[3], scaled(mixed, np.float32(1.0) / mass))
                lse[lse_base + i] = top + math.log(mass)

    return forward


def _backward(key_dim: int, value_dim: int) -> Callable:
    """The compiled backward for these lengths of a row.

    With P the probabilities and dP = dO V^T: dV = P^T dO, dS = P (dP - rowsum(dO O)),
    dQ = scale dS K, dK = scale dS^T Q. One head of one image is one task, so that its
    keys' gradients are summed in one order.
    """
    source = _SOURCE

    def backward(tasks, heads, order, indptr, columns, q, k, v, out, grad, dq, dk, dv, lse, scale):
        if source < 0:
            return
        queries = order.shape[1]
        longest = 0
        for i in range(heads * queries):
            longest = max(longest, indptr[i + 1] - indptr[i])
        weights = np.empty(longest + 2 * LANES, np.float32)
        slopes = np.empty(longest + 2 * LANES, np.float32)
        weights_at = weights.ctypes.data
        slopes_at = slopes.ctypes.data
        for task in range(len(tasks)):
            batch, head, begin, end = tasks[task]
            q_base = q[0] + batch * q[1] + head * q[2]
            k_base = k[0] + batch * k[1] + head * k[2]
            v_base = v[0] + batch * v[1] + head * v[2]
            out_base = out[0] + batch * out[1] + head * out[2]
            grad_base = grad[0] + batch * grad[1] + head * grad[2]
            dq_base = dq[0] + batch * dq[1] + head * dq[2]
            dk_base = dk[0] + batch * dk[1] + head * dk[2]
            dv_base = dv[0] + batch * dv[1] + head * dv[2]
            lse_base = (batch * heads + head) * queries
            for position in range(begin, end):
                i = order[head, position]
                first = indptr[head * queries + position]
                count = indptr[head * queries + position + 1] - first
                if count == 0:
                    store_row(dq_base + i * dq[3], zero_row(key_dim))
                    continue
                query = scaled(load_row(q_base + i * q[3], key_dim), scale)
                slope = load_row(grad_base + i * grad[3], value_dim)
                delta = row_dot(slope, out_base + i * out[3])
                _dots(query, k_base, k[3], columns, first, count, weights_at)
                _dots(slope, v_base, v[3], columns, first, count, slopes_at)
                for t in range(0, count, LANES):
                    chunk = exp_minus(load_row(weights_at + _BYTES * t, LANES), lse[lse_base + i])
                    store_row(weights_at + _BYTES * t, chunk)
                moved = zero_row(key_dim)
                for t in range(count):
                    column = columns[first + t]
                    weight = weights[t]
                    steep = weight * (slopes[t] - delta)
                    moved = plus_scaled_at(moved, steep, k_base + k[3] * column)
                    add_scaled(dk_base + dk[3] * column, steep, query)
                    add_scaled(dv_base + dv[3] * column, weight, slope)
                store_row(dq_base + i * dq[3], scaled(moved, scale))

    return backward


@functools.cache
def _compiled(make: Callable, key_dim: int, value_dim: int) -> Callable:
    function = make(key_dim, value_dim)
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # there is no folder that can be written
        return njit(nogil=True, error_model="numpy")(function)


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    indptr: Tensor,
    columns: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(output [batch, heads, queries, value_dim] of q's dtype, the logarithm of each
    query's sum of exponentials, float32 [batch, heads, queries]); -inf for a query that
    keeps nothing, whose output is 0. Shapes and arrays must be right: they are not checked.
    """
    dtype = q.dtype
    q, k, v = (_readable(tensor) for tensor in (q, k, v))
    batch, heads, queries, key_dim = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries)
    arrays = (order.numpy(), indptr.numpy(), columns.numpy())
    rows = (_place(q), _place(k), _place(v), _place(out))
    function = _compiled(_forward, key_dim, v.shape[-1])
    tasks, costs = _tasks(batch, heads, queries, arrays[1], split=True)

    def work(some: np.ndarray) -> None:
        function(some, heads, *arrays, *rows, lse.view(-1).numpy(), np.float32(scale))

    _spread(work, tasks, costs)
    return out.to(dtype), lse


def run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    order: Tensor,
    indptr: Tensor,
    columns: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, of their dtype, contiguous; the same in every run."""
    dtype = q.dtype
    grad, q, k, v, out = (_readable(tensor) for tensor in (grad, q, k, v, out))
    batch, heads, queries, key_dim = q.shape
    grad_q = q.new_empty(q.shape)
    grad_k = q.new_zeros(k.shape)
    grad_v = q.new_zeros(v.shape)
    arrays = (order.numpy(), indptr.numpy(), columns.numpy())
    rows = tuple(_place(tensor) for tensor in (q, k, v, out, grad, grad_q, grad_k, grad_v))
    function = _compiled(_backward, key_dim, v.shape[-1])
    tasks, costs = _tasks(batch, heads, queries, arrays[1], split=False)
    lse = lse.contiguous().view(-1).numpy()

    def work(some: np.ndarray) -> None:
        function(some, heads, *arrays, *rows, lse, np.float32(scale))

    _spread(work, tasks, costs)
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


def _readable(tensor: Tensor) -> Tensor:
    """Float32 whose rows are unbroken; no copy where it is that already."""
    tensor = tensor.detach().to(torch.float32)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _place(tensor: Tensor) -> np.ndarray:
    """Address and the strides in bytes of batch, head and token."""
    strides = tensor.stride()[:3]
    return np.array([tensor.data_ptr(), *(_BYTES * s for s in strides)], dtype=np.int64)


_ROW_COST = 12
"""What a query costs beside its entries, in entries (measured: about 0.1 us)."""

_LEAST_COST = 30_000
"""Less than this is not worth a second thread (measured: about 0.2 ms)."""


def _tasks(
    batch: int, heads: int, queries: int, indptr: np.ndarray, split: bool
) -> tuple[np.ndarray, np.ndarray]:
    """int64 [tasks, 4] of (image, head, first position, last + 1), and the cost of each.

    A task is a head of an image, or a part of its queries where there are few heads.
    """
    parts = 1
    if split:
        parts = min(queries, max(1, 4 * torch.get_num_threads() // max(1, batch * heads)))
    edges = np.linspace(0, queries, parts + 1).astype(np.int64)
    heads_of, part_of = (x.reshape(-1) for x in np.mgrid[:heads, :parts])
    first, last = edges[part_of], edges[part_of + 1]
    base = heads_of * queries
    cost = indptr[base + last] - indptr[base + first] + _ROW_COST * (last - first)
    one = np.stack([np.zeros_like(heads_of), heads_of, first, last], axis=1)
    tasks = np.tile(one, (batch, 1))
    tasks[:, 0] = np.repeat(np.arange(batch), len(one))
    return tasks, np.tile(cost, batch)


def _spread(work: Callable[[np.ndarray], None], tasks: np.ndarray, costs: np.ndarray) -> None:
    """Do all tasks, in about four equal shares a thread of PyTorch's number."""
    threads = torch.get_num_threads()
    done = np.cumsum(costs)
    if threads == 1 or len(tasks) < 2 or done[-1] < _LEAST_COST:
        work(tasks)
        return
    shares = min(4 * threads, len(tasks))
    cuts = np.searchsorted(done, done[-1] * np.arange(1, shares) / shares)
    list(_pool(threads).map(work, (s for s in np.split(tasks, cuts) if len(s))))


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sievit-attention")


os.register_at_fork(after_in_child=_pool.cache_clear)
