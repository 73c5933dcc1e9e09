"""The deformable operator on the CPU: compiled loops, forward and backward.

One task is one group of one image. It copies the group's channels into a buffer with two
rows and columns of zeros around them, so that a sample outside the map reads zeros like
any other and needs no test. Positions are kept as a whole pixel and an offset from it:
float32 then errs by what the offset loses, not by what the pixel's number loses. No two
tasks write to one place, so results are the same whatever the number of threads.
"""

from __future__ import annotations

import itertools
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .deform_shapes import Geometry
from .deform_vectors import VECTOR_BYTES, copy, mix, spread
from .threads import share_out

BORDER = 2
"""Rows and columns of zeros around the map: a sample reads its pixel and the next."""

CHUNK = 16
"""Output points whose positions are worked out at a time."""

_SOURCE = zlib.crc32(Path(__file__).with_name("deform_vectors.py").read_bytes())
"""Numba's cache looks at this file and at what a function closes over; so the loops close
over this, in a test that never holds."""


def forward(value: Tensor, offset: Tensor, weight: Tensor | None, geometry: Geometry) -> Tensor:
    """The operator's output, [batch, rows, columns, channels] in the type of ``value``.

    Without ``weight`` offset is DCNv4's merged tensor. Half types are computed in float32.
    """
    arrays = _arrays(value, offset, weight, geometry)
    out = torch.empty(*offset.shape[:3], value.shape[-1], dtype=_exact(value))
    frame = _frame(geometry, offset, weight, value)
    tasks = value.shape[0] * geometry.groups
    parts = min(offset.shape[1], -(-torch.get_num_threads() // max(tasks, 1)))
    flat = out.flatten(0, 2).numpy()
    _in_parallel(lambda *ends: _forward(*arrays, flat, frame, parts, *ends), tasks * parts)
    return out.to(value.dtype)


def backward(
    grad: Tensor, value: Tensor, offset: Tensor, weight: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of value, offset and weight (None without it), given that of the output."""
    arrays = _arrays(value, offset, weight, geometry)
    by_value = torch.empty(value.shape, dtype=_exact(value))
    by_offset = torch.empty(offset.shape, dtype=_exact(value))
    by_weight = None if weight is None else torch.empty(weight.shape, dtype=_exact(value))
    if weight is None:
        by_offset[..., 3 * geometry.groups * geometry.samples :] = 0
    out = by_offset if by_weight is None else by_weight
    grads = by_value.numpy(), by_offset.flatten(0, 2).numpy(), out.flatten(0, 2).numpy()
    given, frame = _plain(grad.flatten(0, 2)), _frame(geometry, offset, weight, value)
    _in_parallel(
        lambda *ends: _backward(given, *arrays, *grads, frame, *ends),
        value.shape[0] * geometry.groups,
    )
    by_weight = None if by_weight is None else by_weight.to(value.dtype)
    return by_value.to(value.dtype), by_offset.to(value.dtype), by_weight


def _exact(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _plain(tensor: Tensor) -> np.ndarray:
    """Contiguous, in float32 or float64."""
    return tensor.detach().to(_exact(tensor)).contiguous().numpy()


def _arrays(
    value: Tensor, offset: Tensor, weight: Tensor | None, geometry: Geometry
) -> tuple[np.ndarray, ...]:
    """Value, offset and weight rows of one output point each, lattice."""
    rows = _plain(offset.flatten(0, 2))
    weights = rows if weight is None else _plain(weight.flatten(0, 2))
    lattice = np.array(geometry.lattice, rows.dtype)
    return _plain(value), rows, weights, lattice


def _frame(geometry: Geometry, offset: Tensor, weight: Tensor | None, value: Tensor) -> tuple:
    """The operator's numbers as the loops take them.

    Group g of a point has its offsets at g * offset_step of its row of offsets, and its
    weights at weight_start + g * weight_step of its row of weights.
    """
    scale = np.float64 if value.dtype == torch.float64 else np.float32
    samples = geometry.samples
    steps = (3 * samples, 2 * samples, 3 * samples) if weight is None else (2 * samples, 0, samples)
    return (
        geometry.stride,
        geometry.first,
        geometry.groups,
        scale(geometry.offset_scale),
        tuple(offset.shape[1:3]),
        *steps,
    )


def _in_parallel(run: Callable[[int, int], None], tasks: int) -> None:
    """``run(first, last)`` over all tasks, split over PyTorch's number of threads."""
    threads = min(torch.get_num_threads(), tasks)
    if threads <= 1:
        run(0, tasks)
        return
    ends = [tasks * i // threads for i in range(threads + 1)]
    share_out(lambda ends: run(*ends), deque(itertools.pairwise(ends)), threads)


def _cached(function: Callable) -> Callable:
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder that can be written
        return njit(**options)(function)


_inlined = njit(nogil=True, error_model="numpy", fastmath={"contract"}, inline="never")


@_inlined
def _padded(channels, value):
    lanes = VECTOR_BYTES // value.itemsize
    return -(-channels // lanes) * lanes


@_inlined
def _copy_in(value, image, start, channels, width, buffer):
    """Channels start.. of an image into the middle of the zeros of ``buffer``."""
    _, rows, columns, all_channels = value.shape
    for y in range(rows):
        for x in range(columns):
            place = ((y + BORDER) * (columns + 2 * BORDER) + x + BORDER) * width
            pixel = ((image * rows + y) * columns + x) * all_channels
            copy(buffer, place, value, pixel + start, channels)


@_inlined
def _copy_out(buffer, image, start, channels, width, value):
    """The middle of ``buffer`` into channels start.. of an image."""
    _, rows, columns, all_channels = value.shape
    for y in range(rows):
        for x in range(columns):
            place = ((y + BORDER) * (columns + 2 * BORDER) + x + BORDER) * width
            pixel = ((image * rows + y) * columns + x) * all_channels
            copy(value, pixel + start, buffer, place, channels)


class Samples(NamedTuple):
    """What is known of the samples of up to `CHUNK` output points, one after the other."""

    lattice: np.ndarray  # (x, y) of each from its point's middle, for offset_scale 1
    along: np.ndarray  # pixels from the chunk's first point to its own
    shift: np.ndarray  # (dx, dy) of each
    weight: np.ndarray
    pixel: np.ndarray  # cell of the bordered map above and left of it
    part: np.ndarray  # (x, y) from there to it
    share: np.ndarray  # of its four values, weight included


@_inlined
def _samples(lattice, stride):
    """Room for `CHUNK` points, and what all chunks have in common."""
    count, kind = lattice.shape[0] * CHUNK, lattice.dtype
    common = np.empty(2 * count, kind)
    along = np.empty(count, np.int32)
    for t in range(count):
        common[2 * t] = lattice[t % lattice.shape[0], 0]
        common[2 * t + 1] = lattice[t % lattice.shape[0], 1]
        along[t] = t // lattice.shape[0] * stride
    return Samples(
        common,
        along,
        np.empty(2 * count, kind),
        np.empty(count, kind),
        np.empty(count, np.int32),
        np.empty(2 * count, kind),
        np.empty(4 * count, kind),
    )


@_inlined
def _read(offset, weight, point, count, at_offset, at_weight, each, samples):
    """Offsets and weights of ``count`` points, ``each`` samples a point."""
    for p in range(count):
        row = point + p
        copy(samples.shift, 2 * p * each, offset, row * offset.shape[1] + at_offset, 2 * each)
        copy(samples.weight, p * each, weight, row * weight.shape[1] + at_weight, each)


@_inlined
def _place(samples, count, base_x, base_y, scale, rows, columns):
    """Find pixel, part and share of the first ``count`` samples.

    The base is the pixel under the kernel's middle for the chunk's first point. A place
    that is no number gives shares that are none.
    """
    lattice, along, shift, weight, pixel, part, share = samples
    kind = shift.dtype.type
    low_y, high_y = kind(-BORDER - base_y), kind(rows - base_y)
    wide, at_y = np.int32(columns + 2 * BORDER), np.int32(base_y + BORDER)
    first, end = np.int32(base_x), np.int32(columns)
    border = np.int32(BORDER)
    for t in range(count):
        base = first + along[t]
        low_x, high_x = kind(-border - base), kind(end - base)
        x = scale * (lattice[2 * t] + shift[2 * t])
        y = scale * (lattice[2 * t + 1] + shift[2 * t + 1])
        x = low_x if x < low_x else x
        y = low_y if y < low_y else y
        x = high_x if x > high_x else x
        y = high_y if y > high_y else y
        left = np.floor(x if x > low_x else low_x)
        top = np.floor(y if y > low_y else low_y)
        x -= left
        y -= top
        pixel[t] = (np.int32(top) + at_y) * wide + np.int32(left) + base + border
        part[2 * t] = x
        part[2 * t + 1] = y
        below = y * weight[t]
        above = weight[t] - below
        share[4 * t] = above - above * x
        share[4 * t + 1] = above * x
        share[4 * t + 2] = below - below * x
        share[4 * t + 3] = below * x


@_inlined
def _slopes(samples, count, dots, scale):
    """Into shift and weight go the loss's slopes by them, from grad's product with corners."""
    shift, weight, part = samples.shift, samples.weight, samples.part
    for t in range(count):
        x, y = part[2 * t], part[2 * t + 1]
        top = dots[4 * t + 1] - dots[4 * t]
        bottom = dots[4 * t + 3] - dots[4 * t + 2]
        above = dots[4 * t] + x * top
        below = dots[4 * t + 2] + x * bottom
        shift[2 * t] = scale * weight[t] * (top + y * (bottom - top))
        shift[2 * t + 1] = scale * weight[t] * (below - above)
        weight[t] = above + y * (below - above)


@_inlined
def _write(samples, point, count, at_offset, at_weight, each, by_offset, by_weight):
    """The slopes of ``count`` points to where offsets and weights were read."""
    for p in range(count):
        row = point + p
        copy(by_offset, row * by_offset.shape[1] + at_offset, samples.shift, 2 * p * each, 2 * each)
        copy(by_weight, row * by_weight.shape[1] + at_weight, samples.weight, p * each, each)


def _forward_loop(source):
    @_cached
    def forward(value, offset, weight, lattice, out, frame, parts, first_task, last_task):
        """Tasks are (image, group, part of the output rows)."""
        if source < 0:
            return
        stride, first, groups, scale, out_size, offset_step, weight_start, weight_step = frame
        _, rows, columns, channels = value.shape
        each, share_of = lattice.shape[0], channels // groups
        width = _padded(share_of, value)
        line = (columns + 2 * BORDER) * width
        buffer = np.zeros((rows + 2 * BORDER) * line, value.dtype)
        mixed = np.empty(width, value.dtype)
        samples = _samples(lattice, stride[1])
        packed = -1
        for task in range(first_task, last_task):
            image, group, piece = task // parts // groups, task // parts % groups, task % parts
            at_offset, at_weight = group * offset_step, weight_start + group * weight_step
            if packed != task // parts:
                _copy_in(value, image, group * share_of, share_of, width, buffer)
                packed = task // parts
            for row in range(out_size[0] * piece // parts, out_size[0] * (piece + 1) // parts):
                base_y = row * stride[0] + first[0]
                for column in range(0, out_size[1], CHUNK):
                    count = min(CHUNK, out_size[1] - column)
                    point = (image * out_size[0] + row) * out_size[1] + column
                    base_x = column * stride[1] + first[1]
                    _read(offset, weight, point, count, at_offset, at_weight, each, samples)
                    _place(samples, count * each, base_x, base_y, scale, rows, columns)
                    for p in range(count):
                        at = (point + p) * channels + group * share_of
                        mix(
                            mixed, buffer, samples.pixel, samples.share, p * each, each, line, width
                        )
                        copy(out, at, mixed, 0, share_of)

    return forward


def _backward_loop(source):
    @_cached
    def backward(
        grad, value, offset, weight, lattice, by_value, by_offset, by_weight, frame,
        first_task, last_task,
    ):  # fmt: skip
        """Tasks are (image, group)."""
        if source < 0:
            return
        stride, first, groups, scale, out_size, offset_step, weight_start, weight_step = frame
        _, rows, columns, channels = value.shape
        each, share_of = lattice.shape[0], channels // groups
        width = _padded(share_of, value)
        line = (columns + 2 * BORDER) * width
        buffer = np.zeros((rows + 2 * BORDER) * line, value.dtype)
        grown = np.empty_like(buffer)
        given = np.zeros(width, value.dtype)
        samples = _samples(lattice, stride[1])
        dots = np.empty_like(samples.share)
        for task in range(first_task, last_task):
            image, group = task // groups, task % groups
            at_offset, at_weight = group * offset_step, weight_start + group * weight_step
            _copy_in(value, image, group * share_of, share_of, width, buffer)
            grown[:] = 0
            for row in range(out_size[0]):
                base_y = row * stride[0] + first[0]
                for column in range(0, out_size[1], CHUNK):
                    count = min(CHUNK, out_size[1] - column)
                    point = (image * out_size[0] + row) * out_size[1] + column
                    base_x = column * stride[1] + first[1]
                    _read(offset, weight, point, count, at_offset, at_weight, each, samples)
                    _place(samples, count * each, base_x, base_y, scale, rows, columns)
                    for p in range(count):
                        at = (point + p) * channels + group * share_of
                        copy(given, 0, grad, at, share_of)
                        spread(
                            given, buffer, grown, samples.pixel, samples.share, dots,
                            p * each, each, line, width,
                        )  # fmt: skip
                    _slopes(samples, count * each, dots, scale)
                    _write(samples, point, count, at_offset, at_weight, each, by_offset, by_weight)
            _copy_out(grown, image, group * share_of, share_of, width, by_value)

    return backward


_forward, _backward = _forward_loop(_SOURCE), _backward_loop(_SOURCE)
