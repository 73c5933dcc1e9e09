"""Attention under a fixed mask on a CPU: compiled loops over the kept entries alone.

One call of a compiled function does some heads of some images; `run_forward` and
`run_backward` spread those over threads. A query's kept keys are a list, so
scores, softmax and product touch
nothing else. The plan's order of queries puts those that share keys next to each other:
their keys and values are then in the cache, packed there a head at a time. Arithmetic is
float32.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .threads import spread
from .vectors import (
    LANES,
    add_scaled,
    exp_minus,
    first_lanes,
    larger,
    load_row,
    plus,
    plus_scaled_at,
    row_dot,
    row_max,
    row_sum,
    scaled,
    store_dots,
    store_row,
    times_minus,
    zero_row,
)

_BYTES = 4
_SOURCE = zlib.crc32(Path(__file__).with_name("vectors.py").read_bytes())
"""Numba's cache looks at this file and at what a function closes over; so they close over
this, in a test that never holds."""


_BLOCK = 32
_CAPACITY = 4096
"""Queries are computed in blocks of up to 32 and 4,096 scores, so that the steps of one
overlap those of another: each alone would wait for the one before it."""


@njit(inline="always")
def _task(item, heads, parts, queries):
    """(image, head, first position, last + 1): items are parts of a head's queries, those of
    a head together, heads of an image together."""
    whole, part = item // parts, item % parts
    return whole // heads, whole % heads, queries * part // parts, queries * (part + 1) // parts


@njit(inline="always")
def _pitch(length):
    """Bytes from row to row where rows begin on cache lines."""
    return _BYTES * ((length + LANES - 1) // LANES * LANES)


@njit(inline="always")
def _pack(source, stride, rows, length, target):
    """Copy a head's rows next to each other. Rows a large power of two apart, as a packed
    projection's are, share few cache sets: gathering from there takes up to twice as long."""
    for row in range(rows):
        store_row(target + row * _pitch(length), load_row(source + row * stride, length))


@njit(inline="always")
def _head(place, batch, head):
    """Address of the first row of a head: see `_place`."""
    return place[0] + batch * place[1] + head * place[2]


@njit(inline="always")
def _pack_head(k, v, batch, head, keys, key_dim, value_dim, k_base, v_base):
    _pack(_head(k, batch, head), k[3], keys, key_dim, k_base)
    _pack(_head(v, batch, head), v[3], keys, value_dim, v_base)


@njit(inline="always")
def _padded(count):
    return (count + LANES - 1) // LANES * LANES


@njit(inline="always")
def _block_end(position, end, starts, offsets, capacity):
    """Last + 1 of the queries that fit a block; their places in it go to ``offsets``."""
    used = 0
    stop = position
    while stop < end and stop < position + _BLOCK:
        padded = _padded(starts[stop + 1] - starts[stop])
        if used + padded > capacity:
            break
        offsets[stop - position] = used
        used += padded
        stop += 1
    return stop


@njit(inline="always")
def _dots(row, base, stride, columns, first, count, target):
    """Dot products of ``row`` with the rows of a matrix that ``columns`` names, in fours:
    up to three behind the last are its repetition."""
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


@njit(inline="always")
def _exponentials(at, count):
    """Scores become exponentials of their distance from the largest, up to a multiple of 16
    that is filled with 0; (the largest, 1 / their sum)."""
    low = np.float32(-np.inf)
    tail = (count - 1) // LANES * LANES
    most = first_lanes(load_row(at + _BYTES * tail, LANES), count - tail, low)
    store_row(at + _BYTES * tail, most)
    for t in range(0, tail, LANES):
        most = larger(most, load_row(at + _BYTES * t, LANES))
    top = row_max(most)
    total = zero_row(LANES)
    for t in range(0, count, LANES):
        chunk = exp_minus(load_row(at + _BYTES * t, LANES), top)
        store_row(at + _BYTES * t, chunk)
        total = plus(total, chunk)
    return top, np.float32(1.0) / row_sum(total)


@njit(inline="always")
def _score_slopes(weights, slopes, count, top, share, delta):
    """Scores at ``weights`` become probabilities P, the dP at ``slopes`` P (dP - delta)."""
    for t in range(0, count, LANES):
        at = weights + _BYTES * t
        chunk = scaled(exp_minus(load_row(at, LANES), top), share)
        store_row(at, chunk)
        at = slopes + _BYTES * t
        store_row(at, times_minus(chunk, load_row(at, LANES), delta))


