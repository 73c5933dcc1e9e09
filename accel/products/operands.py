"""A dense product's operands: how large they are, and what of them DRAM reads how often.

A convolution is the product of its patches and its kernel, group by group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ...workload import Conv, Gemm
from ..hardware import Hardware
from ..schedule import Schedule
from .array import NEAR, Array, Layout, layouts


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


@lru_cache(maxsize=4096)
def layout_of(product: Product, hardware: Hardware, schedule: Schedule) -> Layout:
    """How the schedule lays ``product`` out: what takes the array or the loads of its operands
    the least time, whichever of the two is longer; of what is near that, the fewest bytes of DRAM
    and then of the buffers."""
    array = Array.of(hardware, schedule)
    found = layouts(product.m, product.n, product.k, array)
    if len(found) == 1:
        return found[0]
    moved = {one: sum(operand_loads(product, one, hardware, schedule)) for one in found}

    def cycles(one: Layout) -> int:
        return max(one.cycles(product.count), hardware.dram_cycles(moved[one]))

    near = NEAR * min(map(cycles, found))
    return min(
        (one for one in found if cycles(one) <= near),
        key=lambda one: (moved[one], one.buffer_bytes(array), cycles(one), one.stripe),
    )


def operand_loads(
    product: Product,
    layout: Layout,
    hardware: Hardware,
    schedule: Schedule,
    kept_bytes: int = 0,
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
    space = Space.of(product, layout, hardware, schedule)
    held_inputs = inputs + weights * space.panels(inputs, kept_bytes)
    held_weights = weights + inputs * space.panels(weights, kept_bytes)
    if held_weights < held_inputs:
        return held_weights - weights, weights
    return inputs, held_inputs - inputs


@dataclass(frozen=True)
class Space:
    """Bytes for operands, and of them for what streams past one that is held whole."""

    whole: int
    stripes: int

    @classmethod
    def of(cls, product: Product, layout: Layout, hardware: Hardware, schedule: Schedule) -> Space:
        """Of a product. In a shared scratchpad the output buffer holds two tiles on their way
        out, or the partial sums that are alive at once, and operands beside them."""
        whole = hardware.q_buffer_bytes + hardware.k_buffer_bytes + hardware.v_buffer_bytes
        if schedule.scratchpad == "fixed":
            return cls(whole, whole // 2)
        sums = min(layout.live_sums * hardware.accumulator_bytes, hardware.output_buffer_bytes)
        results = max(2 * layout.tile_results * hardware.operand_bytes, sums)
        whole += hardware.other_buffer_bytes + hardware.output_buffer_bytes - results
        return cls(whole, 2 * hardware.macs_per_line * product.k * hardware.operand_bytes)

    def panels(self, held: int, kept_bytes: int) -> int:
        """In which an operand of ``held`` bytes is loaded, beside ``kept_bytes``: 1 where it stays
        whole."""
        left = self.whole - kept_bytes
        return 1 if held + self.stripes <= left else -(-held // max(left // 2, 1))


def spare_bytes(op: Gemm | Conv, hardware: Hardware, batch: int, schedule: Schedule) -> int:
    """Of the scratchpad, what ``op`` can do without and load no byte more."""
    product = as_product(op, batch)
    layout = layout_of(product, hardware, schedule)
    how = product, layout, hardware, schedule
    least = sum(operand_loads(*how))
    low, high = 0, Space.of(*how).whole
    while low < high:
        middle = (low + high + 1) // 2
        if sum(operand_loads(*how, middle)) <= least:
            low = middle
        else:
            high = middle - 1
    return low
