"""SpAtten (HPCA 2021) on the hardware's MACs: whole tokens pruned, layer after layer.

Modelled: cascade token pruning (`sievit.accel.simulators.cascade`: a token pruned in a layer is
gone from its values and its linear layers, and from all layers behind) with tokens kept so that
the density of the network's attention equals the mask's; for a layer that prunes, on every
image, a Q K^T of 4-bit operands over the tokens that enter it (all of them in the first), its
softmax, the sums of probabilities as importance, and top-k by quick-select; progressive
quantization (the 4 upper bits of Q and K are fetched and multiplied first, the lower ones for
the share of queries that are not confident, whose scores are computed again in 8 bits); V in 8
bits; heads that stay on chip after the projection (`residence`). Head pruning on request: tokens
then make up the density. The array is used as the schedule says, at its best by default: each
product on as many lines as pay, either way round, K split over lines that would be idle, heads
one behind the other without a new skew; softmax follows scores stripe by stripe, values softmax.

Gathered rows: a layer that prunes reads the tokens that it keeps out of banks that hold all that
entered, and waits where one bank has too many of them (`banks`; the phase "gather"). What DRAM
loads after the pruning lies in order. Tokens are those that the mask keeps most entries of.

Not modelled: local value pruning and the linear layers of pruned heads, against it; the cascade's
effect on accuracy, and that a fixed mask keeps single entries where SpAtten keeps whole tokens.
Convolutions, and what sizes do not tell, run over all tokens. A codec is not used. The importance
sums run at softmax's rate beside it. In its favour: its released RTL multiplies 4-bit operands at
the rate of whole ones; here a MAC makes more products of them (`Spatten.mac_split`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ...checks import check_fields
from ...moved import old_names
from ...workload import Attention, Workload
from ..hardware import Hardware
from ..products import Layout
from ..report.report import OpCost, Traffic
from ..schedule import DEFAULT, Schedule, one_of
from .banks import streams_wait, tiles_wait
from .cascade import Pruning, prunings, without_pruned
from .overlap import (
    Pair,
    Sizes,
    attention_pair,
    candidates,
    first_load,
    least,
    pipelined,
    query_tiles,
    softmax_behind,
    sum_traffic,
    summed_bytes,
    waiting_pair,
)
from .precision import PRODUCTS_PER_MAC, narrow_bytes
from .residence import NOTHING, Kept, by_operation
from .simulator import Simulator

UPPER_BITS = 4
"""Of Q and K, which are fetched and multiplied first."""


@dataclass(frozen=True)
class Spatten:
    """What the method adds to a `Hardware`; the paper's measures are for language.

    Its released RTL (mit-han-lab/spatten) has 512 multipliers for each of the two products,
    which run at once, and 8 softmax units for 64 dimensions; here both products share the
    hardware's MACs and its softmax unit.

    lsb_share    of the queries, whose lower bits are fetched and scores computed again
    head_share   of the heads kept
    mac_split    how a MAC is split for 4-bit operands: a name of `precision.PRODUCTS_PER_MAC`
    comparators  elements that the top-k engine looks at in a cycle
    topk_visits  times that quick-select looks at an element, on average

    Raises ValueError, naming the parameter, for a share or a count out of its range.
    """

    lsb_share: float = 0.06  # choice
    head_share: float = 1.0  # choice: the density by tokens alone
    mac_split: str = "bit_fusion"  # choice: the best for SpAtten, and the same as Sanger's
    comparators: int = 16  # its released RTL's latency model (TopKLatencyModel.scala)
    topk_visits: int = 3  # quick-select: 2 for an extreme, 3.4 for the median, 3.2 for a third

    def __post_init__(self) -> None:
        check_fields(self)
        if self.head_share == 0:
            raise ValueError(f"head_share must be in (0, 1], got {self.head_share!r}")
        one_of("mac_split", self.mac_split, tuple(PRODUCTS_PER_MAC))


def costs(
    workload: Workload, hardware: Hardware, schedule: Schedule, batch: int, method: Spatten
) -> Iterator[OpCost]:
    """The whole network over the tokens that are alive; attention as this file's head says."""
    layers = prunings(workload.attention, method.head_share)
    left = replace(workload, ops=without_pruned(workload.ops, layers))
    calls = zip(workload.attention, layers, strict=True)

    def attention(_entering: Attention, on_chip: Kept) -> OpCost:
        return attention_cost(*next(calls), hardware, batch, method, schedule, on_chip)

    return by_operation(left, hardware, schedule, batch, attention)


