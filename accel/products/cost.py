"""What a dense product costs, with the vector operations fused with it, and any operation but
attention.

Operands come from DRAM and results go to it; loads, stores, the array and the vector lanes work
at once. Closed forms: see `array`, `operands`, `epilogue` and `vector`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ...workload import Attention, Conv, Elementwise, Gemm, Op, Unused
from ..hardware import Hardware, schedule_of
from ..report.report import OpCost, Traffic
from ..schedule import DEFAULT, Schedule
from .array import Array, Layout
from .epilogue import ROW_NORMS, Epilogue, epilogue, vector_operations
from .operands import Product, as_product, layout_of, operand_loads
from .vector import overlapped, vector_cost, vector_cycles


@dataclass(frozen=True)
class Results:
    """What becomes of a product's results before DRAM.

    saved_elements  of them that never go there: an encoder keeps them, or they stay on chip
    kept_bytes      of the scratchpad that hold results for the attention behind
    encoder_macs    of the encoder, which runs beside the product on MACs of its own
    encoder_bytes   of its weights, which DRAM gives
    """

    saved_elements: int = 0
    kept_bytes: int = 0
    encoder_macs: int = 0
    encoder_bytes: int = 0


PLAIN = Results()
"""All of them go to DRAM as they are."""


def network_costs(
    ops: Sequence[Op],
    hardware: Hardware,
    batch: int,
    schedule: Schedule,
    attention: Callable[[int], OpCost],
    results: Callable[[int], Results] = lambda index: PLAIN,
) -> Iterator[tuple[int, OpCost]]:
    """(place, cost) of each of ``ops`` that is executed, in order.

    attention  the cost of the attention call at a place
    results    what becomes of the results of the product at a place
    """
    places = iter(range(len(ops)))
    for place in places:
        op = ops[place]
        if isinstance(op, Attention):
            yield place, attention(place)
        elif isinstance(op, Gemm | Conv):
            after, made = vector_operations(ops, place), results(place)
            group = group_costs(op, after, hardware, batch, made, schedule=schedule)
            yield place, group[0]
            for fused in group[1:]:
                yield next(places), fused
        else:
            cost = op_cost(op, hardware, batch, schedule)
            if cost is not None:
                yield place, cost


def op_cost(
    op: Op, hardware: Hardware, batch: int = 1, schedule: Schedule = DEFAULT
) -> OpCost | None:
    """Any operation but attention, on its own; None for what is never executed."""
    if isinstance(op, Gemm | Conv):
        return product_cost(op, hardware, batch, schedule=schedule)
    if isinstance(op, Unused):
        return None
    if isinstance(op, Attention):
        raise TypeError(f"op_cost takes any operation but attention, got {op.name}")
    return vector_cost(op, hardware, batch)


def product_cost(
    op: Gemm | Conv,
    hardware: Hardware,
    batch: int = 1,
    results: Results = PLAIN,
    *,
    schedule: Schedule = DEFAULT,
) -> OpCost:
    """A dense product with its loads and stores, nothing fused with it."""
    return group_costs(op, (), hardware, batch, results, schedule=schedule)[0]


def group_costs(
    op: Gemm | Conv,
    after: Sequence[Elementwise],
    hardware: Hardware,
    batch: int = 1,
    results: Results = PLAIN,
    *,
    schedule: Schedule = DEFAULT,
) -> tuple[OpCost, ...]:
    """A dense product, and one cost for each operation of ``after`` that is fused with it.

    All DRAM traffic of the group is the product's. What is fused has no more of its time than
    the product leaves exposed, and says in its details what it would take apart.
    """
    schedule = schedule_of(hardware, schedule)
    fused = epilogue(op, after, hardware, batch, schedule, results.kept_bytes)
    cost = _with_epilogue(op, fused, hardware, batch, results, schedule)
    vector = [vector_cycles(other, hardware, batch) for other in fused.ops]
    exposed = _exposed(fused, vector, max(cost.busy.values()), hardware)
    rows = [
        _fused_cost(other, cost, parts, hardware, batch)
        for other, parts in zip(fused.ops, exposed, strict=True)
    ]
    hidden = sum(vector) - sum(row.cycles for row in rows)
    if fused.ops:
        cost = replace(
            cost,
            busy={**cost.busy, "vector": hidden},
            details={**cost.details, "fused": ", ".join(other.name for other in fused.ops)},
        )
    return cost, *rows


def _with_epilogue(
    op: Gemm | Conv,
    fused: Epilogue,
    hardware: Hardware,
    batch: int,
    results: Results,
    schedule: Schedule,
) -> OpCost:
    """The product alone, with all loads and stores of the group."""
    product, size = as_product(op, batch), hardware.operand_bytes
    layout = layout_of(product, hardware, schedule)
    taken = results.kept_bytes + fused.room_bytes
    inputs, weights = operand_loads(product, layout, hardware, schedule, taken)
    inputs += fused.read_elements * size
    weights += fused.param_elements * size
    stored = (fused.stored_elements - results.saved_elements) * size
    spilled = product.count * layout.spilled_sums(Array.of(hardware, schedule).room)
    spilled *= hardware.accumulator_bytes
    moved = inputs + weights + stored + 2 * spilled + results.encoder_bytes
    work = {
        "MAC lines": layout.cycles(product.count),
        "DRAM": hardware.dram_cycles(moved),
    }
    if results.encoder_macs:
        work["encoder"] = -(-results.encoder_macs // hardware.encoder_macs)
    traffic = (
        Traffic("activations", "dram", inputs, 0),
        Traffic("weights", "dram", weights, 0),
        Traffic("output", "dram", 0, stored),
        *_array_traffic(product, layout, hardware, inputs, weights, stored),
        *_partial_sums(product, layout, hardware, spilled),
        *_encoder_traffic(results),
    )
    macs = op.macs * batch + results.encoder_macs
    cost = overlapped(op.name, "dense", work, macs, traffic, hardware)
    details = {"layout": layout.summary}
    return replace(cost, codec_macs=results.encoder_macs, details=details)


def _encoder_traffic(results: Results) -> tuple[Traffic, ...]:
    loaded = results.encoder_bytes
    if not results.encoder_macs:
        return ()
    return (
        Traffic("codec weights", "dram", loaded, 0),
        Traffic("codec weights", "buffer", loaded, loaded),
    )


def _array_traffic(
    product: Product, layout: Layout, hardware: Hardware, inputs: int, weights: int, stored: int
) -> tuple[Traffic, ...]:
    """Buffer and array side: every tile reads its operands from the buffers."""
    rows = product.count * layout.left_reads * hardware.operand_bytes
    cols = product.count * layout.right_reads * hardware.operand_bytes
    return (
        Traffic("activations", "buffer", rows, inputs),
        Traffic("weights", "buffer", cols, weights),
        Traffic("output", "buffer", stored, stored),
        Traffic("activations", "lines", rows, 0),
        Traffic("weights", "lines", cols, 0),
    )


def _partial_sums(
    product: Product, layout: Layout, hardware: Hardware, spilled: int
) -> tuple[Traffic, ...]:
    """Written to the output buffer and read from it; those that do not fit go to DRAM, too."""
    size = product.count * layout.partial_sums * hardware.accumulator_bytes
    rows = [Traffic("partial sums", "dram", spilled, spilled)] if spilled else []
    if size:
        rows.append(Traffic("partial sums", "buffer", size + spilled, size + spilled))
    return tuple(rows)


def _exposed(
    fused: Epilogue, vector: Sequence[int], longest: int, hardware: Hardware
) -> list[dict[str, int]]:
    """Phases of each fused operation: what it does after the product's last results; and what the
    lanes take beyond all else, which the last ones are booked with."""
    ends = [
        min(-(-waiting // hardware.vector_lanes), cycles)
        for waiting, cycles in zip(fused.waiting_elements, vector, strict=True)
    ]
    beyond, phases = max(sum(vector) - sum(ends) - longest, 0), []
    for end, cycles in zip(reversed(ends), reversed(vector), strict=True):
        more = min(cycles - end, beyond)
        beyond -= more
        parts = {"vector": end, "vector beyond the product": more}
        phases.append({name: part for name, part in parts.items() if part})
    return phases[::-1]


def _fused_cost(
    op: Elementwise, product: OpCost, phases: dict[str, int], hardware: Hardware, batch: int
) -> OpCost:
    """Of a fused operation. A norm writes its rows to the output buffer and reads them again; an
    elementwise one takes results as they leave the array."""
    apart = vector_cost(op, hardware, batch)
    cycles, size = sum(phases.values()), op.outputs * batch * hardware.operand_bytes
    held = Traffic("output", "buffer", size, size)
    passed = Traffic("output", "lines", size, 0)
    return OpCost(
        op.name,
        "vector",
        cycles,
        phases,
        macs=0,
        kept_macs=0,
        traffic=(held if op.kind in ROW_NORMS else passed,),
        busy={"vector": cycles} if cycles else {},
        details={
            "fused_into": product.name,
            "apart_cycles": apart.cycles,
            "apart_dram_bytes": apart.dram_bytes,
        },
    )
