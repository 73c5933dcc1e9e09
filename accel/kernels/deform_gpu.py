"""The deformable operator on a GPU: Triton kernels, forward and backward.

A program makes some output points of one group: it reads each offset and weight once for
all channels of the group (DCNv4, arXiv 2401.06197, section 3.3), sums in float32 and writes
once. No shape is special: sizes are arguments, tiles follow from the group's width alone.
The gradient of the map is added up atomically in float32, in no fixed order; those of
offsets and weights are sums inside one program.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deform_shapes import Geometry

LAUNCH = {"forward": {"UNROLLED": 3, "maxnreg": 96}, "backward": {"UNROLLED": 1, "maxnreg": 128}}
"""Samples that a step of the loop does, and registers allowed a thread.

Compiled for compute capability 9.0: a forward pass with three samples in flight fits
96 registers, all nine take 189 and leave half the warps. Where no limit is named ptxas aims
lower and spills a register or two.
"""

THREADS = 128
VECTOR_BYTES = 16


def forward(value: Tensor, offset: Tensor, weight: Tensor | None, geometry: Geometry) -> Tensor:
    """The operator's output, [batch, rows, columns, channels] in the type of ``value``.

    Without ``weight`` offset is DCNv4's merged tensor, which is read where it is.
    """
    value, offset = _rows(value), _rows(offset)
    weight = None if weight is None else _rows(weight)
    out = value.new_empty((*offset.shape[:3], value.shape[-1]))
    if out.numel():
        _launch(_forward, out, value, offset, weight, geometry, out)
    return out


def backward(
    grad: Tensor, value: Tensor, offset: Tensor, weight: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of value, offset and weight (None without it), given that of the output."""
    grad = grad.contiguous()
    value, offset = _rows(value), _rows(offset)
    weight = None if weight is None else _rows(weight)
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    by_value = torch.zeros(value.shape, dtype=exact, device=value.device)
    by_offset = torch.empty(offset.shape, dtype=offset.dtype, device=offset.device)
    by_weight = None if weight is None else torch.empty_like(weight, memory_format=_DENSE)
    if weight is None:
        by_offset[..., 3 * geometry.groups * geometry.samples :] = 0
    if grad.numel():
        out = by_offset if by_weight is None else by_weight
        _launch(_backward, grad, value, offset, weight, geometry, grad, by_value, by_offset, out)
    return by_value.to(value.dtype), by_offset, by_weight


_DENSE = torch.contiguous_format


