"""Dense products and vector work: closed forms on the same MACs, DRAM beside them.

An array of H = lines by W = MACs a line multiplies [M, K] by [K, N] in tiles. With the
"per_tile" fill policy each tile pays the array's skew; the sums are then SCALE-Sim's
(its "reported" cycle is one less). "back_to_back" lets tiles follow each other and pays
the skew once. Operands come from DRAM and results go back to it for every operation: no
fusion is assumed, loads and stores overlap with computing.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..workload import Attention, Conv, Deform, Elementwise, Gemm, Op, Unknown, Unused
from .hardware import Hardware, schedule_of
from .report.report import OpCost, Traffic
from .schedule import DEFAULT, Schedule

VECTOR_PASSES = {"layer_norm": 2, "group_norm": 2, "softmax": 3}
"""Times that the vector unit goes over its input: statistics first, then the result."""


def array_cycles(m: int, n: int, k: int, hardware: Hardware, schedule: Schedule = DEFAULT) -> int:
    """Cycles of one product [m, k] x [k, n] by the schedule's dataflow and fill policy.

    OS keeps outputs in the array, WS the [k, n] operand, IS the [m, k] operand.
    """
    height, width = hardware.lines, hardware.macs_per_line
    schedule = schedule_of(hardware, schedule)
    dataflow = schedule.dense_dataflow
    if dataflow == "os":
        tiles, stream, skew = _ceil(m, height) * _ceil(n, width), k, height + width - 2
        between = k
    elif dataflow == "ws":
        tiles, stream, skew = _ceil(k, height) * _ceil(n, width), m, 2 * height + width - 2
        between = max(m, height)  # the next weights are loaded while this tile streams
    else:
        tiles, stream, skew = _ceil(k, height) * _ceil(m, width), n, 2 * height + width - 2
        between = max(n, height)
    if schedule.dense_fill == "per_tile":
        return tiles * (stream + skew)
    return (tiles - 1) * between + stream + skew


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
    if isinstance(op, Conv) and op.transposed:
        rows = op.in_size[0] * op.in_size[1] * batch
        inputs = (op.elements_read - op.params) * batch
        taps = op.kernel[0] * op.kernel[1] * op.out_channels // op.groups
        inner = op.in_channels // op.groups
        return Product(op.groups, rows, taps, inner, inputs, op.params, outputs)
    if isinstance(op, Conv):
        rows = op.out_size[0] * op.out_size[1] * batch
        inputs = (op.elements_read - op.params) * batch
        per_group = op.out_channels // op.groups
        return Product(op.groups, rows, per_group, op.inner, inputs, op.params, outputs)
    inputs = (op.elements_read - op.params) * batch
    if op.weight:
        rows = op.rows * batch
        return Product(op.batch, rows, op.cols, op.inner, inputs, op.params, outputs)
    return Product(op.batch * batch, op.rows, op.cols, op.inner, inputs, 0, outputs)


def product_cost(
    op: Gemm | Conv,
    hardware: Hardware,
    batch: int = 1,
    saved_output_elements: int = 0,
    encode_cycles: int = 0,
    *,
    schedule: Schedule = DEFAULT,
) -> OpCost:
    """A dense product with its loads and stores.

    saved_output_elements  of the output that an encoder keeps from DRAM
    encode_cycles          of that encoder, which runs beside the product
    """
    product = as_product(op, batch)
    width = hardware.operand_bytes
    panel = (hardware.q_buffer_bytes + hardware.k_buffer_bytes + hardware.v_buffer_bytes) // 2
    inputs, weights = product.input_elements * width, product.weight_elements * width
    # One operand is held in half the Q, K and V buffers panel by panel and the other is
    # streamed past each panel; the half that is not read takes the next panel.
    held_inputs = inputs + weights * _ceil(inputs, panel)
    held_weights = weights + inputs * _ceil(weights, panel)
    again = min(held_inputs, held_weights) if weights else inputs
    read_inputs = inputs * (again - weights) // inputs if again == held_weights else inputs
    read_weights = again - read_inputs
    stored = (product.output_elements - saved_output_elements) * width
    compute = product.count * array_cycles(product.m, product.n, product.k, hardware, schedule)
    traffic = (
        Traffic("activations", "dram", read_inputs, 0),
        Traffic("weights", "dram", read_weights, 0),
        Traffic("output", "dram", 0, stored),
        *_array_traffic(product, hardware, schedule, read_inputs, read_weights, stored),
    )
    dram = hardware.dram_cycles(read_inputs + read_weights + stored)
    work = {"MAC lines": compute, "DRAM": dram}
    if encode_cycles:
        work["encoder"] = encode_cycles
    return overlapped(op.name, "dense", work, op.macs * batch, traffic, hardware)


def operand_reads(
    m: int, n: int, k: int, hardware: Hardware, schedule: Schedule = DEFAULT
) -> tuple[int, int]:
    """Elements of the left and of the right operand that the array reads: what stays in it
    once, what streams past it once for each tile."""
    height, width = hardware.lines, hardware.macs_per_line
    again_rows, again_cols = {
        "os": (_ceil(n, width), _ceil(m, height)),
        "ws": (_ceil(n, width), 1),
        "is": (1, _ceil(m, width)),
    }[schedule_of(hardware, schedule).dense_dataflow]
    return m * k * again_rows, k * n * again_cols


def _array_traffic(
    product: Product,
    hardware: Hardware,
    schedule: Schedule,
    inputs: int,
    weights: int,
    stored: int,
) -> tuple[Traffic, ...]:
    """Buffer and array side: every tile reads its operands from the buffers."""
    left, right = operand_reads(product.m, product.n, product.k, hardware, schedule)
    rows = product.count * left * hardware.operand_bytes
    cols = product.count * right * hardware.operand_bytes
    return (
        Traffic("activations", "buffer", rows, inputs),
        Traffic("weights", "buffer", cols, weights),
        Traffic("output", "buffer", stored, stored),
        Traffic("activations", "lines", rows, 0),
        Traffic("weights", "lines", cols, 0),
    )


def vector_cost(op: Elementwise | Deform | Unknown, hardware: Hardware, batch: int = 1) -> OpCost:
    """Norms, activations, adds, copies: lanes elements a cycle, in from DRAM and out to it.

    A sampling operator does its MACs one a lane and cycle. An unknown operation is charged
    for its bytes alone.
    """
    width = hardware.operand_bytes
    params = op.params * width
    read = (op.elements_read - op.params) * width * batch
    written = op.elements_written * width * batch
    kind, macs = "vector", op.macs * batch
    if isinstance(op, Unknown):
        kind, steps = "unknown", 0
    elif isinstance(op, Deform):
        steps = macs
    else:
        passes = VECTOR_PASSES.get(op.kind, 1)
        steps = passes * max(op.elements_read - op.params, op.elements_written) * batch
    traffic = (
        Traffic("activations", "dram", read, 0),
        Traffic("weights", "dram", params, 0),
        Traffic("output", "dram", 0, written),
        Traffic("activations", "buffer", read, read),
        Traffic("weights", "buffer", params, params),
        Traffic("output", "buffer", written, written),
    )
    work = {
        "vector": _ceil(steps, hardware.vector_lanes),
        "DRAM": hardware.dram_cycles(read + params + written),
    }
    return overlapped(op.name, kind, work, macs, traffic, hardware)


def overlapped(
    name: str,
    kind: str,
    work: dict[str, int],
    macs: int,
    traffic: tuple[Traffic, ...],
    hardware: Hardware,
) -> OpCost:
    """Resources that work at once: the longest decides, after one DRAM latency.

    The cycles are booked on the first resource of ``work`` and, beyond it, as waiting for
    the longest.
    """
    first = next(iter(work))
    longest = max(work, key=lambda resource: work[resource])
    phases = {first: work[first]} if work[first] else {}
    waiting = work[longest] - work[first]
    if waiting:
        phases[f"{longest} beyond {first}"] = waiting
    if work.get("DRAM"):
        phases["DRAM latency"] = hardware.dram_latency_cycles
    cycles = sum(phases.values())
    return OpCost(name, kind, cycles, phases, macs, macs, traffic, busy=dict(work))


def op_cost(
    op: Op, hardware: Hardware, batch: int = 1, schedule: Schedule = DEFAULT
) -> OpCost | None:
    """Any operation but attention; None for what is never executed."""
    if isinstance(op, (Gemm, Conv)):
        return product_cost(op, hardware, batch, schedule=schedule)
    if isinstance(op, Unused):
        return None
    if isinstance(op, Attention):
        raise TypeError(f"op_cost takes any operation but attention, got {op.name}")
    return vector_cost(op, hardware, batch)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
