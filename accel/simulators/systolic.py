"""A dense systolic array of the same MACs: attention without masks, codec or sparsity.

Each head is two products in closed form (`sievit.accel.products.array`), each in its own layout
where the schedule says "best", with the softmax unit between them; the scores of one head run
while the softmax of the one before does. Scores stay on chip, tiled by queries where they do not
fit; K and V are loaded again for each tile where they do not fit their buffers. With the
schedule's ``on_chip`` "fitting" the first heads of K, Q and V stay on chip after the projection,
as many as fit: they are neither stored nor loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...checks import one_of
from ...moved import old_names
from ...workload import Attention, Workload
from ..hardware import Hardware, schedule_of
from ..products import Layout
from ..report.report import OpCost, Traffic
from ..schedule import DATAFLOWS, Schedule
from .overlap import (
    Sizes,
    attention_pair,
    first_load,
    pipelined,
    query_tiles,
    sum_traffic,
    summed_bytes,
)
from .residence import NOTHING, Kept, by_operation, head_elements
from .simulator import Simulator


@dataclass(frozen=True)
class Systolic:
    """dataflow  of every product: "os", "ws" (of two activations the second operand is held)
    "is" or "best"; None: the schedule's ``dense_dataflow``. Raises ValueError for another."""

    dataflow: str | None = None

    def __post_init__(self) -> None:
        if self.dataflow is not None:
            one_of("dataflow", self.dataflow, DATAFLOWS)


def costs(
    workload: Workload, hardware: Hardware, schedule: Schedule, batch: int, method: Systolic
) -> Iterator[OpCost]:
    """The whole network in one dataflow or each product in its best, with the schedule's fill
    policy."""
    if method.dataflow is not None:
        schedule = replace(schedule, dense_dataflow=method.dataflow)
    return by_operation(
        workload,
        hardware,
        schedule,
        batch,
        lambda op, kept: attention_cost(op, hardware, schedule, batch, kept),
    )


def attention_cost(
    op: Attention,
    hardware: Hardware,
    schedule: Schedule,
    batch: int,
    kept: Kept = NOTHING,
) -> OpCost:
    """One attention call: every entry computed. With the schedule's ``vector_fusion`` "fused"
    softmax follows scores row by row, and values follow softmax; else it begins when all scores
    of a head are there. Waited for: what of the first head is not on chip."""
    schedule = schedule_of(hardware, schedule)
    heads = op.heads * op.windows * batch
    sizes = Sizes(op.queries, op.keys, op.key_dim, op.value_dim, heads)
    scores, values, softmax = attention_pair(sizes, hardware, schedule)
    call = _Call(op, hardware, heads, kept, scores, values)
    loads, taken = call.loads(), -(-op.queries * op.keys // hardware.softmax_lanes)
    summed, spilled = summed_bytes([(heads, scores), (heads, values)], hardware)
    if schedule.vector_fusion == "apart":  # the last head's has no other head to hide behind
        softmax = taken + hardware.softmax_latency_cycles
    array = {"sddmm": scores.cycles(heads), "spmm": values.cycles(heads)}
    busy = {
        "MAC lines": sum(array.values()),
        "DRAM": hardware.dram_cycles(sum(loads.values()) + call.stored + 2 * spilled),
        "softmax": heads * taken,
    }
    load = first_load(loads, heads, kept.size_bytes(op, hardware), hardware)
    phases = pipelined(array, {"softmax": softmax}, busy, load)
    macs = op.entries * batch * (op.key_dim + op.value_dim)
    return OpCost(
        op.name,
        "attention",
        sum(phases.values()),
        phases,
        macs=macs,
        kept_macs=op.kept * batch * (op.key_dim + op.value_dim),
        traffic=(*call.traffic(loads), *sum_traffic(summed, spilled)),
        busy=busy,
        details={"scores": scores.summary, "values": values.summary},
    )


@dataclass(frozen=True)
class _Call:
    """A call of ``heads`` in all windows and images, and the layouts of a head's products."""

    op: Attention
    hardware: Hardware
    heads: int
    kept: Kept
    scores: Layout
    values: Layout

    @property
    def stored(self) -> int:
        """Bytes of the output."""
        return self.heads * self.op.queries * self.op.value_dim * self.hardware.operand_bytes

    def loads(self) -> dict[str, int]:
        """Bytes of DRAM by tensor."""
        tiles = query_tiles(self.op.name, self.op.queries, self.op.keys, self.hardware)
        kept = self.kept.size_bytes(self.op, self.hardware)
        loads = {}
        for side, elements in head_elements(self.op).items():
            size, name = elements * self.hardware.operand_bytes, side.upper()
            again = side != "q" and size > getattr(self.hardware, f"{side}_buffer_bytes")
            loads[name] = self.heads * size * (tiles if again else 1) - kept[name]
        return loads

    def traffic(self, loads: dict[str, int]) -> tuple[Traffic, ...]:
        """Operands go to the array tile by tile; scores are written, read twice by the softmax
        unit, written as probabilities and read as the left operand of the second product."""
        op, heads, kept = self.op, self.heads, self.kept.size_bytes(self.op, self.hardware)
        size, width = self.hardware.operand_bytes, self.hardware.score_bytes
        reads = {
            "Q": heads * self.scores.left_reads * size,
            "K": heads * self.scores.right_reads * size,
            "V": heads * self.values.right_reads * size,
        }
        scores, again = heads * op.queries * op.keys * width, heads * self.values.left_reads * width
        rows = [Traffic(name, "dram", loaded, 0) for name, loaded in loads.items()]
        rows.append(Traffic("output", "dram", 0, self.stored))
        rows += [Traffic(name, "buffer", reads[name], loads[name] + kept[name]) for name in reads]
        rows += [Traffic(name, "lines", reads[name], 0) for name in reads]
        rows += [
            Traffic("scores", "buffer", 2 * scores + again, 2 * scores),
            Traffic("scores", "lines", again, 0),
            Traffic("output", "buffer", self.stored, self.stored),
        ]
        return tuple(rows)


SYSTOLIC = Simulator(
    "systolic",
    costs,
    "dense, nothing pruned, each product in the schedule's dataflow",
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
