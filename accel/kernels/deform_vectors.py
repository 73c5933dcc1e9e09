"""Vectors for the loops of `deform_cpu`: copies, four corners mixed, and the reverse.

Numba leaves a loop over 16 channels scalar (LLVM counts it as short); these functions write
the vector instructions out, for float32 and float64 and any number of whole vectors. Arrays
are contiguous, places and counts are in elements. Nothing here assumes that NaN or inf do
not occur.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

intrinsic: Any = extending.intrinsic  # it calls what it makes without the typing context

VECTOR_BYTES = 64
"""Rows of channels are padded to whole vectors of this width."""


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
def copy(typing, target, at, source, start, count):
    """target[at :][:count] = source[start :][:count] of flat arrays."""
    signature = types.void(target, at, source, start, count)

    def build(context, builder, signature, args):
        target, at, source, start, count = _unpacked(context, builder, signature, args)
        places = builder.gep(target, [at]), builder.gep(source, [start])
        size = signature.args[0].dtype.bitwidth // 8
        cgutils.raw_memcpy(builder, *places, count, size, align=size)
        return context.get_dummy_value()

    return signature, build


@intrinsic
def mix(typing, out, value, pixel, share, first, count, row, width):
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
def spread(typing, grad, value, by_value, pixel, share, dots, first, count, row, width):
    """The reverse of `mix`: by_value's corners grow by share * grad, and
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
