"""The ViTCoD-style machine: every attention call stepped by the compiled engine, dense
products on the same MAC lines.

ViTCoD, HPCA 2023, section V. What is modelled stands in `engine`, `mapping` and `products`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...workload import Attention, Conv, Gemm, Op, Workload
from ..hardware import Hardware
from ..producers import Producer, producers
from ..products import op_cost, spare_bytes
from ..report.report import OpCost
from ..schedule import DEFAULT, Schedule
from .cost import cost_of
from .projection import kept_of, projection_cost
from .run import AttentionRun, run_attention
from .threshold import with_thresholds


def operations(
    workload: Workload, hardware: Hardware, schedule: Schedule, batch: int
) -> Iterator[tuple[OpCost, AttentionRun | None]]:
    """The operations of ``workload`` in order, attention with the run behind its cost.

    An attention call is mapped when its first product is reached: what stays on chip between
    them is not stored by the one, nor loaded by the other.
    """
    calls = _Calls(workload.ops, hardware, schedule, batch)
    plain: dict[tuple, OpCost | None] = {}  # layers repeat: each product is charged once
    for index, op in enumerate(workload.ops):
        if isinstance(op, Attention):
            yield calls.at(index)
            continue
        producer = calls.producers.get(index)
        if producer is not None and isinstance(op, (Gemm, Conv)):
            run = calls.at(producer.attention)[1]
            kept = kept_of(run.mapping, producer.sides)
            if kept or run.op.codec:
                yield projection_cost(op, producer.sides, run, kept, schedule, batch), None
                continue
        alike = (type(op), *(value for key, value in vars(op).items() if key != "name"))
        if alike not in plain:
            plain[alike] = op_cost(op, hardware, batch, schedule)
        cost = plain[alike]
        if cost is not None:
            yield replace(cost, name=op.name), None


class _Calls:
    """The attention calls of a network, each stepped once; equal dense ones together."""

    def __init__(
        self, ops: Sequence[Op], hardware: Hardware, schedule: Schedule, batch: int
    ) -> None:
        self.ops, self.hardware, self.schedule, self.batch = ops, hardware, schedule, batch
        self.producers: dict[int, Producer] = {p.product: p for p in producers(ops)}
        self.made: dict[int | tuple, tuple[OpCost, AttentionRun]] = {}

    def at(self, index: int) -> tuple[OpCost, AttentionRun]:
        """The call at ``index``."""
        op = self.ops[index]
        assert isinstance(op, Attention)
        room = self._room(index)
        key = (replace(op, name=""), room) if op.masks is None else index
        if key not in self.made:
            op = with_thresholds(op, self.hardware, self.schedule)
            run = run_attention(op, self.hardware, self.batch, self.schedule, room)
            self.made[key] = cost_of(run, self.batch), run
        cost, run = self.made[key]
        return replace(cost, name=op.name), run

    def _room(self, index: int) -> int:
        """Bytes of Q, K and V that may wait in the scratchpad while their products run."""
        made_by = [p.product for p in self.producers.values() if p.attention == index]
        if not made_by or self.schedule.on_chip == "nothing":
            return 0
        products = [op for op in (self.ops[p] for p in made_by) if isinstance(op, (Gemm, Conv))]
        how = self.hardware, self.batch, self.schedule
        return min(spare_bytes(product, *how) for product in products)


def attention_cost(
    op: Attention, hardware: Hardware, batch: int = 1, schedule: Schedule = DEFAULT
) -> OpCost:
    """One attention call, all its windows and images, stepped cycle by cycle."""
    return cost_of(run_attention(op, hardware, batch, schedule), batch)
