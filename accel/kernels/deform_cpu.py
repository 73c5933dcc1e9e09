"""The deformable operator on the CPU: compiled loops, forward and backward.

One task is one group of one image. It copies the group's channels into a buffer with two
rows and columns of zeros around them, so that a sample outside the map reads zeros like
any other and needs no test. Positions are kept as a whole pixel and an offset from it:
float32 then errs by what the offset loses, not by what the pixel's number loses. No two
tasks write to one place, so results are the same whatever the number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from .deform_shapes import Geometry

BORDER = 2
"""Rows and columns of zeros around the map: a sample reads its pixel and the next."""

CHUNK = 16
"""Output points whose positions are worked out at a time."""

VECTOR_BYTES = 64
"""Channels are padded to whole vectors of this width."""


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
    waiting = [_pool(threads, os.getpid()).submit(run, *ends[i : i + 2]) for i in range(1, threads)]
    run(*ends[:2])
    for future in waiting:
        future.result()


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads beside the caller's own; those of a parent do not live on in a forked child."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="sievit-deform")


def _cached(function: Callable) -> Callable:
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder that can be written
        return njit(**options)(function)


_inlined = njit(nogil=True, error_model="numpy", fastmath={"contract"}, inline="never")


# Vectors. Numba leaves a loop over 16 channels scalar (it counts as short); these write the
# vector instructions out. All arrays are contiguous, counts are in elements.


class _Lanes:
    """Builds loads, stores and products of whole vectors of one element type."""

    def __init__(self, context, builder, array_type) -> None:
        self.builder = builder
        self.element = context.get_data_type(array_type.dtype)
        self.align = context.get_abi_alignment(self.element)
        self.count = VECTOR_BYTES // (array_type.dtype.bitwidth // 8)
        self.type = ir.VectorType(self.element, self.count)
        self.zero = ir.Constant(self.type, [0.0] * self.count)

    def address(self, data, index):
        return self.builder.bitcast(self.builder.gep(data, [index]), self.type.as_pointer())

    def load(self, data, index):
        return self.builder.load(self.address(data, index), align=self.align)

    def store(self, vector, data, index) -> None:
        self.builder.store(vector, self.address(data, index), align=self.align)

    def splat(self, data, index):
        undefined = ir.Constant(self.type, ir.Undefined)
        scalar = self.builder.load(self.builder.gep(data, [index]))
        one = self.builder.insert_element(undefined, scalar, ir.IntType(32)(0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), self.count), [0] * self.count)
        return self.builder.shuffle_vector(one, undefined, lanes)

    def add_product(self, total, a, b):
        product = self.builder.fmul(a, b, flags=("contract",))
        return self.builder.fadd(total, product, flags=("contract",))

    def sum(self, vector):
        kind = ir.FunctionType(self.element, [self.element, self.type])
        bits = "f64" if isinstance(self.element, ir.DoubleType) else "f32"
        name = f"llvm.vector.reduce.fadd.v{self.count}{bits}"
        reduce = cgutils.get_or_insert_function(self.builder.module, kind, name)
        start = ir.Constant(self.element, -0.0)
        return self.builder.call(reduce, [start, vector], fastmath=("reassoc",))


def _unpacked(context, builder, signature, args):
    """Data pointers of the array arguments, the other arguments as 64-bit integers."""
    found = []
    for kind, value in zip(signature.args, args, strict=True):
        if isinstance(kind, types.Array):
            found.append(context.make_array(kind)(context, builder, value).data)
        else:
            found.append(context.cast(builder, value, kind, types.int64))
    return found


def _corner_offsets(builder, row, width):
    """Where the four values of a sample are: its pixel, the next, and those a row below."""
    return ir.IntType(64)(0), width, row, builder.add(row, width)


@intrinsic
def _mix(typing, out, value, pixel, share, first, count, row, width):
    """out[:width] = the sum over samples first.. of four corners times their shares.

    Corners of sample t start at value[pixel[t] * width], the next row ``row`` further on;
    their shares are share[4 * t :][:4].
    """
    signature = types.void(out, value, pixel, share, first, count, row, width)

    def build(context, builder, signature, args):
        out, value, pixel, share, first, count, row, width = _unpacked(
            context, builder, signature, args
        )
        lanes, long = _Lanes(context, builder, signature.args[0]), ir.IntType(64)
        total = cgutils.alloca_once(builder, lanes.type)
        corners = _corner_offsets(builder, row, width)
        step = long(lanes.count)
        with cgutils.for_range_slice(builder, long(0), width, step, intp=long) as (channel, _):
            builder.store(lanes.zero, total)
            with cgutils.for_range(builder, count, intp=long) as loop:
                sample = builder.add(first, loop.index)
                at = builder.sext(builder.load(builder.gep(pixel, [sample])), long)
                base = builder.add(builder.mul(at, width), channel)
                mixed = builder.load(total)
                for corner, away in enumerate(corners):
                    place = builder.add(builder.mul(sample, long(4)), long(corner))
                    found = lanes.load(value, builder.add(base, away))
                    mixed = lanes.add_product(mixed, lanes.splat(share, place), found)
                builder.store(mixed, total)
            lanes.store(builder.load(total), out, channel)
        return context.get_dummy_value()

    return signature, build


@intrinsic
def _spread(typing, grad, value, by_value, pixel, share, dots, first, count, row, width):
    """The reverse of `_mix`: by_value's corners grow by share * grad, and
    dots[4 * t :][:4] = the product of grad with each corner of sample t."""
    signature = types.void(
        grad, value, by_value, pixel, share, dots, first, count, row, width
    )  # fmt: skip

    def build(context, builder, signature, args):
        grad, value, by_value, pixel, share, dots, first, count, row, width = _unpacked(
            context, builder, signature, args
        )
        lanes, long = _Lanes(context, builder, signature.args[0]), ir.IntType(64)
        totals = [cgutils.alloca_once(builder, lanes.type) for _ in range(4)]
        corners = _corner_offsets(builder, row, width)
        step = long(lanes.count)
        with cgutils.for_range(builder, count, intp=long) as loop:
            sample = builder.add(first, loop.index)
            at = builder.sext(builder.load(builder.gep(pixel, [sample])), long)
            start = builder.mul(at, width)
            fourth = builder.mul(sample, long(4))
            for total in totals:
                builder.store(lanes.zero, total)
            with cgutils.for_range_slice(builder, long(0), width, step, intp=long) as (channel, _):
                given = lanes.load(grad, channel)
                for corner, away in enumerate(corners):
                    place = builder.add(builder.add(start, channel), away)
                    part = lanes.splat(share, builder.add(fourth, long(corner)))
                    grown = lanes.add_product(lanes.load(by_value, place), part, given)
                    lanes.store(grown, by_value, place)
                    dot = lanes.add_product(
                        builder.load(totals[corner]), given, lanes.load(value, place)
                    )
                    builder.store(dot, totals[corner])
            for corner, total in enumerate(totals):
                place = builder.gep(dots, [builder.add(fourth, long(corner))])
                builder.store(lanes.sum(builder.load(total)), place)
        return context.get_dummy_value()

    return signature, build


@_inlined
def _padded(channels, value):
    lanes = VECTOR_BYTES // value.itemsize
    return -(-channels // lanes) * lanes


@_inlined
def _copy_in(value, image, start, channels, width, buffer):
    """Channels start.. of an image into the middle of the zeros of ``buffer``."""
    _, rows, columns, _ = value.shape
    for y in range(rows):
        for x in range(columns):
            place = ((y + BORDER) * (columns + 2 * BORDER) + x + BORDER) * width
            for c in range(channels):
                buffer[place + c] = value[image, y, x, start + c]


@_inlined
def _copy_out(buffer, image, start, channels, width, value):
    """The middle of ``buffer`` into channels start.. of an image."""
    _, rows, columns, _ = value.shape
    for y in range(rows):
        for x in range(columns):
            place = ((y + BORDER) * (columns + 2 * BORDER) + x + BORDER) * width
            for c in range(channels):
                value[image, y, x, start + c] = buffer[place + c]


@_inlined
def _gather(offset, weight, point, count, at_offset, at_weight, samples, raw):
    """Offsets and weights of ``count`` points into raw [(x, y, weight), samples of all]."""
    t = 0
    for p in range(point, point + count):
        for k in range(samples):
            raw[0, t] = offset[p, at_offset + 2 * k]
            raw[1, t] = offset[p, at_offset + 2 * k + 1]
            raw[2, t] = weight[p, at_weight + k]
            t += 1


@_inlined
def _place(raw, lattice, base_x, base_y, scale, rows, columns, share, part, pixel):
    """Of every sample: its pixel in the buffer, how far it is past it, its corners' shares.

    raw, lattice [(x, y, ...), samples]; base_x the pixel under the kernel's middle of each
    sample, base_y of all. A place that is no number gives shares that are none.
    """
    kind = raw.dtype.type
    low_y, high_y = kind(-BORDER - base_y), kind(rows - base_y)
    wide = columns + 2 * BORDER
    for t in range(pixel.shape[0]):
        low_x, high_x = kind(-BORDER - base_x[t]), kind(columns - base_x[t])
        x = scale * (lattice[0, t] + raw[0, t])
        y = scale * (lattice[1, t] + raw[1, t])
        x = low_x if x < low_x else x
        y = low_y if y < low_y else y
        x = high_x if x > high_x else x
        y = high_y if y > high_y else y
        left = np.floor(x if x > low_x else low_x)
        top = np.floor(y if y > low_y else low_y)
        x -= left
        y -= top
        at_y = np.int32(top) + np.int32(base_y + BORDER)
        pixel[t] = at_y * np.int32(wide) + np.int32(left) + base_x[t] + np.int32(BORDER)
        part[0, t] = x
        part[1, t] = y
        below = y * raw[2, t]
        above = raw[2, t] - below
        share[4 * t] = above - above * x
        share[4 * t + 1] = above * x
        share[4 * t + 2] = below - below * x
        share[4 * t + 3] = below * x


@_inlined
def _slopes(dots, part, raw, scale, slope):
    """slope [(x, y, weight), samples] of the loss, from each corner's product with grad."""
    for t in range(slope.shape[1]):
        x, y, weight = part[0, t], part[1, t], raw[2, t]
        top = dots[4 * t + 1] - dots[4 * t]
        bottom = dots[4 * t + 3] - dots[4 * t + 2]
        above = dots[4 * t] + x * top
        below = dots[4 * t + 2] + x * bottom
        slope[0, t] = scale * weight * (top + y * (bottom - top))
        slope[1, t] = scale * weight * (below - above)
        slope[2, t] = above + y * (below - above)


