"""Sanger (MICRO 2021) on the hardware's MACs: a mask predicted and packed for every image.

Modelled: for every head a dense Q K^T of narrow operands (`Sanger.prediction_bits`), several
products a MAC a cycle (`Sanger.mac_split`); the threshold; reading the mask that comes out,
packing it into rows of the array's width (`packing`: long rows split, short ones and remainders
side by side); SDDMM and SpMM with the scores held in the array, one packed entry a MAC; softmax
on the shared unit; Q, K, V and the output through DRAM, but for the heads that stay on chip after
the projection (`residence`). The workload's mask is taken as the one that the prediction finds,
the same for each image of a batch; another image's mask is another workload. Units are a tile of
queries of one head or of several, whose masks, scores and Q fit their buffers.

The array is used as the schedule says, at its best by default: the prediction on as many lines
as pay, either way round, K split over lines that would be idle; packed rows of as many heads
behind each other as the buffers hold, on the lines and MACs of a line that take them the least
time; no new skew between tiles. Rows are packed as their scores come, and values of a group
follow its softmax.

Gathered rows: a group of packed rows reads its queries, keys and values by index, each word once
for all its MACs, and waits where one bank has too many of them (`banks`; the phase "gather").
Counted on the mask, group by group.

Its released hardware predicts on a dense array of 4-bit MACs of its own (mask.scala), beside the
one that computes. At equal MACs there is no such array; a multiplier of 8 bits has room for four
of 4 bits, so a MAC that makes four of their products ("bit_fusion") is the same silicon, and the
default.

Not modelled, each in Sanger's favour: the softmax that its algorithm puts before the threshold,
the sums of split rows, the ports that four narrow products a MAC take twice the operands from;
the packer keeps all rows of a tile open. And one against it: prediction and computing share the
MACs, so they take turns. A codec is not used. Dense products as in `sievit.accel.products`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...checks import check_fields
from ...moved import old_names
from ...workload import Attention, Workload
from ..hardware import Hardware, schedule_of
from ..products import Layout
from ..report.report import OpCost, Traffic
from ..schedule import DEFAULT, Schedule, one_of
from .held import Held, PackedCall
from .overlap import (
    candidates,
    first_load,
    kept_by_row,
    least,
    pipelined,
    sum_traffic,
    summed_bytes,
)
from .precision import BITS, PRODUCTS_PER_MAC, narrow_bytes
from .residence import NOTHING, Kept, by_operation
from .simulator import Simulator


@dataclass(frozen=True)
class Sanger:
    """What the method adds to a `Hardware`.

    prediction_bits      of an operand of the prediction, where the hardware's has 8: one of
                         1, 2, 4, 8
    mac_split            how a MAC is split for such operands: a name of
                         `precision.PRODUCTS_PER_MAC`. "bit_fusion" makes four products of 4
                         bits a cycle, "subword_parallel" two
    mask_bits_per_cycle  of the predicted mask, that the packer reads in a cycle
    units_held           how many units' masks and scores the buffers hold at once

    Raises ValueError, naming the parameter, for another number of bits, another split or a
    count below 1.
    """

    prediction_bits: int = 4  # the paper's
    mac_split: str = "bit_fusion"  # choice: see the head of this file
    # Its released hardware (hatsu3/Sanger, pe_row/pack.scala) takes one bit of each row of a
    # tile, and its array has 64 rows (bench_sanger.py: 64 x 16 MACs).
    mask_bits_per_cycle: int = 64
    units_held: int = 2  # choice: one is packed while the other is computed

    def __post_init__(self) -> None:
        if self.prediction_bits not in BITS or isinstance(self.prediction_bits, bool):
            raise ValueError(
                f"prediction_bits must be one of 1, 2, 4, 8, got {self.prediction_bits!r}"
            )
        one_of("mac_split", self.mac_split, tuple(PRODUCTS_PER_MAC))
        check_fields(self)

    @property
    def products_per_mac(self) -> int:
        """Products of the prediction that a MAC makes in a cycle."""
        return PRODUCTS_PER_MAC[self.mac_split](self.prediction_bits)


def costs(
    workload: Workload, hardware: Hardware, schedule: Schedule, batch: int, method: Sanger
) -> Iterator[OpCost]:
    """The whole network; attention as this file's head says."""
    return by_operation(
        workload,
        hardware,
        schedule,
        batch,
        lambda op, on_chip: attention_cost(op, hardware, batch, schedule, method, on_chip),
    )