def attention_cost(
    op: Attention,
    layer: Pruning,
    hardware: Hardware,
    batch: int = 1,
    method: Spatten = Spatten(),
    schedule: Schedule = DEFAULT,
    on_chip: Kept = NOTHING,
) -> OpCost:
    """One call; ``layer`` says what enters it and what it keeps."""
    call = _Call(op, layer, hardware, schedule, op.windows * batch, method, on_chip)
    loads, array, kept = call.loads(), call.array(), dict(zip("QKV", on_chip, strict=True))
    summed, spilled = summed_bytes(call.products.values(), hardware)
    busy = {
        "MAC lines": sum(array.values()),
        "DRAM": hardware.dram_cycles(sum(loads.values()) + call.stored + 2 * spilled),
        "softmax": call.heads * sum(-(-n // hardware.softmax_lanes) for n in call.scores.values()),
        "top-k": call.topk,
    }
    waits = {"top-k": call.topk, "softmax": call.softmax_beyond(), "gather": call.gather()}
    phases = pipelined(array, waits, busy, first_load(loads, call.heads, kept, hardware))
    executed, found = call.macs()
    return OpCost(
        op.name,
        "attention",
        sum(phases.values()),
        phases,
        macs=executed,
        kept_macs=executed - -(-found // call.narrow_products),
        traffic=(*call.traffic(loads), *sum_traffic(summed, spilled)),
        busy=busy,
        details={
            "heads_kept": layer.now.heads,
            "queries_kept": layer.now.queries,
            "keys_kept": layer.now.keys,
            "density": call.kept / (op.entries * batch),
            "predicted_4bit_products": found,
            "queries_recomputed": call.again,
        }
        | {name: one.summary for name, (_, one) in call.products.items()},
    )


@dataclass(frozen=True)
class _Call:
    """One call on ``images``: what its layer prunes, and the heads that are on chip already."""

    op: Attention
    layer: Pruning
    hardware: Hardware
    schedule: Schedule
    images: int
    method: Spatten
    on_chip: Kept

    @property
    def again(self) -> int:
        """Queries of a head whose scores are computed again in 8 bits."""
        return math.ceil(self.layer.now.queries * self.method.lsb_share)

    @property
    def heads(self) -> int:
        """Heads kept, of all images."""
        return self.images * self.layer.now.heads

    @property
    def kept(self) -> int:
        """Entries kept, of all images."""
        return self.heads * self.layer.now.queries * self.layer.now.keys

    @property
    def stored(self) -> int:
        """Bytes of the output."""
        return self.heads * self.layer.now.queries * self.op.value_dim * self.hardware.operand_bytes

    @property
    def scores(self) -> dict[str, int]:
        """Scores of one head that softmax sees, pass by pass."""
        return {
            "predict": self.layer.before.queries * self.layer.before.keys
            if self.layer.prunes
            else 0,
            "sddmm": (self.layer.now.queries + self.again) * self.layer.now.keys,
        }

    @property
    def topk(self) -> int:
        """Cycles of the top-k engine."""
        if not self.layer.prunes:
            return 0
        visits = self.method.topk_visits * (self.layer.before.keys + self.op.heads)
        return self.images * -(-visits // self.method.comparators)

    # ------------------------------------------------------------ the array

    @property
    def narrow_products(self) -> int:
        """Products of upper halves that a MAC makes in a cycle."""
        return PRODUCTS_PER_MAC[self.method.mac_split](UPPER_BITS)

    @property
    def narrow_dim(self) -> int:
        """Steps of a MAC over the upper halves of a query and a key."""
        return -(-self.op.key_dim // self.narrow_products)

    @cached_property
    def pair(self) -> Pair:
        """Scores and values of the tokens kept."""
        now, how = self.layer.now, (self.hardware, self.schedule)
        sizes = Sizes(now.queries, now.keys, self.narrow_dim, self.op.value_dim, self.heads)
        if not self.layer.prunes:
            return attention_pair(sizes, *how)
        return waiting_pair(sizes, *how, lambda *pair: self.heads * self._gather(*pair))

    @cached_property
    def products(self) -> dict[str, tuple[int, Layout]]:
        """(how often, layout) of each product of the array, in order."""
        how = self.hardware, self.schedule
        made = {"sddmm": (self.heads, self.pair.scores), "spmm": (self.heads, self.pair.values)}
        if self.layer.prunes:
            sizes = self.layer.before.queries, self.layer.before.keys, self.narrow_dim
            tried = candidates(*sizes, *how, self.heads)
            made = {"predict": (self.heads, least(tried, self._predicted, *how)), **made}
        if self.again:
            tried = candidates(self.again, self.layer.now.keys, self.op.key_dim, *how, self.heads)
            made["recompute"] = self.heads, least(tried, self._recomputed, *how)
        return made

    def array(self) -> dict[str, int]:
        """Cycles of the MAC lines."""
        return {name: one.cycles(count) for name, (count, one) in self.products.items()}

    def macs(self) -> tuple[int, int]:
        """MACs executed, and 4-bit products of the prediction: those take a part of a MAC, as
        all scores of 4-bit operands; scores of unsure queries are computed again."""
        op, found = self.op, self.heads * self.scores["predict"] * self.op.key_dim
        narrow = -(-(self.kept * op.key_dim + found) // self.narrow_products)
        executed = narrow + self.kept * op.value_dim
        return executed + self.heads * self.again * self.layer.now.keys * op.key_dim, found

    # ------------------------------------------------------------ what it waits for

    def softmax_beyond(self) -> int:
        """Cycles of softmax that the array does not hide: of the prediction, of the tokens kept,
        and of the last head's unsure queries."""
        beyond = self.pair.beyond
        if self.layer.prunes:
            beyond += self._prediction_softmax(self.products["predict"][1])
        if self.again:
            beyond += -(-self.again * self.layer.now.keys // self.hardware.softmax_lanes)
            beyond += self.hardware.softmax_latency_cycles
        return beyond

    def _predicted(self, layout: Layout) -> int:
        """Cycles of the prediction in ``layout``."""
        return layout.cycles(self.heads) + self._prediction_softmax(layout)

    def _prediction_softmax(self, layout: Layout) -> int:
        """That follows the predicted scores stripe by stripe, all of it before top-k."""
        before = self.layer.before
        return softmax_behind(before.queries, before.keys, self.heads, layout, self.hardware)

    def gather(self) -> int:
        """Cycles that the array waits for banks in a layer that prunes."""
        if not self.layer.prunes:
            return 0
        waited = self._gather(self.pair.scores, self.pair.values)
        if self.again:
            waited += self._unsure_wait(self.products["recompute"][1])
        return self.heads * waited

    def _gather(self, scores: Layout, values: Layout) -> int:
        """Of one head, unsure queries apart."""
        waited = self._scores_wait(scores, self._rows("Q"), self.narrow_dim, UPPER_BITS)
        if not self.on_chip.v:
            return waited
        sizes = self.layer.now.queries, self.layer.keys, self.op.value_dim
        return waited + streams_wait(values, *sizes, self.hardware)

    def _unsure_wait(self, layout: Layout) -> int:
        return self._scores_wait(layout, np.arange(self.again), self.op.key_dim, 8)

    def _recomputed(self, layout: Layout) -> int:
        """Cycles of the unsure queries in ``layout``."""
        waited = self._unsure_wait(layout) if self.layer.prunes else 0
        return layout.cycles(self.heads) + self.heads * waited

    def _scores_wait(self, layout: Layout, queries: np.ndarray, steps: int, bits: int) -> int:
        """Of ``queries`` and all keys of one head, in so many steps."""
        hardware = self.hardware
        row = narrow_bytes(self.op.key_dim * hardware.operand_bytes, bits)
        banks, words = (hardware.q_banks, hardware.k_banks), -(-row // hardware.word_bytes)
        return tiles_wait(layout, (queries, self._rows("K")), banks, hardware, words, steps)

    def _rows(self, name: str) -> np.ndarray:
        """Rows of Q or K in the buffer: among those of all that entered, where these stay for the
        second pass; in order, where they are loaded again."""
        places = self.layer.queries if name == "Q" else self.layer.keys
        there = self.on_chip.q if name == "Q" else self.on_chip.k
        return places if there or self._stays(name) else np.arange(len(places))

    # ------------------------------------------------------------ bytes

    def _stays(self, name: str) -> bool:
        """Whether the upper halves of all heads' Q or K are still there for the second pass."""
        tokens = self.layer.before.queries if name == "Q" else self.layer.before.keys
        room = getattr(self.hardware, f"{name.lower()}_buffer_bytes")
        return self.layer.now.heads * tokens * self._upper_bytes <= room

    @property
    def _upper_bytes(self) -> int:
        """Of a query's or a key's upper half."""
        return narrow_bytes(self.op.key_dim * self.hardware.operand_bytes, UPPER_BITS)

    def loads(self) -> dict[str, int]:
        """Bytes: upper halves of Q and K of all tokens that are scored (again for the second
        pass, where all heads do not stay on chip), lower halves where needed."""
        op, now, size = self.op, self.layer.now, self.hardware.operand_bytes
        upper, loads = self._upper_bytes, {}
        tiles, passes = (
            query_tiles(op.name, some.queries, some.keys, self.hardware)
            for some in (self.layer.before, now)
        )
        for name, first, second, lower in (
            ("Q", self.layer.before.queries, now.queries, self.again),
            ("K", self.layer.before.keys, now.keys, now.keys if self.again else 0),
        ):
            stays = self._stays(name)
            if name == "K":  # a head's K that does not fit comes again for each tile of queries
                room = self.hardware.k_buffer_bytes
                first *= tiles if first * upper > room else 1
                many = passes if second * upper > room else 1
                second, lower = second * many, lower * many
            tokens = first + lower + second if self.layer.prunes and not stays else first + lower
            loads[name] = self.heads * tokens * upper
        values = now.keys * op.value_dim * size
        again = passes if values > self.hardware.v_buffer_bytes else 1
        loads["V"] = self.heads * values * again
        for name, kept in zip("QKV", self.on_chip, strict=True):
            loads[name] -= loads[name] * min(kept, self.heads) // self.heads
        return loads

    def reads(self) -> dict[str, int]:
        """Bytes that the array reads by tensor, as its layouts do; "scores" are probabilities."""
        hardware, size = self.hardware, self.hardware.operand_bytes
        step = narrow_bytes(self.narrow_products * size, UPPER_BITS)
        reads = dict.fromkeys("QKV", 0)
        for name, (count, layout) in self.products.items():
            if name == "spmm":
                reads["V"] += count * layout.right_reads * size
                reads["scores"] = count * layout.left_reads * hardware.score_bytes
            else:
                width = size if name == "recompute" else step
                reads["Q"] += count * layout.left_reads * width
                reads["K"] += count * layout.right_reads * width
        return reads

    def traffic(self, loads: dict[str, int]) -> tuple[Traffic, ...]:
        """Bytes at the DRAM, the buffers and the lines."""
        hardware, reads = self.hardware, self.reads()
        rows = [Traffic(name, "dram", loaded, 0) for name, loaded in loads.items()]
        rows.append(Traffic("output", "dram", 0, self.stored))
        filled = replace(self, on_chip=NOTHING).loads()  # what stayed on chip was written, too
        rows += [Traffic(name, "buffer", reads[name], filled[name]) for name in "QKV"]
        rows += [Traffic(name, "lines", read, 0) for name, read in reads.items()]
        held = self.heads * sum(self.scores.values())
        summed = held * hardware.accumulator_bytes
        moved = held * hardware.score_bytes
        rows += [
            Traffic("scores", "buffer", 2 * moved + reads["scores"], 2 * moved),
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