@_inlined
def _repeated(lattice, times):
    """[samples, (x, y)] as [(x, y), times * samples]."""
    samples = lattice.shape[0]
    repeated = np.empty((2, times * samples), lattice.dtype)
    for t in range(times * samples):
        repeated[0, t], repeated[1, t] = lattice[t % samples, 0], lattice[t % samples, 1]
    return repeated


@_cached
def _forward(value, offset, weight, lattice, out, frame, parts, first_task, last_task):
    """Tasks are (image, group, part of the output rows)."""
    stride, first, groups, scale, out_size, offset_step, weight_start, weight_step = frame
    _, rows, columns, channels = value.shape
    samples, share_of = lattice.shape[0], channels // groups
    width = _padded(share_of, value)
    buffer = np.zeros((rows + 2 * BORDER) * (columns + 2 * BORDER) * width, value.dtype)
    line = (columns + 2 * BORDER) * width
    mixed = np.empty(width, value.dtype)
    lattice = _repeated(lattice, CHUNK)
    raw, part = (
        np.empty((3, CHUNK * samples), value.dtype),
        np.empty((2, CHUNK * samples), value.dtype),
    )
    share = np.empty(4 * CHUNK * samples, value.dtype)
    base_x, pixel = np.empty(CHUNK * samples, np.int32), np.empty(CHUNK * samples, np.int32)
    packed = -1
    for task in range(first_task, last_task):
        image, group, piece = task // parts // groups, task // parts % groups, task % parts
        start = group * share_of
        if packed != task // parts:
            _copy_in(value, image, start, share_of, width, buffer)
            packed = task // parts
        for row in range(out_size[0] * piece // parts, out_size[0] * (piece + 1) // parts):
            base_y = row * stride[0] + first[0]
            for column in range(0, out_size[1], CHUNK):
                count = min(CHUNK, out_size[1] - column)
                point = (image * out_size[0] + row) * out_size[1] + column
                _gather(
                    offset,
                    weight,
                    point,
                    count,
                    group * offset_step,
                    weight_start + group * weight_step,
                    samples,
                    raw,
                )
                for t in range(count * samples):
                    base_x[t] = (column + t // samples) * stride[1] + first[1]
                _place(
                    raw,
                    lattice,
                    base_x,
                    base_y,
                    scale,
                    rows,
                    columns,
                    share,
                    part,
                    pixel[: count * samples],
                )
                for p in range(count):
                    _mix(mixed, buffer, pixel, share, p * samples, samples, line, width)
                    for c in range(share_of):
                        out[point + p, start + c] = mixed[c]


@_cached
def _backward(
    grad,
    value,
    offset,
    weight,
    lattice,
    by_value,
    by_offset,
    by_weight,
    frame,
    first_task,
    last_task,
):
    """Tasks are (image, group)."""
    stride, first, groups, scale, out_size, offset_step, weight_start, weight_step = frame
    _, rows, columns, channels = value.shape
    samples, share_of = lattice.shape[0], channels // groups
    width = _padded(share_of, value)
    buffer = np.zeros((rows + 2 * BORDER) * (columns + 2 * BORDER) * width, value.dtype)
    grown = np.empty_like(buffer)
    line = (columns + 2 * BORDER) * width
    given = np.zeros(width, value.dtype)
    lattice = _repeated(lattice, CHUNK)
    raw, part = (
        np.empty((3, CHUNK * samples), value.dtype),
        np.empty((2, CHUNK * samples), value.dtype),
    )
    share, dots = (
        np.empty(4 * CHUNK * samples, value.dtype),
        np.empty(4 * CHUNK * samples, value.dtype),
    )
    slope = np.empty((3, CHUNK * samples), value.dtype)
    base_x, pixel = np.empty(CHUNK * samples, np.int32), np.empty(CHUNK * samples, np.int32)
    for task in range(first_task, last_task):
        image, group = task // groups, task % groups
        start, at_offset, at_weight = (
            group * share_of,
            group * offset_step,
            weight_start + group * weight_step,
        )
        _copy_in(value, image, start, share_of, width, buffer)
        grown[:] = 0
        for row in range(out_size[0]):
            base_y = row * stride[0] + first[0]
            for column in range(0, out_size[1], CHUNK):
                count = min(CHUNK, out_size[1] - column)
                point = (image * out_size[0] + row) * out_size[1] + column
                _gather(offset, weight, point, count, at_offset, at_weight, samples, raw)
                for t in range(count * samples):
                    base_x[t] = (column + t // samples) * stride[1] + first[1]
                _place(
                    raw,
                    lattice,
                    base_x,
                    base_y,
                    scale,
                    rows,
                    columns,
                    share,
                    part,
                    pixel[: count * samples],
                )
                for p in range(count):
                    for c in range(share_of):
                        given[c] = grad[point + p, start + c]
                    _spread(
                        given, buffer, grown, pixel, share, dots, p * samples, samples, line, width
                    )
                _slopes(dots, part, raw, scale, slope[:, : count * samples])
                for t in range(count * samples):
                    p, k = point + t // samples, t % samples
                    by_offset[p, at_offset + 2 * k] = slope[0, t]
                    by_offset[p, at_offset + 2 * k + 1] = slope[1, t]
                    by_weight[p, at_weight + k] = slope[2, t]
        _copy_out(grown, image, start, share_of, width, by_value)
