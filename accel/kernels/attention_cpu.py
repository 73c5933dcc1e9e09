"""Attention under a fixed mask on a CPU: compiled loops over the kept entries alone.

One call of a compiled function does some heads of some images; `run_forward` and
`run_backward` spread those over threads. A query's kept keys are a list, so scores, softmax
and product touch nothing else. The plan's order of queries puts those that share keys next
to each other: their keys and values are then in the cache, packed there a head at a time.
Arithmetic is float32, memory is named by address, in bytes.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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


_HEADS = np.dtype([(name, np.int64) for name in ("base", "image", "head", "token")])
"""Where a tensor [batch, heads, tokens, dim] lies: its address and strides, in bytes."""

_FORWARD = np.dtype([(name, _HEADS) for name in ("q", "k", "v", "out")])
_BACKWARD = np.dtype(
    [(name, _HEADS) for name in ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v")]
)
"""The tensors of a call, by name. As arrays of one record they reach a compiled function in
half the time that named tuples take."""


class Rows(NamedTuple):
    """Where the rows of one head lie: the first one's address and the stride, in bytes."""

    base: int
    stride: int


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
def _rows(heads, image, head):
    return Rows(heads.base + image * heads.image + head * heads.head, heads.token)


@njit(inline="always")
def _at(rows, i):
    """The address of row ``i``."""
    return rows.base + rows.stride * i


@njit(inline="always")
def _pack(source, count, length, target):
    """Copy a head's rows next to each other. Rows a large power of two apart, as a packed
    projection's are, share few cache sets: gathering from there takes up to twice as long."""
    for row in range(count):
        store_row(_at(target, row), load_row(_at(source, row), length))


@njit(inline="always")
def _padded(count):
    return (count + LANES - 1) // LANES * LANES


@njit(inline="always")
def _block_end(position, end, starts, places, capacity):
    """Last + 1 of the queries that fit a block; where their scores begin goes to ``places``."""
    used = 0
    stop = position
    while stop < end and stop < position + _BLOCK:
        padded = _padded(starts[stop + 1] - starts[stop])
        if used + padded > capacity:
            break
        places[stop - position] = used
        used += padded
        stop += 1
    return stop


