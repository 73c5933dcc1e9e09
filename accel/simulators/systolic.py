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
from ..products import Layout, laid_out
from ..report.report import OpCost, Traffic
from ..schedule import DATAFLOWS, Schedule
from .overlap import softmax_beyond
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
    scores = laid_out(op.queries, op.keys, op.key_dim, hardware, schedule, heads)
    values = laid_out(op.queries, op.value_dim, op.keys, hardware, schedule, heads)
    call = _Call(op, hardware, heads, kept, scores, values)
    softmax = -(-op.queries * op.keys // hardware.softmax_lanes)
    loads, stored = call.loads(), call.stored
    dram = hardware.dram_cycles(sum(loads.values()) + stored + 2 * call.spilled)
    sddmm, spmm = scores.cycles(heads), values.cycles(heads)
    phases = {"sddmm": sddmm, "spmm": spmm, "softmax": 0, "load": call.first_load(loads)}
    if schedule.vector_fusion == "fused":
        phases["softmax"] = softmax_beyond(op.queries, op.keys, heads, scores, values, hardware)
        phases["load"] += max(dram - sddmm - spmm - phases["softmax"], 0)
    else:  # the last head's softmax has no other head to hide behind
        phases["softmax"] = softmax + hardware.softmax_latency_cycles
        waited = "softmax" if heads * softmax >= dram else "load"
        phases[waited] += max(max(heads * softmax, dram) - sddmm - spmm, 0)
    macs = op.entries * batch * (op.key_dim + op.value_dim)
    return OpCost(
        op.name,
        "attention",
        sum(phases.values()),
        phases,
        macs=macs,
        kept_macs=op.kept * batch * (op.key_dim + op.value_dim),
        traffic=call.traffic(loads),
        busy={"MAC lines": sddmm + spmm, "DRAM": dram, "softmax": heads * softmax},
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

    @property
    def spilled(self) -> int:
        """Bytes of partial sums that the output buffer does not hold."""
        size = self.hardware.accumulator_bytes
        room = self.hardware.output_buffer_bytes // size
        sums = self.scores.spilled_sums(room) + self.values.spilled_sums(room)
        return self.heads * sums * size

    def loads(self) -> dict[str, int]:
        """Bytes of DRAM by tensor."""
        tiles = _query_tiles(self.op, self.hardware)
        kept = self.kept.size_bytes(self.op, self.hardware)
        loads = {}
        for side, elements in head_elements(self.op).items():
            size, name = elements * self.hardware.operand_bytes, side.upper()
            again = side != "q" and size > getattr(self.hardware, f"{side}_buffer_bytes")
            loads[name] = self.heads * size * (tiles if again else 1) - kept[name]
        return loads

    def first_load(self, loads: dict[str, int]) -> int:
        """Cycles until the first head's Q, K and V are there."""
        heads = dict(zip("QKV", self.kept, strict=True))
        size = sum(loaded for name, loaded in loads.items() if not heads[name]) // self.heads
        if not size:
            return 0
        return self.hardware.dram_cycles(size) + self.hardware.dram_latency_cycles

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
        return (*rows, *self._partial_sums())

    def _partial_sums(self) -> Iterator[Traffic]:
        sums = self.heads * (self.scores.partial_sums + self.values.partial_sums)
        size = sums * self.hardware.accumulator_bytes + self.spilled
        if self.spilled:
            yield Traffic("partial sums", "dram", self.spilled, self.spilled)
        if size:
            yield Traffic("partial sums", "buffer", size, size)


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
