"""What of Q, K and V stays on chip between the projection and attention, on machines in closed
form: the first heads, as many as fit. They are neither stored by the one nor loaded by the other,
as on ViTCoD's machine (`sievit.accel.vitcod.scratchpad`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ...workload import Attention, Workload
from ..hardware import Hardware
from ..producers import producers, room_bytes
from ..products import PLAIN, Results, network_costs
from ..report.report import OpCost
from ..schedule import Schedule


class Kept(NamedTuple):
    """Heads of Q, K and V, of all windows and images, that are on chip when a call begins."""

    q: int = 0
    k: int = 0
    v: int = 0

    def elements(self, op: Attention, sides: str = "qkv") -> int:
        """Of ``sides``, together."""
        sizes = head_elements(op)
        return sum(getattr(self, side) * sizes[side] for side in sides)

    def size_bytes(self, op: Attention, hardware: Hardware) -> dict[str, int]:
        """By tensor: "Q", "K", "V"."""
        return {s.upper(): self.elements(op, s) * hardware.operand_bytes for s in "qkv"}


NOTHING = Kept()


def head_elements(op: Attention) -> dict[str, int]:
    """Of one head of one window: "q", "k", "v"."""
    return {
        "q": op.queries * op.key_dim,
        "k": op.keys * op.key_dim,
        "v": op.keys * op.value_dim,
    }


def kept_heads(
    op: Attention, hardware: Hardware, schedule: Schedule, batch: int, room: int
) -> Kept:
    """What stays on chip after a projection that leaves ``room`` bytes: heads of K, Q and V in
    turn, as far as their buffers (all four together in a shared scratchpad) hold them.

    Nothing where a head of K or V does not fit its buffer and is loaded again.
    """
    sizes = {side: n * hardware.operand_bytes for side, n in head_elements(op).items()}
    if sizes["k"] > hardware.k_buffer_bytes or sizes["v"] > hardware.v_buffer_bytes:
        return NOTHING
    buffers = {side: getattr(hardware, f"{side}_buffer_bytes") for side in sizes}
    space = sum(buffers.values())
    if schedule.scratchpad == "shared":
        space += hardware.other_buffer_bytes
        buffers = dict.fromkeys(sizes, space)
    left, heads = min(room, space), op.heads * op.windows * batch
    counts, grown = dict.fromkeys(sizes, 0), True
    while grown:
        grown = False
        for side in "kqv":
            held = (counts[side] + 1) * sizes[side]
            if counts[side] < heads and held <= buffers[side] and sizes[side] <= left:
                counts[side] += 1
                left -= sizes[side]
                grown = True
    return Kept(counts["q"], counts["k"], counts["v"])


def by_operation(
    workload: Workload,
    hardware: Hardware,
    schedule: Schedule,
    batch: int,
    attention: Callable[[Attention, Kept], OpCost],
) -> Iterator[OpCost]:
    """Cost of each operation that is executed: attention as given, by the call and what of it is
    on chip already, the rest as `sievit.accel.products`."""
    ops = workload.ops
    made = {one.product: one for one in producers(ops)}
    calls: dict[int, tuple[Attention, Kept]] = {}
    for place, op in enumerate(ops):
        if isinstance(op, Attention):
            room = room_bytes(ops, place, hardware, batch, schedule)
            calls[place] = op, kept_heads(op, hardware, schedule, batch, room)

    def results(place: int) -> Results:
        if place not in made:
            return PLAIN
        call, kept = calls[made[place].attention]
        saved = kept.elements(call, made[place].sides)
        saved = min(saved, ops[place].elements_written * batch)
        return Results(saved, saved * hardware.operand_bytes)

    def cost(place: int) -> OpCost:
        return attention(*calls[place])

    return (cost for _, cost in network_costs(ops, hardware, batch, schedule, cost, results))
