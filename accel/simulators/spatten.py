"""SpAtten (HPCA 2021) on the hardware's MACs: whole tokens pruned, layer after layer.

Modelled: cascade token pruning (a token pruned in a layer is gone from the attention of the
layers behind it) with tokens kept so that the density of the network's attention equals the
mask's; for a layer that prunes, on every image, a Q K^T of 4-bit operands over the tokens
that enter it (all of them in the first), two products a MAC a cycle, its softmax, the sums
of probabilities as importance, and top-k by quick-select; progressive quantization (the 4
upper bits of Q and K are fetched and multiplied first, the lower ones for the share of
queries that are not confident, whose scores are computed again in 8 bits); dense products
over the tokens kept, each the better way round; V in 8 bits; heads that stay on chip after
the projection (`residence`). Head pruning on request: tokens then make up the density.

Not modelled: local value pruning; what pruned tokens save outside attention (the rest of
the network runs over all tokens, so end to end is against SpAtten); the cascade's effect on
accuracy, and that a fixed mask keeps single entries where SpAtten keeps whole tokens. A
codec is not used. The importance sums run at softmax's rate beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...checks import check_fields
from ...moved import old_names
from ...workload import Attention, Workload
from ..hardware import Hardware
from ..report.report import OpCost, Traffic
from ..schedule import DEFAULT, Schedule
from .overlap import pipelined, product_cycles
from .residence import NOTHING, Kept, by_operation
from .simulator import Simulator


@dataclass(frozen=True)
class Spatten:
    """What the method adds to a `Hardware`; the paper's measures are for language.

    Its released RTL (mit-han-lab/spatten) has 512 multipliers for each of the two products,
    which run at once, and 8 softmax units for 64 dimensions; here both products share the
    hardware's MACs and its softmax unit.

    lsb_share    of the queries, whose lower bits are fetched and scores computed again
    head_share   of the heads kept
    comparators  elements that the top-k engine looks at in a cycle
    topk_visits  times that quick-select looks at an element, on average
    """

    lsb_share: float = 0.06  # choice
    head_share: float = 1.0  # choice: the density by tokens alone
    comparators: int = 16  # its released RTL's latency model (TopKLatencyModel.scala)
    topk_visits: int = 3  # quick-select: 2 for an extreme, 3.4 for the median, 3.2 for a third

    def __post_init__(self) -> None:
        check_fields(self)
        if self.head_share == 0:
            raise ValueError(f"head_share must be in (0, 1], got {self.head_share!r}")


def costs(
    workload: Workload, hardware: Hardware, schedule: Schedule, batch: int, method: Spatten
) -> Iterator[OpCost]:
    """The whole network; attention as this file's head says."""
    shares = [1.0, *cascade(workload.attention)]
    entering = iter(itertools.pairwise(shares))

    def attention(op: Attention, on_chip: Kept) -> OpCost:
        return attention_cost(op, hardware, batch, *next(entering), method, schedule, on_chip)

    return by_operation(workload, hardware, schedule, batch, attention)


def cascade(calls: tuple[Attention, ...]) -> list[float]:
    """Share of entries kept in each layer: never rising, and as many entries in all as the
    masks keep. It is the least-squares fit of the layers' densities under that order (pool
    adjacent violators, weighted by entries)."""
    pools: list[list[float]] = []  # kept entries, entries, layers
    for op in calls:
        pools.append([op.kept, op.entries, 1])
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] < pools[-1][0] * pools[-2][1]:
            kept, entries, layers = pools.pop()
            pools[-1] = [pools[-1][0] + kept, pools[-1][1] + entries, pools[-1][2] + layers]
    return [kept / entries for kept, entries, layers in pools for _ in range(int(layers))]


@dataclass(frozen=True)
class _Tokens:
    """Heads, queries and keys that a layer works on."""

    heads: int
    queries: int
    keys: int


def _alive(op: Attention, share: float, heads: int) -> _Tokens:
    """Queries and keys, each pruned by the square root of what the heads leave to do."""
    kept = math.sqrt(min(1.0, share * op.heads / heads))
    return _Tokens(heads, max(round(op.queries * kept), 1), max(round(op.keys * kept), 1))


