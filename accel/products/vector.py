"""Work without products: norms, activations, adds, copies on the vector lanes, and how resources
that work at once make up an operation's time."""

from __future__ import annotations

from ...workload import Deform, Elementwise, Unknown
from ..hardware import Hardware
from ..report.report import OpCost, Traffic

VECTOR_PASSES = {"layer_norm": 2, "group_norm": 2, "softmax": 3}
"""Times that the vector unit goes over its input: statistics first, then the result."""


def vector_cycles(op: Elementwise, hardware: Hardware, batch: int) -> int:
    """Of all passes over the larger of input and output, ``vector_lanes`` elements a cycle."""
    passes = VECTOR_PASSES.get(op.kind, 1)
    steps = passes * max(op.elements_read - op.params, op.elements_written) * batch
    return -(-steps // hardware.vector_lanes)


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
        kind, cycles = "unknown", 0
    elif isinstance(op, Deform):
        cycles = -(-macs // hardware.vector_lanes)
    else:
        cycles = vector_cycles(op, hardware, batch)
    traffic = (
        Traffic("activations", "dram", read, 0),
        Traffic("weights", "dram", params, 0),
        Traffic("output", "dram", 0, written),
        Traffic("activations", "buffer", read, read),
        Traffic("weights", "buffer", params, params),
        Traffic("output", "buffer", written, written),
    )
    work = {"vector": cycles, "DRAM": hardware.dram_cycles(read + params + written)}
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
