"""Vector operations fused with the product before them: they take its results as they come, so
that nothing is stored and loaded between the two.

A workload is a list, and says nothing of who reads what. So sizes decide, as for `producers`: an
operation is fused when it stands right behind the product (or behind one fused with it), reads at
least as many elements as that gives, and gives as many. What it reads beyond them, such as the
residual of an add, comes from DRAM. Two kinds can be fused:

- elementwise ones (`ELEMENTWISE`): each result goes through the vector lanes on its way out;
- norms over a row (`ROW_NORMS`). Where all weights fit beside the streaming inputs, and the layout
  finishes rows stripe by stripe, two stripes of rows wait in the output buffer; else all results
  wait there; where neither fits the norm runs apart, and what stands behind it too.

The room is what the product can do without and load no byte more. What a norm reads from an
operation fused before it, such as a residual sum, is stored as well, since the next residual add
reads it again. What a norm or an activation reads from the product itself is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from ...workload import Conv, Elementwise, Gemm, Op
from ..hardware import Hardware
from ..schedule import DEFAULT, Schedule
from .array import Layout
from .operands import Product, Space, as_product, layout_of, spare_bytes

ARITHMETIC = (
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "neg",
    "abs",
    "pow",
    "square",
    "maximum",
    "minimum",
)
FUNCTIONS = ("exp", "log", "sqrt", "rsqrt", "reciprocal", "erf", "clamp", "clamp_min", "where")
RECTIFIERS = ("relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "hardtanh")
SMOOTH = ("gelu", "silu", "mish", "sigmoid", "log_sigmoid", "tanh", "softplus", "softsign")
PIECEWISE = ("hardswish", "hardsigmoid")
FIXED_AFFINE = ("batch_norm", "dropout")  # at inference
ELEMENTWISE = frozenset(ARITHMETIC + FUNCTIONS + RECTIFIERS + SMOOTH + PIECEWISE + FIXED_AFFINE)
"""Kinds whose results each need one element of what comes from the product."""

ROW_NORMS = frozenset(["layer_norm", "rms_norm", "softmax", "log_softmax"])
"""Kinds whose results each need a row of it."""


@dataclass(frozen=True)
class Epilogue:
    """What is fused with one product, for a whole batch.

    ops              in order
    waiting_elements of each: results that its last pass has still to take when the product ends
    read_elements    that they read from DRAM beyond the product's results, parameters apart
    param_elements   of their parameters
    stored_elements  of results that go to DRAM, the product's own where nothing is fused
    room_bytes       of the output buffer that results wait in
    """

    ops: tuple[Elementwise, ...]
    waiting_elements: tuple[int, ...]
    read_elements: int
    param_elements: int
    stored_elements: int
    room_bytes: int

    @classmethod
    def none(cls, op: Gemm | Conv, batch: int = 1) -> Epilogue:
        """Of ``op``, its results stored as they are."""
        return cls((), (), 0, 0, op.elements_written * batch, 0)


def epilogue(
    op: Gemm | Conv,
    after: Sequence[Elementwise],
    hardware: Hardware,
    batch: int = 1,
    schedule: Schedule = DEFAULT,
    kept_bytes: int = 0,
) -> Epilogue:
    """What of ``after``, the `vector_operations` behind ``op``, is fused with it.

    kept_bytes  of the scratchpad that hold results for the attention behind
    """
    found = Epilogue.none(op, batch)
    if schedule.vector_fusion == "apart":
        return found
    results, room = op.elements_written, _Room(op, hardware, batch, schedule, kept_bytes)
    for other in after:
        waiting = room.wait(other) if _takes(other, results) else None
        if waiting is None:
            break
        read_again = other.kind in ROW_NORMS and len(found.ops) > 0
        found = Epilogue(
            (*found.ops, other),
            (*found.waiting_elements, waiting),
            found.read_elements + (other.inputs - results) * batch,
            found.param_elements + other.params,
            found.stored_elements + (results * batch if read_again else 0),
            room.taken,
        )
    return found


def vector_operations(ops: Sequence[Op], behind: int) -> tuple[Elementwise, ...]:
    """Those that stand right behind the operation at ``behind``, one after the other."""
    found: list[Elementwise] = []
    for op in islice(ops, behind + 1, None):
        if not isinstance(op, Elementwise):
            break
        found.append(op)
    return tuple(found)


def _takes(op: Elementwise, results: int) -> bool:
    """Whether ``op`` may take as many results, by its kind and its sizes."""
    known = op.kind in ELEMENTWISE or op.kind in ROW_NORMS
    return known and op.inputs >= results and op.outputs == results


class _Room:
    """Of the output buffer, what norms may fill with results that wait: it fills as they come."""

    def __init__(
        self,
        op: Gemm | Conv,
        hardware: Hardware,
        batch: int,
        schedule: Schedule,
        kept_bytes: int,
    ) -> None:
        self.op, self.hardware, self.batch, self.schedule = op, hardware, batch, schedule
        self.kept_bytes, self.taken = kept_bytes, 0
        self.product: Product = as_product(op, batch)
        self.layout: Layout = layout_of(self.product, hardware, schedule)

    def wait(self, op: Elementwise) -> int | None:
        """Elements that ``op`` has still to take when the product ends; None where it finds no
        room."""
        product, layout = self.product, self.layout
        if op.kind in ELEMENTWISE:
            return min(self.hardware.macs, product.output_elements)
        left = self._left()
        if self._by_rows():
            stripe = layout.stripe * product.n
            need = 2 * stripe * self.hardware.operand_bytes
            if need <= left and self._holds_weights(self.kept_bytes + self.taken + need):
                self.taken += need
                return stripe
        need = product.output_elements * self.hardware.operand_bytes
        if need > left:
            return None
        self.taken += need
        return product.output_elements

    def _by_rows(self) -> bool:
        """Whether the product's rows are those of the norm, and finished stripe by stripe."""
        turned_inside_out = isinstance(self.op, Conv) and self.op.transposed
        one = self.product.count == 1 and not turned_inside_out
        return one and self.layout.stripe < self.product.m

    def _holds_weights(self, taken: int) -> bool:
        """Whether all weights stay beside the streaming inputs, ``taken`` bytes apart: rows are
        then finished one after the other, and no weight is loaded twice."""
        space = Space.of(self.product, self.layout, self.hardware, self.schedule)
        weights = self.product.weight_elements * self.hardware.operand_bytes
        return space.panels(weights, taken) == 1

    def _left(self) -> int:
        """Bytes, beside partial sums and what is taken already."""
        hardware = self.hardware
        sums = self.layout.live_sums * hardware.accumulator_bytes
        left = hardware.output_buffer_bytes - sums - self.taken
        if self.schedule.scratchpad == "fixed":
            return left
        spare = spare_bytes(self.op, hardware, self.batch, self.schedule)
        return min(left, spare - self.kept_bytes - self.taken)
