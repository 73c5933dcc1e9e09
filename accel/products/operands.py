"""A dense product's operands: how large they are, and what of them DRAM reads how often.

A convolution is the product of its patches and its kernel, group by group.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...workload import Conv, Gemm
from ..hardware import Hardware
from ..schedule import Schedule
from .array import Layout, laid_out


@dataclass(frozen=True)
class Product:
    """A batch of equal products as the array sees them: ``count`` times [m, k] x [k, n].

    input_elements, weight_elements and output_elements are what DRAM holds, once each.
    """

    count: int
    m: int
    n: int
    k: int
    input_elements: int
    weight_elements: int
    output_elements: int

    def layout(self, hardware: Hardware, schedule: Schedule) -> Layout:
        """On the array."""
        return laid_out(self.m, self.n, self.k, hardware, schedule, self.count)


def as_product(op: Gemm | Conv, batch: int) -> Product:
    """``op`` for ``batch`` images; a convolution through its patches, group by group."""
    outputs = op.elements_written * batch
    inputs = (op.elements_read - op.params) * batch
    if isinstance(op, Conv) and op.transposed:
        rows = op.in_size[0] * op.in_size[1] * batch
        taps = op.kernel[0] * op.kernel[1] * op.out_channels // op.groups
        inner = op.in_channels // op.groups
        return Product(op.groups, rows, taps, inner, inputs, op.params, outputs)
    if isinstance(op, Conv):
        rows = op.out_size[0] * op.out_size[1] * batch
        per_group = op.out_channels // op.groups
        return Product(op.groups, rows, per_group, op.inner, inputs, op.params, outputs)
    if op.weight:
        rows = op.rows * batch
        return Product(op.batch, rows, op.cols, op.inner, inputs, op.params, outputs)
    return Product(op.batch * batch, op.rows, op.cols, op.inner, inputs, 0, outputs)


def operand_loads(
    product: Product, hardware: Hardware, schedule: Schedule, kept_bytes: int
) -> tuple[int, int]:
    """Bytes of inputs and of weights that DRAM reads.

    One operand is held and the other is streamed past it. With four fixed buffers the held
    one takes half of those of Q, K and V, panel by panel; the half that is not read takes the
    next panel. In a shared scratchpad, with the output buffer beside it, it is held whole
    where there is room for it and for two stripes of the other; else in panels of half.
    ``kept_bytes`` of the space are taken.
    """
    width = hardware.operand_bytes
    inputs, weights = product.input_elements * width, product.weight_elements * width
    if not weights:
        return inputs, 0
    left = _Space.of(product, hardware, schedule, kept_bytes)
    held_inputs = inputs + weights * left.panels(inputs)
    held_weights = weights + inputs * left.panels(weights)
    if held_weights < held_inputs:
        return held_weights - weights, weights
    return inputs, held_inputs - inputs


def holds_weights(
    product: Product, hardware: Hardware, schedule: Schedule, kept_bytes: int
) -> bool:
    """Whether all weights fit, beside ``kept_bytes`` and stripes of the inputs: rows of the
    result can then be finished one after the other without loading a weight twice."""
    weights = product.weight_elements * hardware.operand_bytes
    return _Space.of(product, hardware, schedule, kept_bytes).panels(weights) == 1


@dataclass(frozen=True)
class _Space:
    """Bytes left for operands, and of them for what streams past one that is held whole."""

    left: int
    stripes: int

    @classmethod
    def of(
        cls, product: Product, hardware: Hardware, schedule: Schedule, kept_bytes: int
    ) -> _Space:
        space, stripes = panel_space(product, hardware, schedule)
        return cls(space - kept_bytes, stripes)

    def panels(self, held: int) -> int:
        """In which an operand of ``held`` bytes is loaded."""
        return 1 if held + self.stripes <= self.left else -(-held // max(self.left // 2, 1))


def panel_space(product: Product, hardware: Hardware, schedule: Schedule) -> tuple[int, int]:
    """(bytes for operands, of them for what streams past one that is held whole). The output
    buffer holds two tiles on their way out, or the partial sums that are alive at once."""
    space = hardware.q_buffer_bytes + hardware.k_buffer_bytes + hardware.v_buffer_bytes
    if schedule.scratchpad == "fixed":
        return space, space // 2
    sums = product.layout(hardware, schedule).live_sums * hardware.accumulator_bytes
    held = min(sums, hardware.output_buffer_bytes)
    results = max(2 * hardware.macs * hardware.operand_bytes, held)
    space += hardware.other_buffer_bytes + hardware.output_buffer_bytes - results
    return space, 2 * hardware.macs_per_line * product.k * hardware.operand_bytes


def spare_bytes(op: Gemm | Conv, hardware: Hardware, batch: int, schedule: Schedule) -> int:
    """Of the scratchpad, what ``op`` can do without and load no byte more."""
    product = as_product(op, batch)
    least = sum(operand_loads(product, hardware, schedule, 0))
    low, high = 0, panel_space(product, hardware, schedule)[0]
    while low < high:
        middle = (low + high + 1) // 2
        if sum(operand_loads(product, hardware, schedule, middle)) <= least:
            low = middle
        else:
            high = middle - 1
    return low
