"""Which products make the Q, K and V of each attention call, and what of them may stay on chip.

A call's products are the last before it, after any attention before: one for Q, K and V
together, or several whose sizes are those of Q, K and V or of two of them. Equal sizes are
taken in the order Q, K, V, a pair for K and V. Else one of the size of all three makes them
all, or the last product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..workload import Attention, Conv, Gemm, Op
from .hardware import Hardware
from .products import spare_bytes
from .schedule import Schedule


@dataclass(frozen=True)
class Producer:
    """A product that makes ``sides`` ("qkv", or a part of it) of an attention call, both by
    their place in the network."""

    product: int
    attention: int
    sides: str


def producers(ops: Sequence[Op]) -> tuple[Producer, ...]:
    """Of all attention calls, in order."""
    found: list[Producer] = []
    since: list[int] = []
    for index, op in enumerate(ops):
        if isinstance(op, (Gemm, Conv)):
            since.append(index)
        elif isinstance(op, Attention):
            sizes = [ops[place].elements_written for place in since]
            sides = _sides(op, sizes) if since else {}
            found += [Producer(since[place], index, made) for place, made in sides.items()]
            since = []
    return tuple(found)


def room_bytes(
    ops: Sequence[Op], attention: int, hardware: Hardware, batch: int, schedule: Schedule
) -> int:
    """Bytes of Q, K and V of the call at ``attention`` that may wait in the scratchpad while
    their products run: no more than these make, and what none of them loads a byte more for."""
    if schedule.on_chip == "nothing":
        return 0
    made = [one.product for one in producers(ops[: attention + 1]) if one.attention == attention]
    products = [op for op in (ops[place] for place in made) if isinstance(op, Gemm | Conv)]
    results = sum(op.elements_written for op in products) * batch * hardware.operand_bytes
    return min([results, *(spare_bytes(op, hardware, batch, schedule) for op in products)])


def _sides(op: Attention, sizes: Sequence[int]) -> dict[int, str]:
    """Which of Q, K and V each of the last products makes, by its place in ``sizes``."""
    of = {
        "q": op.windows * op.heads * op.queries * op.key_dim,
        "k": op.windows * op.heads * op.keys * op.key_dim,
        "v": op.windows * op.heads * op.keys * op.value_dim,
    }
    for count in range(1, min(len(sizes), 3) + 1):
        if sum(sizes[-count:]) == sum(of.values()):
            made, missing = {}, "qkv"
            for place in range(len(sizes) - count, len(sizes)):
                fits = (p for p in PARTS if set(p) <= set(missing) and sizes[place] == _sum(of, p))
                part = next(fits, "")
                missing = "".join(side for side in missing if side not in part)
                made[place] = part
            if not missing:
                return made
    whole = [place for place, size in enumerate(sizes) if size == sum(of.values())]
    return {(whole or [len(sizes) - 1])[-1]: "qkv"}


PARTS = ("qkv", "kv", "qk", "qv", "q", "k", "v")
"""Of Q, K and V, what one product may make."""


def _sum(sizes: dict[str, int], part: str) -> int:
    return sum(sizes[side] for side in part)
