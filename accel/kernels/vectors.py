"""Rows of floats held in vector registers, for compiled functions (numba).

Numba leaves it to LLVM to find vectors in loops, and with a length known only at run time,
or memory that might overlap, LLVM does not. Here a row of ``length`` float32 is a value:
chunks of 16 lanes, the last one cut by a constant mask, so that any length is read and
written exactly. Memory is named by address, in bytes. Nothing here assumes that NaN or inf
do not occur; sums are taken in any order.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending
from numba.core import cgutils, types
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import register_model

intrinsic: Any = extending.intrinsic  # it calls what it makes without the typing context
_Value = Any
"""An `ir.Value`: as llvmlite is typed, one has no type and most operations give None."""
LANES = 16
_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
_CHUNK = ir.VectorType(_FLOAT, LANES)
_SUM = ("reassoc", "contract", "nsz")


class Row(types.Type):
    """The type of a row of ``length`` float32."""

    def __init__(self, length: int) -> None:
        self.length = length
        super().__init__(name=f"Row({length})")


@register_model(Row)
class _RowModel(PrimitiveModel):
    def __init__(self, manager, row: Row) -> None:
        super().__init__(manager, row, ir.ArrayType(_CHUNK, -(-row.length // LANES)))


def _chunks(length: int) -> list[tuple[int, int]]:
    """(first element, lanes in use) of each chunk."""
    return [(first, min(LANES, length - first)) for first in range(0, length, LANES)]


def _constant(kind: ir.VectorType, values: list) -> ir.Constant:
    return ir.Constant(kind, [ir.Constant(kind.element, value) for value in values])


def _splat(builder: ir.IRBuilder, value: _Value) -> _Value:
    one = builder.insert_element(ir.Constant(_CHUNK, ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(one, one, _constant(ir.VectorType(_INT, LANES), [0] * LANES))


def _lane_mask(lanes: int) -> ir.Constant:
    return _constant(ir.VectorType(ir.IntType(1), LANES), [i < lanes for i in range(LANES)])


def _pointer(builder: ir.IRBuilder, address: _Value, first: int) -> _Value:
    moved = builder.add(address, ir.Constant(address.type, 4 * first))
    return builder.inttoptr(moved, _CHUNK.as_pointer())


def _read(builder: ir.IRBuilder, address: _Value, first: int, lanes: int) -> _Value:
    pointer = _pointer(builder, address, first)
    if lanes == LANES:
        return builder.load(pointer, align=4)
    mask = _lane_mask(lanes)
    kind = ir.FunctionType(_CHUNK, [pointer.type, _INT, mask.type, _CHUNK])
    masked = cgutils.get_or_insert_function(
        builder.module, kind, f"llvm.masked.load.v{LANES}f32.p0"
    )
    return builder.call(masked, [pointer, _INT(4), mask, ir.Constant(_CHUNK, None)])


def _write(builder: ir.IRBuilder, address: _Value, first: int, lanes: int, value) -> None:
    pointer = _pointer(builder, address, first)
    if lanes == LANES:
        builder.store(value, pointer, align=4)
        return
    mask = _lane_mask(lanes)
    kind = ir.FunctionType(ir.VoidType(), [_CHUNK, pointer.type, _INT, mask.type])
    masked = cgutils.get_or_insert_function(
        builder.module, kind, f"llvm.masked.store.v{LANES}f32.p0"
    )
    builder.call(masked, [value, pointer, _INT(4), mask])


def _fma(builder: ir.IRBuilder, a: _Value, b: _Value, c: _Value) -> _Value:
    kind = ir.FunctionType(_CHUNK, [_CHUNK] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
    return builder.call(fma, [a, b, c])


def _each(builder: ir.IRBuilder, length: int, make) -> _Value:
    """A row of ``length`` whose chunks are ``make(number, first, lanes)``."""
    row = ir.Constant(ir.ArrayType(_CHUNK, -(-length // LANES)), ir.Undefined)
    for number, (first, lanes) in enumerate(_chunks(length)):
        row = builder.insert_value(row, make(number, first, lanes), number)
    return row


@intrinsic(prefer_literal=True)
def zero_row(typing, length):
    """A row of zeros; ``length`` is a constant."""
    if not isinstance(length, types.IntegerLiteral):
        return None
    size = length.literal_value

    def make(context, builder, signature, values):
        return ir.Constant(ir.ArrayType(_CHUNK, -(-size // LANES)), None)

    return Row(size)(length), make


@intrinsic(prefer_literal=True)
def load_row(typing, address, length):
    """The row at ``address``; ``length`` is a constant."""
    if not isinstance(length, types.IntegerLiteral):
        return None
    size = length.literal_value

    def make(context, builder, signature, values):
        return _each(builder, size, lambda _, first, lanes: _read(builder, values[0], first, lanes))

    return Row(size)(types.int64, length), make


@intrinsic
def store_row(typing, address, row):
    """Write ``row`` at ``address``."""

    def make(context, builder, signature, values):
        for number, (first, lanes) in enumerate(_chunks(row.length)):
            _write(builder, values[0], first, lanes, builder.extract_value(values[1], number))
        return context.get_dummy_value()

    return types.void(types.int64, row), make


@intrinsic
def scaled(typing, row, factor):
    """``row`` times a float32."""

    def make(context, builder, signature, values):
        wide = _splat(builder, values[1])
        return _each(
            builder,
            row.length,
            lambda number, *_: builder.fmul(builder.extract_value(values[0], number), wide),
        )

    return row(row, types.float32), make


@intrinsic
def plus_scaled_at(typing, row, factor, address):
    """``row`` plus ``factor`` times the row at ``address``."""

    def make(context, builder, signature, values):
        wide = _splat(builder, values[1])
        return _each(
            builder,
            row.length,
            lambda number, first, lanes: _fma(
                builder,
                _read(builder, values[2], first, lanes),
                wide,
                builder.extract_value(values[0], number),
            ),
        )

    return row(row, types.float32, types.int64), make


@intrinsic
def add_scaled(typing, address, factor, row):
    """Add ``factor`` times ``row`` to the row at ``address``."""

    def make(context, builder, signature, values):
        wide = _splat(builder, values[1])
        for number, (first, lanes) in enumerate(_chunks(row.length)):
            before = _read(builder, values[0], first, lanes)
            chunk = builder.extract_value(values[2], number)
            _write(builder, values[0], first, lanes, _fma(builder, chunk, wide, before))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, row), make


def _products(builder: ir.IRBuilder, row: _Value, length: int, address: _Value) -> _Value:
    """16 partial sums of ``row`` times the row at ``address``."""
    total = ir.Constant(_CHUNK, None)
    for number, (first, lanes) in enumerate(_chunks(length)):
        chunk = builder.extract_value(row, number)
        total = _fma(builder, chunk, _read(builder, address, first, lanes), total)
    return total


def _shuffled_sum(builder: ir.IRBuilder, a, b, left: list[int], right: list[int]) -> _Value:
    """Lanes ``left`` of a|b plus lanes ``right`` of a|b."""
    kind = ir.VectorType(_INT, len(left))
    one = builder.shuffle_vector(a, b, _constant(kind, left))
    other = builder.shuffle_vector(a, b, _constant(kind, right))
    # llvmlite makes `fadd` by a decorator that hides its argument `flags`.
    return builder.fadd(one, other, flags=_SUM)  # pyright: ignore[reportCallIssue]


@intrinsic
def store_dots(typing, target, row, a, b, c, d):
    """Write the dot products of ``row`` with the rows at four addresses, side by side.

    The four are added up together: 13 operations, where each alone would take 8.
    """

    def make(context, builder, signature, values):
        sums = [_products(builder, values[1], row.length, address) for address in values[2:]]
        low, high = [*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]
        first = _shuffled_sum(builder, sums[0], sums[1], low, high)  # 8 lanes a, 8 lanes b
        second = _shuffled_sum(builder, sums[2], sums[3], low, high)
        low = [i + base for base in (0, 8, 16, 24) for i in range(4)]
        quads = _shuffled_sum(builder, first, second, low, [i + 4 for i in low])  # 4 of each
        pairs = [i + base for base in (0, 4, 8, 12) for i in range(2)]
        twos = _shuffled_sum(builder, quads, quads, pairs, [i + 2 for i in pairs])
        ones = _shuffled_sum(builder, twos, twos, [0, 2, 4, 6], [1, 3, 5, 7])
        pointer = builder.inttoptr(values[0], ones.type.as_pointer())
        builder.store(ones, pointer, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, row, *[types.int64] * 4), make


def _reduce(builder: ir.IRBuilder, name: str, start: _Value | None, chunk: _Value, flags=()):
    arguments = [chunk] if start is None else [start, chunk]
    kind = ir.FunctionType(_FLOAT, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(
        builder.module, kind, f"llvm.vector.reduce.{name}.v{LANES}f32"
    )
    return builder.call(function, arguments, fastmath=flags)


@intrinsic
def row_dot(typing, row, address):
    """The dot product of ``row`` with the row at ``address``."""

    def make(context, builder, signature, values):
        total = _products(builder, values[0], row.length, values[1])
        return _reduce(builder, "fadd", _FLOAT(0.0), total, _SUM)

    return types.float32(row, types.int64), make


@intrinsic
def row_sum(typing, row):
    """The sum of a row of 16."""
    if row.length != LANES:
        return None

    def make(context, builder, signature, values):
        return _reduce(builder, "fadd", _FLOAT(0.0), builder.extract_value(values[0], 0), _SUM)

    return types.float32(row), make


@intrinsic
def row_max(typing, row):
    """The largest of a row of 16; NaN is passed over."""
    if row.length != LANES:
        return None

    def make(context, builder, signature, values):
        return _reduce(builder, "fmax", None, builder.extract_value(values[0], 0))

    return types.float32(row), make


@intrinsic
def larger(typing, row, other):
    """The larger of two rows, lane by lane; of a number and NaN, the number."""

    def make(context, builder, signature, values):
        kind = ir.FunctionType(_CHUNK, [_CHUNK] * 2)
        name = f"llvm.maxnum.v{LANES}f32"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return _each(
            builder,
            row.length,
            lambda number, *_: builder.call(
                function, [builder.extract_value(value, number) for value in values]
            ),
        )

    return row(row, row), make


@intrinsic
def first_lanes(typing, row, count, rest):
    """The first ``count`` lanes of a row of 16, the others ``rest``."""
    if row.length != LANES:
        return None

    def make(context, builder, signature, values):
        ints = ir.VectorType(ir.IntType(64), LANES)
        one = builder.insert_element(ir.Constant(ints, ir.Undefined), values[1], _INT(0))
        zeros = _constant(ir.VectorType(_INT, LANES), [0] * LANES)
        wide = builder.shuffle_vector(one, one, zeros)
        inside = builder.icmp_signed("<", _constant(ints, list(range(LANES))), wide)
        chunk = builder.extract_value(values[0], 0)
        chunk = builder.select(inside, chunk, _splat(builder, values[2]))
        return builder.insert_value(values[0], chunk, 0)

    return row(row, types.int64, types.float32), make


@intrinsic
def plus(typing, row, other):
    """The sum of two rows."""

    def make(context, builder, signature, values):
        return _each(
            builder,
            row.length,
            lambda number, *_: builder.fadd(
                *(builder.extract_value(value, number) for value in values)
            ),
        )

    return row(row, row), make


@intrinsic
def times_minus(typing, row, other, base):
    """``row`` times (``other`` - ``base``)."""

    def make(context, builder, signature, values):
        wide = _splat(builder, values[2])

        def chunk(number, *_):
            moved = builder.fsub(builder.extract_value(values[1], number), wide)
            return builder.fmul(builder.extract_value(values[0], number), moved)

        return _each(builder, row.length, chunk)

    return row(row, row, types.float32), make


@intrinsic
def exp_minus(typing, row, base):
    """e to the power of (row - base), for exponents up to 88; below -87.33 it is 0.

    The exponent is n ln 2 + rest, |rest| <= ln 2 / 2; the rest goes through the first seven
    terms of the series, cut off at a relative 1.2e-7. NaN stays NaN, -inf gives 0.
    """

    def make(context, builder, signature, values):
        wide = _splat(builder, values[1])
        return _each(
            builder,
            row.length,
            lambda number, *_: _exp(
                builder, builder.fsub(builder.extract_value(values[0], number), wide)
            ),
        )

    return row(row, types.float32), make


_COEFFICIENTS = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
_LEAST = -87.33
_ROUNDER = 12582912.0  # 1.5 * 2 ** 23: adding it leaves the rounded number in the last bits


def _exp(builder: ir.IRBuilder, x: _Value) -> _Value:
    def number(value: float) -> ir.Constant:
        return _constant(_CHUNK, [value] * LANES)

    ints = ir.VectorType(_INT, LANES)
    tiny = builder.fcmp_ordered("<", x, number(_LEAST))
    x = builder.select(tiny, number(_LEAST), x)
    shifted = _fma(builder, x, number(1.4426950408889634), number(_ROUNDER))
    whole = builder.fsub(shifted, number(_ROUNDER))
    rest = _fma(builder, whole, number(-0.693145751953125), x)  # ln 2 in two parts
    rest = _fma(builder, whole, number(-1.4286068203094172e-06), rest)
    result = number(_COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        result = _fma(builder, result, rest, number(coefficient))
    exponent = builder.add(builder.bitcast(shifted, ints), _constant(ints, [127] * LANES))
    power = builder.bitcast(builder.shl(exponent, _constant(ints, [23] * LANES)), _CHUNK)
    return builder.select(tiny, number(0.0), builder.fmul(result, power))