def attention_cost(
    op: Attention,
    hardware: Hardware,
    batch: int = 1,
    schedule: Schedule = DEFAULT,
    method: Sanger = Sanger(),
    on_chip: Kept = NOTHING,
) -> OpCost:
    """One attention call; the array predicts and computes, all else runs beside it.

    Waited for besides: the first head's load, packing the last rows predicted, the softmax of the
    last group of rows, and banks.
    """
    schedule = schedule_of(hardware, schedule)
    kept_rows = _kept_rows(op)
    images, tile = op.windows * batch, _tile(op, hardware, kept_rows, method)
    heads = _heads_together(op, hardware, images, tile, kept_rows, method, schedule)
    call = _Call(op, hardware, schedule, images, method, kept_rows, tile, heads, on_chip)
    busy, held, loads = call.busy(), call.held, call.loads
    load = first_load(loads, call.heads, on_chip.size_bytes(op, hardware), hardware)
    phases = pipelined(call.array(), call.waits(), busy, load)
    executed = call.kept * (op.key_dim + op.value_dim)
    predicted = op.entries * batch * op.key_dim
    slots = held.rows * held.width
    return OpCost(
        op.name,
        "attention",
        sum(phases.values()),
        phases,
        macs=executed + -(-predicted // method.products_per_mac),
        kept_macs=executed,
        traffic=(*call.traffic(), *sum_traffic(*call.summed)),
        busy=busy,
        details={
            "queries_a_tile": tile,
            "heads_a_unit": heads,
            "lines_used": held.height,
            "packed_rows": held.rows,
            "packed_fill": call.kept / slots if slots else 0.0,
            f"predicted_{method.prediction_bits}bit_products": predicted,
        },
    )


@dataclass(frozen=True, eq=False)
class _Call:
    """One call on ``images``: entries kept in each row, int64 [heads, queries], the queries of
    a unit (``tile``) and its heads, and the heads that are on chip when it begins."""

    op: Attention
    hardware: Hardware
    schedule: Schedule
    images: int
    method: Sanger
    kept_rows: np.ndarray
    tile: int
    heads_a_unit: int
    on_chip: Kept

    @property
    def starts(self) -> range:
        """The first query of each tile."""
        return range(0, self.op.queries, self.tile)

    @property
    def heads(self) -> int:
        """Heads of all images."""
        return self.images * self.op.heads

    @property
    def kept(self) -> int:
        """Entries kept, of all images."""
        return int(self.kept_rows.sum()) * self.images

    @property
    def row_reads(self) -> int:
        """Cycles in which the packer reads one row of the mask."""
        return -(-self.op.keys // self.method.mask_bits_per_cycle)

    # ------------------------------------------------------------ prediction

    @cached_property
    def predicted(self) -> list[tuple[int, int, Layout]]:
        """(rows, how often, layout) of the predicted products: of whole tiles, of the last."""
        last = self.op.queries - self.starts[-1]
        counts = {self.tile: 0, last: 0}
        counts[self.tile] += self.heads * (len(self.starts) - 1)
        counts[last] += self.heads
        return [(rows, n, self._prediction(rows, n)) for rows, n in counts.items() if n]

    def _prediction(self, rows: int, count: int) -> Layout:
        """The layout that has its rows predicted and packed first; of those near that, the one
        that moves the fewest bytes."""
        steps = -(-self.op.key_dim // self.method.products_per_mac)
        how = self.hardware, self.schedule
        tried = candidates(rows, self.op.keys, steps, *how, count)
        return least(tried, lambda one: one.cycles(count) + self._packing(rows, one), *how)

    def _packing(self, rows: int, layout: Layout) -> int:
        """Cycles in which the rows of a product that are predicted last are packed."""
        return min(rows, layout.stripe) * self.row_reads

    @cached_property
    def summed(self) -> tuple[int, int]:
        """Bytes of the prediction's partial sums, and of them what is spilled to DRAM."""
        return summed_bytes([(n, one) for _, n, one in self.predicted], self.hardware)

    @cached_property
    def held(self) -> Held:
        """Its packed rows in the array."""
        how = self.hardware, self.schedule, self.images, self.tile, self.heads_a_unit
        return PackedCall(self.op, *how).held()

    # ------------------------------------------------------------ time

    def array(self) -> dict[str, int]:
        """Cycles of the MAC lines."""
        predicted = sum(layout.cycles(count) for _, count, layout in self.predicted)
        return {"predict": predicted, "sddmm": self.held.sddmm, "spmm": self.held.spmm}

    def busy(self) -> dict[str, int]:
        """Cycles in which each part works."""
        moved = sum(self.loads.values()) + self.stored + 2 * self.summed[1]
        once = int(self.kept_rows.sum())
        return {
            "MAC lines": sum(self.array().values()),
            "DRAM": self.hardware.dram_cycles(moved),
            "packing": self.heads * self.op.queries * self.row_reads,
            "softmax": self.images * -(-once // self.hardware.softmax_lanes),
        }

    def waits(self) -> dict[str, int]:
        """Cycles in which the array waits."""
        hardware, (rows, _, layout) = self.hardware, self.predicted[-1]
        last = -(-self.held.last_scores // hardware.softmax_lanes)
        return {
            "pack": self._packing(rows, layout),
            "softmax": last + hardware.softmax_latency_cycles,
            "gather": self.held.waited,
        }

    # ------------------------------------------------------------ bytes

    @cached_property
    def loads(self) -> dict[str, int]:
        """Bytes from DRAM by tensor, of heads that are not on chip. Where K does not fit, each
        tile of queries loads it narrow to predict and whole to compute; V likewise again for
        each tile."""
        op, size, tiles = self.op, self.hardware.operand_bytes, len(self.starts)
        keys, values = op.keys * op.key_dim * size, op.keys * op.value_dim * size
        if keys > self.hardware.k_buffer_bytes:
            keys = tiles * (keys + narrow_bytes(keys, self.method.prediction_bits))
        if values > self.hardware.v_buffer_bytes:
            values *= tiles
        queries = op.queries * op.key_dim * size
        loads = {"Q": self.heads * queries, "K": self.heads * keys, "V": self.heads * values}
        kept = self.on_chip.size_bytes(op, self.hardware)
        return {name: loaded - kept[name] for name, loaded in loads.items()}

    @property
    def stored(self) -> int:
        """Bytes of the output."""
        return self.heads * self.op.queries * self.op.value_dim * self.hardware.operand_bytes

    def reads(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes that the buffers give and that the lines take, by tensor. The prediction reads
        as its layouts do; computing reads a query, a key and a value once a group, and its lines
        take a query once a packed piece, a key and a value once a kept entry."""
        op, held, size = self.op, self.held, self.hardware.operand_bytes
        step = narrow_bytes(self.method.products_per_mac * size, self.method.prediction_bits)
        queries = sum(count * one.left_reads * step for _, count, one in self.predicted)
        keys = sum(count * one.right_reads * step for _, count, one in self.predicted)
        given = {
            "Q": queries + held.query_reads * op.key_dim * size,
            "K": keys + held.key_reads * op.key_dim * size,
            "V": held.key_reads * op.value_dim * size,
        }
        taken = {
            "Q": queries + held.pieces * op.key_dim * size,
            "K": keys + self.kept * op.key_dim * size,
            "V": self.kept * op.value_dim * size,
        }
        return given, taken

    def traffic(self) -> tuple[Traffic, ...]:
        """Bytes at the DRAM, the buffers and the lines."""
        (given, taken), loads = self.reads(), self.loads
        rows = [Traffic(name, "dram", loaded, 0) for name, loaded in loads.items()]
        rows.append(Traffic("output", "dram", 0, self.stored))
        filled = self.on_chip.size_bytes(self.op, self.hardware)
        rows += [Traffic(name, "buffer", given[name], loads[name] + filled[name]) for name in given]
        rows += [Traffic(name, "lines", taken[name], 0) for name in taken]
        mask = self.heads * self.op.queries * -(-self.op.keys // 8)
        scores = self.kept * self.hardware.score_bytes
        rows += [
            Traffic("index", "buffer", mask, mask),
            Traffic("scores", "buffer", 3 * scores, 2 * scores),
            Traffic("output", "buffer", self.stored, self.stored),
        ]
        return tuple(rows)


def _kept_rows(op: Attention) -> np.ndarray:
    if op.masks is None:
        return np.full((op.heads, op.queries), op.keys, dtype=np.int64)
    return np.stack([kept_by_row(mask) for mask in op.masks])


def _tile(op: Attention, hardware: Hardware, kept: np.ndarray, method: Sanger) -> int:
    """Queries of a unit, as many as fit: the masks and scores of as many units as are held at
    once, and one unit's Q."""
    for tiles in range(1, op.queries + 1):
        tile = -(-op.queries // tiles)
        needs = _needs(op, hardware, tile, kept, method)
        if all(getattr(hardware, name) >= need for name, need in needs.items()):
            return tile
    needs = _needs(op, hardware, 1, kept, method)
    name = next(name for name, need in needs.items() if getattr(hardware, name) < need)
    raise ValueError(
        f"{op.name}: one query needs {needs[name]} bytes, {name} is {getattr(hardware, name)}"
    )


def _needs(
    op: Attention, hardware: Hardware, tile: int, kept: np.ndarray, method: Sanger
) -> dict[str, int]:
    """Bytes of each buffer that units of ``tile`` queries of one head need."""
    scores = int(np.add.reduceat(kept, range(0, op.queries, tile), axis=1).max())
    return {
        "index_buffer_bytes": method.units_held * tile * -(-op.keys // 8),
        "output_buffer_bytes": method.units_held * scores * hardware.score_bytes,
        "q_buffer_bytes": tile * op.key_dim * hardware.operand_bytes,
    }


def _heads_together(
    op: Attention,
    hardware: Hardware,
    images: int,
    tile: int,
    kept: np.ndarray,
    method: Sanger,
    schedule: Schedule,
) -> int:
    """Heads of a unit: as many as the buffers hold with the schedule's dataflow "best", else 1."""
    if schedule.dense_dataflow != "best":
        return 1
    size = hardware.operand_bytes
    needs = _needs(op, hardware, tile, kept, method) | {
        "k_buffer_bytes": op.keys * op.key_dim * size,
        "v_buffer_bytes": op.keys * op.value_dim * size,
    }
    fit = [getattr(hardware, name) // need for name, need in needs.items() if need]
    return max(min(*fit, images * op.heads), 1)


SANGER = Simulator(
    "sanger",
    costs,
    "finds the same pattern anew for every image, by a dense 4-bit product",
    parameters=Sanger(),
)

__getattr__ = old_names(__name__)