def _rows(tensor: Tensor) -> Tensor:
    """With the last axis dense, as the kernels read it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def tiles(channels: int, itemsize: int) -> dict[str, int]:
    """Points and channels of a program, warps: a thread reads ``VECTOR_BYTES`` at a time."""
    wide = triton.next_power_of_2(channels)
    threads_a_point = max(1, wide * itemsize // VECTOR_BYTES)
    warps = min(8, max(THREADS, threads_a_point) // 32)
    return {"WIDE": wide, "POINTS": max(1, THREADS // threads_a_point), "num_warps": warps}


def constants(
    geometry: Geometry, channels: int, dtype: torch.dtype, merged: bool, far: bool
) -> dict[str, Any]:
    """What a kernel is compiled for, besides the types of its arguments."""
    samples, (half_y, half_x) = geometry.samples, geometry.half
    return {
        "SAMPLES": samples,
        "KERNEL_HEIGHT": geometry.kernel[0],
        "SKIPPED": samples // 2 if geometry.remove_center else samples,
        "DOWN": geometry.dilation[0],
        "ALONG": geometry.dilation[1],
        "HALF_Y": half_y,
        "HALF_X": half_x,
        "SCALE": geometry.offset_scale,
        "OFFSET_STEP": (3 if merged else 2) * samples,
        "WEIGHT_START": 2 * samples if merged else 0,
        "WEIGHT_STEP": 3 * samples if merged else samples,
        "CHANNELS": channels // geometry.groups,
        "EXACT": tl.float64 if dtype == torch.float64 else tl.float32,
        "INDEX": tl.int64 if far else tl.int32,
        **tiles(channels // geometry.groups, dtype.itemsize),
    }


def _launch(kernel, out: Tensor, value: Tensor, offset: Tensor, weight, geometry, *written) -> None:
    read = [value, offset, offset if weight is None else weight]
    batch, rows, columns, channels = out.shape
    far = max(sum(s * (n - 1) for s, n in zip(t.stride()[1:], t.shape[1:], strict=True))
              for t in (*read, *written)) >= 2**31  # fmt: skip
    compiled = constants(geometry, channels, value.dtype, weight is None, far)
    blocks = triton.cdiv(rows * columns, compiled["POINTS"])
    strides = [s for t in read for s in t.stride()[:3]]
    widths = [t.shape[-1] for t in written[2:]]
    numbers = (*geometry.stride, *geometry.first, geometry.groups)
    guard = torch.cuda.device(value.device) if value.is_cuda else nullcontext()
    with guard:
        kernel[(blocks * geometry.groups * batch,)](
            *read, *written, *strides, *widths, *value.shape[1:3], rows * columns, columns,
            *numbers, **compiled, **LAUNCH["forward" if kernel is _forward else "backward"],
        )  # fmt: skip


@triton.jit
def _block(points, groups, POINTS: tl.constexpr):
    """(first points, group, image) of this program: groups of the same points in turn."""
    group = tl.program_id(0) % groups
    rest = tl.program_id(0) // groups
    blocks = tl.cdiv(points, POINTS)
    point = (rest % blocks) * POINTS + tl.arange(0, POINTS)
    return point, group, (rest // blocks).to(tl.int64)


@triton.jit
def _start(
    VALUE, OFFSET, WEIGHT, value_image, offset_image, offset_row, offset_column,
    weight_image, weight_row, weight_column,
    points, columns, stride_y, stride_x, first_y, first_x, groups,
    OFFSET_STEP: tl.constexpr, WEIGHT_START: tl.constexpr, WEIGHT_STEP: tl.constexpr,
    CHANNELS: tl.constexpr, INDEX: tl.constexpr, WIDE: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """The points of this program, the pixels under their kernels' middles, its channels, and
    where the group's map and the points' offsets and weights begin."""
    point, group, image = _block(points, groups, POINTS)
    live = point < points
    row, column = point // columns, point % columns
    base_y, base_x = row * stride_y + first_y, column * stride_x + first_x
    channel = tl.arange(0, WIDE)
    VALUE += image * value_image + group * CHANNELS
    OFFSET += image * offset_image + group * OFFSET_STEP
    WEIGHT += image * weight_image + WEIGHT_START + group * WEIGHT_STEP
    offsets = OFFSET + (row.to(INDEX) * offset_row + column.to(INDEX) * offset_column)
    weights = WEIGHT + (row.to(INDEX) * weight_row + column.to(INDEX) * weight_column)
    return point, group, image, live, base_y, base_x, channel, VALUE, offsets, weights


@triton.jit
def _lattice(k, KERNEL_HEIGHT: tl.constexpr, SKIPPED: tl.constexpr):
    """(horizontal, vertical) index of sample ``k``, the removed centre passed over."""
    kept = k + (k >= SKIPPED)
    return kept // KERNEL_HEIGHT, kept % KERNEL_HEIGHT


@triton.jit
def _split(shift, base, size):
    """A position as its whole pixel and the rest, kept within two pixels of the map.

    A shift that is no number gives a rest that is none.
    """
    low = (-2 - base).to(shift.dtype)
    high = (size - base).to(shift.dtype)
    shift = tl.where(shift < low, low, shift)
    shift = tl.where(shift > high, high, shift)
    whole = tl.floor(tl.where(shift > low, shift, low))
    return base + whole.to(tl.int32), shift - whole


@triton.jit
def _position(
    OFFSET, live, k, base_y, base_x, height, width,
    KERNEL_HEIGHT: tl.constexpr, SKIPPED: tl.constexpr, DOWN: tl.constexpr, ALONG: tl.constexpr,
    HALF_Y: tl.constexpr, HALF_X: tl.constexpr, SCALE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Pixel above and left of sample ``k`` of every point, and how far it is past it."""
    a, b = _lattice(k, KERNEL_HEIGHT, SKIPPED)
    dx = tl.load(OFFSET + 2 * k, mask=live, other=0.0).to(EXACT)
    dy = tl.load(OFFSET + 2 * k + 1, mask=live, other=0.0).to(EXACT)
    left, part_x = _split(SCALE * ((a * ALONG - HALF_X) + dx), base_x, width)
    top, part_y = _split(SCALE * ((b * DOWN - HALF_Y) + dy), base_y, height)
    return top, left, part_y, part_x


@triton.jit
def _inside(live, top, left, height, width):
    """Which of the four values of a sample are on the map: [upper, lower] x [left, right]."""
    upper = live & (top >= 0) & (top < height)
    lower = live & (top >= -1) & (top < height - 1)
    first = (left >= 0) & (left < width)
    second = (left >= -1) & (left < width - 1)
    return upper & first, upper & second, lower & first, lower & second