def attention_cost(
    op: Attention,
    hardware: Hardware,
    batch: int = 1,
    entering: float = 1.0,
    share: float = 1.0,
    method: Spatten = Spatten(),
    schedule: Schedule = DEFAULT,
    on_chip: Kept = NOTHING,
) -> OpCost:
    """One call: ``entering`` and ``share`` of the entries before and after its pruning."""
    heads = max(round(op.heads * method.head_share), 1)
    before, now = _alive(op, entering, heads), _alive(op, share, heads)
    again = math.ceil(now.queries * method.lsb_share)
    call = _Call(op, hardware, schedule, op.windows * batch, before, now, again, on_chip)
    loads, array = call.loads(), call.array()
    visits = method.topk_visits * (before.keys + op.heads)
    topk = call.images * -(-visits // method.comparators) if call.prunes else 0
    fetch = hardware.dram_cycles(sum(loads.values()))
    busy = {
        "MAC lines": sum(array.values()),
        "DRAM": hardware.dram_cycles(sum(loads.values()) + call.stored),
        "softmax": call.heads * sum(-(-n // hardware.softmax_lanes) for n in call.scores.values()),
        "top-k": topk,
    }
    exposed = {
        "load": -(-fetch // call.heads) + hardware.dram_latency_cycles,
        "top-k": topk,
        "softmax": call.softmax_ends(),
    }
    phases = pipelined(array, exposed, busy)
    executed, found = call.macs()
    return OpCost(
        op.name,
        "attention",
        sum(phases.values()),
        phases,
        macs=executed,
        kept_macs=executed - -(-found // 2),
        traffic=call.traffic(loads),
        busy=busy,
        details={
            "heads_kept": heads,
            "queries_kept": now.queries,
            "keys_kept": now.keys,
            "density": call.kept / (op.entries * batch),
            "predicted_4bit_products": found,
            "queries_recomputed": again,
        },
    )


@dataclass(frozen=True)
class _Call:
    """One call on ``images``: its tokens before and after its pruning, the queries whose scores
    are computed ``again`` in 8 bits, and the heads that are on chip already."""

    op: Attention
    hardware: Hardware
    schedule: Schedule
    images: int
    before: _Tokens
    now: _Tokens
    again: int
    on_chip: Kept

    @property
    def prunes(self) -> bool:
        return self.now != self.before

    @property
    def heads(self) -> int:
        """Heads kept, of all images."""
        return self.images * self.now.heads

    @property
    def kept(self) -> int:
        """Entries kept, of all images."""
        return self.heads * self.now.queries * self.now.keys

    @property
    def stored(self) -> int:
        """Bytes of the output."""
        return self.heads * self.now.queries * self.op.value_dim * self.hardware.operand_bytes

    @property
    def scores(self) -> dict[str, int]:
        """Scores of one head that softmax sees, pass by pass."""
        return {
            "predict": self.before.queries * self.before.keys if self.prunes else 0,
            "sddmm": (self.now.queries + self.again) * self.now.keys,
        }

    def array(self) -> dict[str, int]:
        """Cycles of the MAC lines; products of 4-bit operands are two a MAC."""
        op, before, now = self.op, self.before, self.now
        half = -(-op.key_dim // 2)
        products = {
            "predict": (before.queries, before.keys, half),
            "sddmm": (now.queries, now.keys, half),
            "recompute": (self.again, now.keys, op.key_dim),
            "spmm": (now.queries, op.value_dim, now.keys),
        }
        cycles = {
            name: self.heads * product_cycles(*sizes, self.hardware, self.schedule)
            for name, sizes in products.items()
        }
        return cycles if self.prunes else cycles | {"predict": 0}

    def macs(self) -> tuple[int, int]:
        """MACs executed, and 4-bit products of the prediction: those take half a MAC, as all
        scores of 4-bit operands; scores of unsure queries are computed again."""
        op, found = self.op, self.heads * self.scores["predict"] * self.op.key_dim
        executed = -(-(self.kept * op.key_dim + found) // 2) + self.kept * op.value_dim
        return executed + self.heads * self.again * self.now.keys * op.key_dim, found

    def softmax_ends(self) -> int:
        """Cycles of the last tile's softmax, before top-k and before the end: nothing is
        left to hide them behind."""
        lanes, latency = self.hardware.softmax_lanes, self.hardware.softmax_latency_cycles
        tiles = {"predict": self.query_tiles(self.before), "sddmm": self.query_tiles(self.now)}
        ends = sum(-(-self.scores[name] // (lanes * count)) for name, count in tiles.items())
        return ends + (2 if self.prunes else 1) * latency

    def loads(self) -> dict[str, int]:
        """Bytes: upper halves of Q and K of all tokens that are scored (again for the second
        pass, where all heads do not stay on chip), lower halves where needed."""
        op, now, size = self.op, self.now, self.hardware.operand_bytes
        upper = op.key_dim * size / 2
        loads = {}
        for name, first, second, lower in (
            ("Q", self.before.queries, now.queries, self.again),
            ("K", self.before.keys, now.keys, now.keys if self.again else 0),
        ):
            room = getattr(self.hardware, f"{name.lower()}_buffer_bytes")
            stays = now.heads * first * upper <= room
            if name == "K":  # a head's K that does not fit comes again for each tile of queries
                first *= self.query_tiles(self.before) if first * upper > room else 1
                passes = self.query_tiles(now) if second * upper > room else 1
                second, lower = second * passes, lower * passes
            tokens = first + lower + second if self.prunes and not stays else first + lower
            loads[name] = self.images * math.ceil(now.heads * tokens * upper)
        values = now.keys * op.value_dim * size
        again = self.query_tiles(now) if values > self.hardware.v_buffer_bytes else 1
        loads["V"] = self.heads * values * again
        for name, kept in zip("QKV", self.on_chip, strict=True):
            loads[name] -= loads[name] * min(kept, self.heads) // self.heads
        return loads

    def query_tiles(self, tokens: _Tokens) -> int:
        """Tiles of queries whose scores fit the output buffer, two at a time."""
        row = 2 * tokens.keys * self.hardware.score_bytes
        if row > self.hardware.output_buffer_bytes:
            raise ValueError(
                f"{self.op.name}: one row of {tokens.keys} scores takes {row} bytes twice, "
                f"output_buffer_bytes is {self.hardware.output_buffer_bytes}"
            )
        return -(-tokens.queries // (self.hardware.output_buffer_bytes // row))

    def traffic(self, loads: dict[str, int]) -> tuple[Traffic, ...]:
        """Operands once a MAC line's worth of the other side, as an output-stationary array."""
        op, now, hardware = self.op, self.now, self.hardware
        size, width, height = hardware.operand_bytes, hardware.macs_per_line, hardware.lines
        computed = sum(self.scores.values()) + self.again * now.keys  # 8 bits: two halves
        halves = computed * op.key_dim * size
        products = now.queries * now.keys * op.value_dim * size
        reads = {
            "Q": self.heads * -(-halves // (2 * width)),
            "K": self.heads * -(-halves // (2 * height)),
            "V": self.heads * -(-products // height),
        }
        rows = [Traffic(name, "dram", loaded, 0) for name, loaded in loads.items()]
        rows.append(Traffic("output", "dram", 0, self.stored))
        filled = replace(self, on_chip=NOTHING).loads()  # what stayed on chip was written, too
        rows += [Traffic(name, "buffer", reads[name], filled[name]) for name in reads]
        rows += [Traffic(name, "lines", reads[name], 0) for name in reads]
        held = self.heads * sum(self.scores.values())
        summed = held * hardware.accumulator_bytes
        moved = held * hardware.score_bytes
        rows += [
            Traffic("scores", "buffer", 3 * moved, 2 * moved),
            Traffic("importance", "buffer", summed, summed),
            Traffic("output", "buffer", self.stored, self.stored),
        ]
        return tuple(rows)


SPATTEN = Simulator(
    "spatten",
    costs,
    "prunes whole tokens to the same density, anew for every image",
    parameters=Spatten(),
)

__getattr__ = old_names(__name__)