@njit(inline="always")
def _dots(row, rows, columns, first, count, target):
    """Dot products of ``row`` with the ``rows`` that ``columns`` names, in fours: up to three
    behind the last are its repetition."""
    last = count - 1
    for t in range(0, count, 4):
        store_dots(
            target + _BYTES * t,
            row,
            _at(rows, columns[first + t]),
            _at(rows, columns[first + min(t + 1, last)]),
            _at(rows, columns[first + min(t + 2, last)]),
            _at(rows, columns[first + min(t + 3, last)]),
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


@njit(inline="always")
def _forward_task(
    position, end, order, starts, columns, q, k, v, out, sums, scores, places, scale,
    key_dim, value_dim,
):  # fmt: skip
    """Outputs of the queries at positions up to ``end`` of a head; k and v are packed."""
    scores_at = scores.ctypes.data
    while position < end:
        stop = _block_end(position, end, starts, places, len(scores))
        for p in range(position, stop):
            query = scaled(load_row(_at(q, order[p]), key_dim), scale)
            at = scores_at + _BYTES * places[p - position]
            _dots(query, k, columns, starts[p], starts[p + 1] - starts[p], at)
        for p in range(position, stop):
            count = starts[p + 1] - starts[p]
            top, share = np.float32(0.0), np.float32(0.0)
            if count:
                top, share = _exponentials(scores_at + _BYTES * places[p - position], count)
            sums[order[p], 0], sums[order[p], 1] = top, share
        for p in range(position, stop):
            i, start, place = order[p], starts[p], places[p - position]
            mixed = zero_row(value_dim)
            for t in range(starts[p + 1] - start):
                mixed = plus_scaled_at(mixed, scores[place + t], _at(v, columns[start + t]))
            store_row(_at(out, i), scaled(mixed, sums[i, 1]))
        position = stop


@njit(inline="always")
def _backward_task(
    position, end, order, starts, columns, q, k, v, out, grad, grad_q, grad_k, grad_v, sums,
    weights, slopes, places, scale, key_dim, value_dim,
):  # fmt: skip
    """Gradients by a head's queries, and what they add to those of its keys and values; k and
    v are packed.

    With P the probabilities and dP = dO V^T: dV = P^T dO, dS = P (dP - rowsum(dO O)),
    dQ = scale dS K, dK = scale dS^T Q.
    """
    weights_at, slopes_at = weights.ctypes.data, slopes.ctypes.data
    while position < end:
        stop = _block_end(position, end, starts, places, len(weights))
        for p in range(position, stop):
            count, place = starts[p + 1] - starts[p], _BYTES * places[p - position]
            query = scaled(load_row(_at(q, order[p]), key_dim), scale)
            # Both rows before both products: else the whole takes some 5 % longer.
            slope = load_row(_at(grad, order[p]), value_dim)
            _dots(query, k, columns, starts[p], count, weights_at + place)
            _dots(slope, v, columns, starts[p], count, slopes_at + place)
        for p in range(position, stop):
            i, place = order[p], _BYTES * places[p - position]
            delta = row_dot(load_row(_at(grad, i), value_dim), _at(out, i))
            count, top, share = starts[p + 1] - starts[p], sums[i, 0], sums[i, 1]
            _score_slopes(weights_at + place, slopes_at + place, count, top, share, delta)
        for p in range(position, stop):
            i, start, place = order[p], starts[p], places[p - position]
            query = scaled(load_row(_at(q, i), key_dim), scale)
            slope = load_row(_at(grad, i), value_dim)
            moved = zero_row(key_dim)
            for t in range(starts[p + 1] - start):
                column = columns[start + t]
                moved = plus_scaled_at(moved, slopes[place + t], _at(k, column))
                add_scaled(_at(grad_k, column), slopes[place + t], query)
                add_scaled(_at(grad_v, column), weights[place + t], slope)
            store_row(_at(grad_q, i), scaled(moved, scale))
        position = stop


def _loop(backward: bool, key_dim: int, value_dim: int) -> Callable:
    """The loop over the items of a forward or a backward, for these lengths of a row.

    ``lies`` is one record of `_FORWARD` or `_BACKWARD`, ``room`` what `_room` gives. In a
    backward one head of one image is one item, so that its keys' gradients are summed in
    one order.
    """
    source = _SOURCE

    def loop(items, heads, parts, order, indptr, columns, keys, room, lies, sums, scale):
        if source < 0:
            return
        tensors = lies[0]
        queries = order.shape[1]
        capacity = max(_CAPACITY, _padded(np.max(np.diff(indptr))))
        scores, places = np.empty(capacity, np.float32), np.empty(_BLOCK, np.int64)
        k = Rows((room.ctypes.data + 63) // 64 * 64, _pitch(key_dim))
        v = Rows(_at(k, keys), _pitch(value_dim))
        packed = -1
        for item in range(items[0], items[1]):
            image, head, begin, end = _task(item, heads, parts, queries)
            if packed != item // parts:
                packed = item // parts
                _pack(_rows(tensors.k, image, head), keys, key_dim, k)
                _pack(_rows(tensors.v, image, head), keys, value_dim, v)
            q, out = _rows(tensors.q, image, head), _rows(tensors.out, image, head)
            starts = indptr[head * queries :]
            if backward:
                _backward_task(
                    begin, end, order[head], starts, columns, q, k, v, out,
                    _rows(tensors.grad, image, head), _rows(tensors.grad_q, image, head),
                    _rows(tensors.grad_k, image, head), _rows(tensors.grad_v, image, head),
                    sums[image, head], scores, np.empty(capacity, np.float32), places, scale,
                    key_dim, value_dim,
                )  # fmt: skip
            else:
                _forward_task(
                    begin, end, order[head], starts, columns, q, k, v, out,
                    sums[image, head], scores, places, scale, key_dim, value_dim,
                )  # fmt: skip

    return loop


@functools.cache
def _compiled(backward: bool, key_dim: int, value_dim: int) -> Callable:
    function = _loop(backward, key_dim, value_dim)
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
    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
    sums = q.new_empty(batch, heads, queries, 2)
    plan = (order.numpy(), indptr.numpy(), columns.numpy())
    parts = min(queries, max(1, 4 * torch.get_num_threads() // max(1, batch * heads)))
    tensors = np.array([tuple(_heads(tensor) for tensor in (q, k, v, out))], _FORWARD)
    _spread(tensors, q.shape, v.shape, plan, sums, scale, parts)
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
    grad_q = q.new_empty(q.shape)
    grad_k = q.new_zeros(k.shape)
    grad_v = q.new_zeros(v.shape)
    plan = (order.numpy(), indptr.numpy(), columns.numpy())
    tensors = (q, k, v, out, grad, grad_q, grad_k, grad_v)
    tensors = np.array([tuple(_heads(tensor) for tensor in tensors)], _BACKWARD)
    _spread(tensors, q.shape, v.shape, plan, sums.contiguous(), scale, parts=1)
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


def _spread(
    tensors: np.ndarray,
    q_shape: torch.Size,
    v_shape: torch.Size,
    plan: tuple[np.ndarray, np.ndarray, np.ndarray],
    sums: Tensor,
    scale: float,
    parts: int,
) -> None:
    """Run the compiled loop over all heads of all images, ``parts`` of each, in threads."""
    batch, heads, _, key_dim = q_shape
    keys, value_dim = v_shape[2:]
    function = _compiled(tensors.dtype == _BACKWARD, key_dim, value_dim)
    sums_array = sums.numpy()

    def work(items: tuple[int, int]) -> None:
        room = _room(keys, key_dim, value_dim)
        function(items, heads, parts, *plan, keys, room, tensors, sums_array, np.float32(scale))

    spread(work, batch, heads, parts, plan[1])


def _room(keys: int, key_dim: int, value_dim: int) -> np.ndarray:
    """Memory in which a thread packs a head's keys and values."""
    row = _pitch.py_func(key_dim) + _pitch.py_func(value_dim)
    return np.empty(keys * row // _BYTES + LANES, np.float32)


def _readable(tensor: Tensor) -> Tensor:
    """Float32 whose rows are unbroken; no copy where it is that already."""
    tensor = tensor.detach().to(torch.float32)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _heads(tensor: Tensor) -> tuple[int, ...]:
    """The fields of `_HEADS`."""
    return tensor.data_ptr(), *(_BYTES * stride for stride in tensor.stride()[:3])