@triton.jit
def _values(VALUE, place, channel, inside, CHANNELS: tl.constexpr, EXACT: tl.constexpr):
    """[points, channels] at ``place``, zero outside."""
    read = inside[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(VALUE + (place[:, None] + channel[None, :]), mask=read, other=0.0).to(EXACT)


@triton.jit
def _mixed(
    VALUE, OFFSET, WEIGHT, live, k, base_y, base_x, height, width, row_stride, column_stride,
    channel,
    KERNEL_HEIGHT: tl.constexpr, SKIPPED: tl.constexpr, DOWN: tl.constexpr, ALONG: tl.constexpr,
    HALF_Y: tl.constexpr, HALF_X: tl.constexpr, SCALE: tl.constexpr, CHANNELS: tl.constexpr,
    EXACT: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """[points, channels] of sample ``k``, times its weight."""
    top, left, y, x = _position(
        OFFSET, live, k, base_y, base_x, height, width,
        KERNEL_HEIGHT, SKIPPED, DOWN, ALONG, HALF_Y, HALF_X, SCALE, EXACT,
    )  # fmt: skip
    below = y * tl.load(WEIGHT + k, mask=live, other=0.0).to(EXACT)
    above = tl.load(WEIGHT + k, mask=live, other=0.0).to(EXACT) - below
    in00, in01, in10, in11 = _inside(live, top, left, height, width)
    place = top.to(INDEX) * row_stride + left.to(INDEX) * column_stride
    next_row = place + row_stride
    total = (above - above * x)[:, None] * _values(VALUE, place, channel, in00, CHANNELS, EXACT)
    total += (above * x)[:, None] * _values(
        VALUE, place + column_stride, channel, in01, CHANNELS, EXACT
    )
    total += (below - below * x)[:, None] * _values(VALUE, next_row, channel, in10, CHANNELS, EXACT)
    total += (below * x)[:, None] * _values(
        VALUE, next_row + column_stride, channel, in11, CHANNELS, EXACT
    )
    return total


@triton.jit
def _forward(
    VALUE, OFFSET, WEIGHT, OUT,
    value_image, value_row, value_column, offset_image, offset_row, offset_column,
    weight_image, weight_row, weight_column,
    height, width, points, columns, stride_y, stride_x, first_y, first_x, groups,
    SAMPLES: tl.constexpr, KERNEL_HEIGHT: tl.constexpr, SKIPPED: tl.constexpr,
    DOWN: tl.constexpr, ALONG: tl.constexpr, HALF_Y: tl.constexpr, HALF_X: tl.constexpr,
    SCALE: tl.constexpr, OFFSET_STEP: tl.constexpr, WEIGHT_START: tl.constexpr,
    WEIGHT_STEP: tl.constexpr, CHANNELS: tl.constexpr, UNROLLED: tl.constexpr,
    EXACT: tl.constexpr, INDEX: tl.constexpr, WIDE: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    point, group, image, live, base_y, base_x, channel, VALUE, offsets, weights = _start(
        VALUE, OFFSET, WEIGHT, value_image, offset_image, offset_row, offset_column,
        weight_image, weight_row, weight_column,
        points, columns, stride_y, stride_x, first_y, first_x, groups,
        OFFSET_STEP, WEIGHT_START, WEIGHT_STEP, CHANNELS, INDEX, WIDE, POINTS,
    )  # fmt: skip
    total = tl.zeros([POINTS, WIDE], EXACT)
    # A loop of Triton's compiler; to Python `tl.range` is no iterable.
    for k in tl.range(0, SAMPLES, loop_unroll_factor=UNROLLED):  # pyright: ignore[reportGeneralTypeIssues]
        total += _mixed(
            VALUE, offsets, weights, live, k, base_y, base_x, height, width,
            value_row, value_column, channel,
            KERNEL_HEIGHT, SKIPPED, DOWN, ALONG, HALF_Y, HALF_X, SCALE, CHANNELS, EXACT, INDEX,
        )  # fmt: skip
    place = (image * points + point) * (groups * CHANNELS) + group * CHANNELS
    written = live[:, None] & (channel < CHANNELS)[None, :]
    tl.store(OUT + (place[:, None] + channel[None, :]), total.to(OUT.dtype.element_ty), written)


@triton.jit
def _backward(
    VALUE, OFFSET, WEIGHT, GRAD, BY_VALUE, BY_OFFSET, BY_WEIGHT,
    value_image, value_row, value_column, offset_image, offset_row, offset_column,
    weight_image, weight_row, weight_column, offset_width, weight_width,
    height, width, points, columns, stride_y, stride_x, first_y, first_x, groups,
    SAMPLES: tl.constexpr, KERNEL_HEIGHT: tl.constexpr, SKIPPED: tl.constexpr,
    DOWN: tl.constexpr, ALONG: tl.constexpr, HALF_Y: tl.constexpr, HALF_X: tl.constexpr,
    SCALE: tl.constexpr, OFFSET_STEP: tl.constexpr, WEIGHT_START: tl.constexpr,
    WEIGHT_STEP: tl.constexpr, CHANNELS: tl.constexpr, UNROLLED: tl.constexpr,
    EXACT: tl.constexpr, INDEX: tl.constexpr, WIDE: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    point, group, image, live, base_y, base_x, channel, VALUE, offsets, weights = _start(
        VALUE, OFFSET, WEIGHT, value_image, offset_image, offset_row, offset_column,
        weight_image, weight_row, weight_column,
        points, columns, stride_y, stride_x, first_y, first_x, groups,
        OFFSET_STEP, WEIGHT_START, WEIGHT_STEP, CHANNELS, INDEX, WIDE, POINTS,
    )  # fmt: skip
    total_channels = groups * CHANNELS
    first = image * points  # dense outputs from here on
    own = (channel < CHANNELS)[None, :]
    output = (first + point) * total_channels + group * CHANNELS
    given = tl.load(
        GRAD + (output[:, None] + channel[None, :]), mask=live[:, None] & own, other=0.0
    ).to(EXACT)
    BY_VALUE += image * height * width * total_channels + group * CHANNELS
    by_offset = BY_OFFSET + ((first + point) * offset_width + group * OFFSET_STEP)
    by_weight = BY_WEIGHT + ((first + point) * weight_width + WEIGHT_START + group * WEIGHT_STEP)
    # A loop of Triton's compiler; to Python `tl.range` is no iterable.
    for k in tl.range(0, SAMPLES, loop_unroll_factor=UNROLLED):  # pyright: ignore[reportGeneralTypeIssues]
        top, left, y, x = _position(
            offsets, live, k, base_y, base_x, height, width,
            KERNEL_HEIGHT, SKIPPED, DOWN, ALONG, HALF_Y, HALF_X, SCALE, EXACT,
        )  # fmt: skip
        weight = tl.load(weights + k, mask=live, other=0.0).to(EXACT)
        in00, in01, in10, in11 = _inside(live, top, left, height, width)
        place = top.to(INDEX) * value_row + left.to(INDEX) * value_column
        v00 = _values(VALUE, place, channel, in00, CHANNELS, EXACT)
        v01 = _values(VALUE, place + value_column, channel, in01, CHANNELS, EXACT)
        v10 = _values(VALUE, place + value_row, channel, in10, CHANNELS, EXACT)
        v11 = _values(VALUE, place + value_row + value_column, channel, in11, CHANNELS, EXACT)
        upper, lower = v01 - v00, v11 - v10
        above, below = v00 + x[:, None] * upper, v10 + x[:, None] * lower
        fall = below - above
        slope = SCALE * weight
        by_x = slope * tl.sum(given * (upper + y[:, None] * (lower - upper)), 1)
        by_y = slope * tl.sum(given * fall, 1)
        by_w = tl.sum(given * (above + y[:, None] * fall), 1)
        kind = BY_OFFSET.dtype.element_ty
        tl.store(by_offset + 2 * k, by_x.to(kind), mask=live)
        tl.store(by_offset + 2 * k + 1, by_y.to(kind), mask=live)
        tl.store(by_weight + k, by_w.to(kind), mask=live)
        dense = (top.to(INDEX) * width + left) * total_channels
        lines = width * total_channels
        low = y * weight
        high = weight - low
        _add(BY_VALUE, dense, channel, (high - high * x)[:, None] * given, in00, own)
        _add(BY_VALUE, dense + total_channels, channel, (high * x)[:, None] * given, in01, own)
        dense += lines
        _add(BY_VALUE, dense, channel, (low - low * x)[:, None] * given, in10, own)
        _add(BY_VALUE, dense + total_channels, channel, (low * x)[:, None] * given, in11, own)


@triton.jit
def _add(BY_VALUE, place, channel, grown, inside, own):
    """Add ``grown`` [points, channels] at ``place``, where it is inside."""
    where = BY_VALUE + (place[:, None] + channel[None, :])
    tl.atomic_add(where, grown, mask=inside[:, None] & own, sem="relaxed")