def _forward(key_dim: int, value_dim: int) -> Callable:
    """The compiled forward for these lengths of a row."""
    source = _SOURCE

    def forward(items, heads, parts, order, indptr, columns, keys, room, q, k, v, out, sums, scale):
        if source < 0:
            return
        queries = order.shape[1]
        capacity = max(_CAPACITY, _padded(np.max(np.diff(indptr))))
        scores = np.empty(capacity, np.float32)
        offsets = np.empty(_BLOCK, np.int64)
        k_pitch, v_pitch = _pitch(key_dim), _pitch(value_dim)
        k_base = (room.ctypes.data + 63) // 64 * 64
        v_base = k_base + keys * k_pitch
        packed = -1
        for item in range(items[0], items[1]):
            batch, head, begin, end = _task(item, heads, parts, queries)
            q_base = _head(q, batch, head)
            if packed != item // parts:
                packed = item // parts
                _pack_head(k, v, batch, head, keys, key_dim, value_dim, k_base, v_base)
            out_base = _head(out, batch, head)
            starts = indptr[head * queries :]
            block = begin
            while block < end:
                stop = _block_end(block, end, starts, offsets, capacity)
                for p in range(block, stop):
                    count = starts[p + 1] - starts[p]
                    at = scores.ctypes.data + _BYTES * offsets[p - block]
                    query = scaled(load_row(q_base + order[head, p] * q[3], key_dim), scale)
                    _dots(query, k_base, k_pitch, columns, starts[p], count, at)
                for p in range(block, stop):
                    count = starts[p + 1] - starts[p]
                    top, share = np.float32(0.0), np.float32(0.0)
                    if count:
                        at = scores.ctypes.data + _BYTES * offsets[p - block]
                        top, share = _exponentials(at, count)
                    i = order[head, p]
                    sums[batch, head, i, 0], sums[batch, head, i, 1] = top, share
                for p in range(block, stop):
                    i, first, place = order[head, p], starts[p], offsets[p - block]
                    mixed = zero_row(value_dim)
                    for t in range(starts[p + 1] - first):
                        at = v_base + v_pitch * columns[first + t]
                        mixed = plus_scaled_at(mixed, scores[place + t], at)
                    store_row(out_base + i * out[3], scaled(mixed, sums[batch, head, i, 1]))
                block = stop

    return forward


