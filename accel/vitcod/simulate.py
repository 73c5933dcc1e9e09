"""The ViTCoD-style machine: every attention call stepped by the compiled engine, dense
products on the same MAC lines.

ViTCoD, HPCA 2023, section V. What is modelled stands in `engine`, `mapping` and `products`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...workload import Attention, Conv, Gemm, Op, Workload
from ..hardware import Hardware
from ..producers import Producer, producers, room_bytes
from ..products import PLAIN, Results, network_costs
from ..report.report import OpCost
from ..schedule import DEFAULT, Schedule
from .cost import cost_of
from .estimate import kept_bytes
from .mapping import Mapping, codec_side_bytes
from .run import run_attention
from .stepped import AttentionRun
from .threshold import with_thresholds


def operations(
    workload: Workload, hardware: Hardware, schedule: Schedule, batch: int
) -> Iterator[tuple[OpCost, AttentionRun | None]]:
    """The operations of ``workload`` in order, attention with the run behind its cost.

    An attention call is mapped when its first product is reached: what stays on chip between
    them is not stored by the one, nor loaded by the other.
    """
    calls, ops = Calls(workload.ops, hardware, schedule, batch), workload.ops
    costs = network_costs(
        ops, hardware, batch, schedule, lambda index: calls.at(index)[0], calls.results
    )
    for index, cost in costs:
        yield cost, calls.at(index)[1] if isinstance(ops[index], Attention) else None


class Calls:
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
        room = room_bytes(self.ops, index, self.hardware, self.batch, self.schedule)
        key = (replace(op, name=""), room) if op.masks is None else index
        if key not in self.made:
            op = with_thresholds(op, self.hardware, self.schedule, room)
            run = run_attention(op, self.hardware, self.batch, self.schedule, room)
            self.made[key] = cost_of(run, self.batch), run
        cost, run = self.made[key]
        return replace(cost, name=op.name), run

    def results(self, index: int) -> Results:
        """What becomes of the results of the product at ``index``."""
        producer, op = self.producers.get(index), self.ops[index]
        if producer is None or not isinstance(op, Gemm | Conv):
            return PLAIN
        return projected(op, producer.sides, self.at(producer.attention)[1], self.batch)


def attention_cost(
    op: Attention, hardware: Hardware, batch: int = 1, schedule: Schedule = DEFAULT
) -> OpCost:
    """One attention call, all its windows and images, stepped cycle by cycle."""
    op = with_thresholds(op, hardware, schedule)
    return cost_of(run_attention(op, hardware, batch, schedule), batch)


def kept_of(mapping: Mapping, sides: str) -> int:
    """Bytes of ``sides`` of Q, K and V that are on chip when the call begins, as DRAM would
    hold them."""
    return sum(size for side, size in zip("qkv", kept_bytes(mapping), strict=True) if side in sides)


def projected(op: Gemm | Conv, sides: str, run: AttentionRun, batch: int) -> Results:
    """Of a product that makes ``sides`` for a call: what stays on chip is not stored, and with a
    codec the encoder lets Q and K leave the chip compressed."""
    attention, codec, hardware = run.op, run.op.codec, run.hardware
    kept = kept_of(run.mapping, sides)
    saved, macs, weights = kept // hardware.operand_bytes, 0, 0
    coded = [side for side in sides if side in "qk"] if codec else []
    if codec and coded:
        if not hardware.encoder_macs:
            raise ValueError(
                f"{op.name} makes {', '.join(coded)} of a codec, and hardware {hardware.name!r} "
                "has encoder_macs 0: take the codec from the workload, or give the machine an "
                "encoder"
            )
        tokens = {"q": attention.queries, "k": attention.keys}
        vectors = attention.windows * batch * sum(tokens[side] for side in coded)
        saved += vectors * attention.key_dim * (codec.heads - codec.latent_heads)
        macs = codec.macs(vectors, attention.key_dim)
        weights = len(coded) * codec_side_bytes(attention, hardware, decoder=False)
    saved = min(saved, op.elements_written * batch)
    return Results(saved, kept, macs, weights)
