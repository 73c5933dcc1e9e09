"""A dense systolic array of the same MACs: attention without masks, codec or sparsity.

Each head is two products in closed form (`products.array_cycles`) with the softmax unit
between them; the scores of one head run while the softmax of the one before does. Scores
stay on chip, tiled by queries where they do not fit; K and V are loaded again for each
tile where they do not fit their buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...moved import old_names
from ...workload import Attention, Workload
from ..hardware import Hardware
from ..products import array_cycles, operand_reads
from ..report.report import OpCost, Traffic
from ..schedule import DATAFLOWS, Schedule, one_of
from .simulator import Simulator, by_operation


@dataclass(frozen=True)
class Systolic:
    """dataflow  of every product: "os", "ws" (of two activations the second operand is held)
    or "is"; None: the schedule's ``dense_dataflow``. Raises ValueError for another."""

    dataflow: str | None = None

    def __post_init__(self) -> None:
        if self.dataflow is not None:
            one_of("dataflow", self.dataflow, DATAFLOWS)


def costs(
    workload: Workload, hardware: Hardware, schedule: Schedule, batch: int, method: Systolic
) -> Iterator[OpCost]:
    """The whole network in one dataflow, with the schedule's fill policy."""
    if method.dataflow is not None:
        schedule = replace(schedule, dense_dataflow=method.dataflow)
    return by_operation(
        workload,
        hardware,
        schedule,
        batch,
        lambda op: attention_cost(op, hardware, schedule, batch),
    )


def attention_cost(op: Attention, hardware: Hardware, schedule: Schedule, batch: int) -> OpCost:
    """One attention call: every entry computed."""
    heads = op.heads * op.windows * batch
    scores = array_cycles(op.queries, op.keys, op.key_dim, hardware, schedule)
    values = array_cycles(op.queries, op.value_dim, op.keys, hardware, schedule)
    softmax = -(-op.queries * op.keys // hardware.softmax_lanes)
    size = hardware.operand_bytes
    tiles = _query_tiles(op, hardware)
    keys, kept = op.keys * op.key_dim * size, op.keys * op.value_dim * size
    loads = {
        "Q": heads * op.queries * op.key_dim * size,
        "K": heads * keys * (tiles if keys > hardware.k_buffer_bytes else 1),
        "V": heads * kept * (tiles if kept > hardware.v_buffer_bytes else 1),
    }
    stored = heads * op.queries * op.value_dim * size
    dram = hardware.dram_cycles(sum(loads.values()) + stored)
    products = heads * (scores + values)
    # The last head's softmax has no other head to hide behind; its three passes and the
    # first head's loads are waited for.
    exposed = softmax + hardware.softmax_latency_cycles
    first = hardware.dram_cycles(sum(loads.values()) // heads) + hardware.dram_latency_cycles
    phases = {"sddmm": heads * scores, "spmm": heads * values, "softmax": exposed, "load": first}
    beyond = max(heads * softmax, dram) - products
    if beyond > 0:
        waited = "softmax" if heads * softmax >= dram else "load"
        phases[waited] += beyond
    macs = op.entries * batch * (op.key_dim + op.value_dim)
    return OpCost(
        op.name,
        "attention",
        sum(phases.values()),
        phases,
        macs=macs,
        kept_macs=op.kept * batch * (op.key_dim + op.value_dim),
        traffic=_traffic(op, hardware, schedule, heads, loads, stored),
        busy={"MAC lines": products, "DRAM": dram, "softmax": heads * softmax},
    )


def _traffic(
    op: Attention,
    hardware: Hardware,
    schedule: Schedule,
    heads: int,
    loads: dict[str, int],
    stored: int,
) -> tuple[Traffic, ...]:
    """Operands go to the array tile by tile; scores are written, read twice by the softmax
    unit, written as probabilities and read as the left operand of the second product."""
    size, width = hardware.operand_bytes, hardware.score_bytes
    queries, keys = operand_reads(op.queries, op.keys, op.key_dim, hardware, schedule)
    weights, values = operand_reads(op.queries, op.value_dim, op.keys, hardware, schedule)
    reads = {"Q": heads * queries * size, "K": heads * keys * size, "V": heads * values * size}
    scores, again = heads * op.queries * op.keys * width, heads * weights * width
    rows = [Traffic(name, "dram", loaded, 0) for name, loaded in loads.items()]
    rows.append(Traffic("output", "dram", 0, stored))
    rows += [Traffic(name, "buffer", reads[name], loads[name]) for name in reads]
    rows += [Traffic(name, "lines", reads[name], 0) for name in reads]
    rows += [
        Traffic("scores", "buffer", 2 * scores + again, 2 * scores),
        Traffic("scores", "lines", again, 0),
        Traffic("output", "buffer", stored, stored),
    ]
    return tuple(rows)


def _query_tiles(op: Attention, hardware: Hardware) -> int:
    """Tiles of queries whose scores fit the output buffer, two tiles at a time."""
    row = op.keys * hardware.score_bytes
    rows = hardware.output_buffer_bytes // 2 // row
    if rows == 0:
        raise ValueError(
            f"{op.name}: one row of {op.keys} scores takes {2 * row} bytes twice, "
            f"output_buffer_bytes is {hardware.output_buffer_bytes}"
        )
    return -(-op.queries // rows)


SYSTOLIC = Simulator(
    "systolic",
    costs,
    "dense, nothing pruned, the hardware's own dataflow",
    parameters=Systolic(),
)
OUTPUT_STATIONARY = Simulator(
    "systolic_os", costs, "dense, output-stationary", parameters=Systolic("os")
)
WEIGHT_STATIONARY = Simulator(
    "systolic_ws", costs, "dense, weight-stationary", parameters=Systolic("ws")
)
INPUT_STATIONARY = Simulator(
    "systolic_is", costs, "dense, input-stationary", parameters=Systolic("is")
)

__getattr__ = old_names(__name__)