def _backward(key_dim: int, value_dim: int) -> Callable:
    """The compiled backward for these lengths of a row.

    With P the probabilities and dP = dO V^T: dV = P^T dO, dS = P (dP - rowsum(dO O)),
    dQ = scale dS K, dK = scale dS^T Q. One head of one image is one task, so that its
    keys' gradients are summed in one order.
    """
    source = _SOURCE

    def backward(
        items, heads, parts, order, indptr, columns, keys, room,
        q, k, v, out, grad, dq, dk, dv, sums, scale,
    ):  # fmt: skip
        if source < 0:
            return
        queries = order.shape[1]
        capacity = max(_CAPACITY, _padded(np.max(np.diff(indptr))))
        weights = np.empty(capacity, np.float32)
        slopes = np.empty(capacity, np.float32)
        offsets = np.empty(_BLOCK, np.int64)
        k_pitch, v_pitch = _pitch(key_dim), _pitch(value_dim)
        k_base = (room.ctypes.data + 63) // 64 * 64
        v_base = k_base + keys * k_pitch
        packed = -1
        for item in range(items[0], items[1]):
            batch, head, begin, end = _task(item, heads, parts, queries)
            q_base = _head(q, batch, head)
            if packed != item // parts:
                packed = item // parts
                _pack_head(k, v, batch, head, keys, key_dim, value_dim, k_base, v_base)
            out_base = _head(out, batch, head)
            grad_base = _head(grad, batch, head)
            dq_base = _head(dq, batch, head)
            dk_base = _head(dk, batch, head)
            dv_base = _head(dv, batch, head)
            starts = indptr[head * queries :]
            block = begin
            while block < end:
                stop = _block_end(block, end, starts, offsets, capacity)
                for p in range(block, stop):
                    i, first = order[head, p], starts[p]
                    count, place = starts[p + 1] - first, _BYTES * offsets[p - block]
                    query = scaled(load_row(q_base + i * q[3], key_dim), scale)
                    # Both rows before both products: else the whole takes some 5 % longer.
                    slope = load_row(grad_base + i * grad[3], value_dim)
                    at = weights.ctypes.data + place
                    _dots(query, k_base, k_pitch, columns, first, count, at)
                    at = slopes.ctypes.data + place
                    _dots(slope, v_base, v_pitch, columns, first, count, at)
                for p in range(block, stop):
                    i, place = order[head, p], _BYTES * offsets[p - block]
                    slope = load_row(grad_base + i * grad[3], value_dim)
                    delta = row_dot(slope, out_base + i * out[3])
                    top, share = sums[batch, head, i, 0], sums[batch, head, i, 1]
                    _score_slopes(
                        weights.ctypes.data + place, slopes.ctypes.data + place,
                        starts[p + 1] - starts[p], top, share, delta,
                    )  # fmt: skip
                for p in range(block, stop):
                    i, first, place = order[head, p], starts[p], offsets[p - block]
                    query = scaled(load_row(q_base + i * q[3], key_dim), scale)
                    slope = load_row(grad_base + i * grad[3], value_dim)
                    moved = zero_row(key_dim)
                    for t in range(starts[p + 1] - first):
                        column = columns[first + t]
                        moved = plus_scaled_at(moved, slopes[place + t], k_base + k_pitch * column)
                        add_scaled(dk_base + dk[3] * column, slopes[place + t], query)
                        add_scaled(dv_base + dv[3] * column, weights[place + t], slope)
                    store_row(dq_base + i * dq[3], scaled(moved, scale))
                block = stop

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
    """(output [batch, heads, queries, value_dim] of q's dtype; float32 [batch, heads,
    queries, 2], each query's largest score and 1 / its sum of exponentials of the distance
    from that, for the backward). All are 0 for a query that keeps nothing. Shapes and
    arrays must be right: they are not checked.
    """
    dtype = q.dtype
    q, k, v = (_readable(tensor) for tensor in (q, k, v))
    batch, heads, queries, key_dim = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
    sums = q.new_empty(batch, heads, queries, 2)
    arrays = (order.numpy(), indptr.numpy(), columns.numpy())
    rows = (_place(q), _place(k), _place(v), _place(out))
    function = _compiled(_forward, key_dim, v.shape[-1])
    parts = min(queries, max(1, 4 * torch.get_num_threads() // max(1, batch * heads)))

    def work(items: tuple[int, int]) -> None:
        room = _room(k.shape[2], key_dim, v.shape[-1])
        function(
            items, heads, parts, *arrays, k.shape[2], room, *rows, sums.numpy(), np.float32(scale)
        )

    spread(work, batch, heads, parts, arrays[1])
    return out.to(dtype), sums


def run_backward(
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
    """Gradients of q, k and v, of their dtype, contiguous; the same in every run."""
    dtype = q.dtype
    grad, q, k, v, out = (_readable(tensor) for tensor in (grad, q, k, v, out))
    batch, heads, _, key_dim = q.shape
    grad_q = q.new_empty(q.shape)
    grad_k = q.new_zeros(k.shape)
    grad_v = q.new_zeros(v.shape)
    arrays = (order.numpy(), indptr.numpy(), columns.numpy())
    rows = tuple(_place(tensor) for tensor in (q, k, v, out, grad, grad_q, grad_k, grad_v))
    function = _compiled(_backward, key_dim, v.shape[-1])
    sums_array = sums.contiguous().numpy()

    def work(items: tuple[int, int]) -> None:
        room = _room(k.shape[2], key_dim, v.shape[-1])
        function(items, heads, 1, *arrays, k.shape[2], room, *rows, sums_array, np.float32(scale))

    spread(work, batch, heads, 1, arrays[1])
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


def _room(keys: int, key_dim: int, value_dim: int) -> np.ndarray:
    """Memory in which a thread packs a head's keys and values."""
    row = _pitch.py_func(key_dim) + _pitch.py_func(value_dim)
    return np.empty(keys * row // _BYTES + LANES, np.float32)


def _readable(tensor: Tensor) -> Tensor:
    """Float32 whose rows are unbroken; no copy where it is that already."""
    tensor = tensor.detach().to(torch.float32)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _place(tensor: Tensor) -> np.ndarray:
    """Address and the strides in bytes of batch, head and token."""
    strides = tensor.stride()[:3]
    return np.array([tensor.data_ptr(), *(_BYTES * s for s in strides)], dtype=np.int64)
