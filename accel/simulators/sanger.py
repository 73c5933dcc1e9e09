"""Sanger (MICRO 2021) on the hardware's MACs: a mask predicted and packed for every image.

Modelled: for every head a dense Q K^T of 4-bit operands (`Sanger.prediction_bits`), two
products a MAC a cycle; the threshold; reading the mask that comes out, packing it into rows
of the array's width (long rows split, short ones and remainders side by side); SDDMM and SpMM
with the scores held in the array, one packed entry a MAC; softmax on the shared unit; Q, K, V
and the output through DRAM, but for the heads that stay on chip after the projection
(`residence`). The workload's mask is taken as the one that the prediction finds,
the same for each image of a batch; another image's mask is another workload. Units are a head
and a tile of queries, whose mask, scores and Q fit their buffers.

Not modelled, each in Sanger's favour: the softmax that its algorithm puts before the
threshold, bank conflicts of the gathered keys and values, the sums of split rows; the
packer keeps all rows of a tile open. And one against it: its released hardware predicts on
an array of 4-bit MACs of its own, beside the other; at equal MACs there is no such array. A
codec is not used. Dense products as in `sievit.accel.products`.
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
from ..report.report import OpCost, Traffic
from ..schedule import DEFAULT, Schedule
from .overlap import kept_by_row, pipelined, product_cycles
from .residence import NOTHING, Kept, by_operation
from .simulator import Simulator


@dataclass(frozen=True)
class Sanger:
    """What the method adds to a `Hardware`.

    prediction_bits      of an operand of the prediction, where the hardware's has 8: one of
                         1, 2, 4, 8. A MAC makes 8 / prediction_bits of its products a cycle
    mask_bits_per_cycle  of the predicted mask, that the packer reads in a cycle
    units_held           how many units' masks and scores the buffers hold at once

    Raises ValueError, naming the parameter, for another number of bits or a count below 1.
    """

    prediction_bits: int = 4  # the paper's
    # Its released hardware (hatsu3/Sanger, pe_row/pack.scala) takes one bit of each row of a
    # tile, and its array has 64 rows (bench_sanger.py: 64 x 16 MACs).
    mask_bits_per_cycle: int = 64
    units_held: int = 2  # choice: one is packed while the other is computed

    def __post_init__(self) -> None:
        if self.prediction_bits not in (1, 2, 4, 8) or isinstance(self.prediction_bits, bool):
            raise ValueError(
                f"prediction_bits must be one of 1, 2, 4, 8, got {self.prediction_bits!r}"
            )
        check_fields(self)

    @property
    def products_per_mac(self) -> int:
        """Products of the prediction that a MAC makes in a cycle; its operands are that many
        times smaller than the hardware's."""
        return 8 // self.prediction_bits


@dataclass(frozen=True)
class Packed:
    """Rows of a tile after packing: array rows filled, and pieces they were cut into."""

    rows: int
    pieces: int


def pack(kept: np.ndarray, width: int) -> Packed:
    """Array rows that hold ``kept`` entries of each mask row, [rows], ``width`` to a row.

    A row is split into full pieces and a remainder; remainders go, in order, into the
    fullest open array row that has room (best fit).
    """
    kept = np.asarray(kept)
    full, rests = int((kept // width).sum()), kept % width
    room = [0] * (width + 1)  # array rows by free places
    opened = 0
    for rest in rests[rests > 0].tolist():
        free = next((f for f in range(rest, width) if room[f]), width)
        if free == width:
            opened += 1
        else:
            room[free] -= 1
        room[free - rest] += 1
    return Packed(full + opened, full + int(np.count_nonzero(rests)))


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

    Waited for besides: the first unit's load and packing, the last unit's softmax.
    """
    kept_rows = _kept_rows(op)
    tile = _tile(op, hardware, kept_rows, method)
    call = _Call(op, hardware, schedule, op.windows * batch, method, kept_rows, tile, on_chip)
    array, busy = call.array(), call.busy()
    phases = pipelined(array, call.exposed(), busy)
    executed = call.kept * (op.key_dim + op.value_dim)
    predicted = op.entries * batch * op.key_dim
    slots = call.packed_rows * hardware.macs_per_line
    return OpCost(
        op.name,
        "attention",
        sum(phases.values()),
        phases,
        macs=executed + -(-predicted // method.products_per_mac),
        kept_macs=executed,
        traffic=call.traffic(),
        busy=busy,
        details={
            "queries_a_tile": tile,
            "packed_rows": call.packed_rows * call.images,
            "packed_fill": call.kept_once / slots if slots else 0.0,
            f"predicted_{method.prediction_bits}bit_products": predicted,
        },
    )


@dataclass(frozen=True, eq=False)
class _Call:
    """One call on ``images``: entries kept in each row, int64 [heads, queries], the queries of
    a unit (``tile``), and the heads that are on chip when it begins."""

    op: Attention
    hardware: Hardware
    schedule: Schedule
    images: int
    method: Sanger
    kept_rows: np.ndarray
    tile: int
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
    def kept_once(self) -> int:
        """Entries kept, of one image."""
        return int(self.kept_rows.sum())

    @property
    def kept(self) -> int:
        """Entries kept, of all images."""
        return self.kept_once * self.images

    @cached_property
    def packed(self) -> list[Packed]:
        """Each unit of one image after packing."""
        width = self.hardware.macs_per_line
        return [
            pack(rows[s : s + self.tile], width) for rows in self.kept_rows for s in self.starts
        ]

    @property
    def packed_rows(self) -> int:
        """Array rows filled, of one image."""
        return sum(unit.rows for unit in self.packed)

    @property
    def row_reads(self) -> int:
        """Cycles in which the packer reads one row of the mask."""
        return -(-self.op.keys // self.method.mask_bits_per_cycle)

    def array(self) -> dict[str, int]:
        """Cycles of the MAC lines."""
        op, tiles = self.op, len(self.starts)
        narrow = -(-op.key_dim // self.method.products_per_mac)
        sizes = [self.tile] * (tiles - 1) + [min(self.tile, op.queries - self.starts[-1])]
        predicted = sum(
            product_cycles(rows, op.keys, narrow, self.hardware, self.schedule) for rows in sizes
        )
        return {
            "predict": self.heads * predicted,
            "sddmm": self.images * self._held(op.key_dim),
            "spmm": self.images * self._held(op.value_dim),
        }

    def _held(self, dim: int) -> int:
        """Cycles of all units with scores held in the array, ``dim`` a tile of packed rows."""
        height, width = self.hardware.lines, self.hardware.macs_per_line
        skewed = schedule_of(self.hardware, self.schedule).dense_fill == "per_tile"
        return sum(held_cycles(unit.rows, dim, height, width, skewed) for unit in self.packed)

    def busy(self) -> dict[str, int]:
        """Cycles in which each part works."""
        loaded = sum(self.loads.values())
        return {
            "MAC lines": sum(self.array().values()),
            "DRAM": self.hardware.dram_cycles(loaded + self.stored),
            "packing": self.heads * self.op.queries * self.row_reads,
            "softmax": self.images * -(-self.kept_once // self.hardware.softmax_lanes),
        }

    def exposed(self) -> dict[str, int]:
        """Cycles before the first product and after the last one."""
        hardware, units = self.hardware, len(self.packed) * self.images
        last = int(self.kept_rows[:, self.starts[-1] :].sum(1).max())
        fetched = hardware.dram_cycles(sum(self.loads.values()))
        return {
            "load": -(-fetched // units) + hardware.dram_latency_cycles,
            "pack": self.tile * self.row_reads,
            "softmax": -(-last // hardware.softmax_lanes) + hardware.softmax_latency_cycles,
        }

    @cached_property
    def loads(self) -> dict[str, int]:
        """Bytes from DRAM by tensor, of heads that are not on chip. Where K does not fit, each
        tile of queries loads it narrow to predict and whole to compute; V likewise again for
        each tile."""
        op, size, tiles = self.op, self.hardware.operand_bytes, len(self.starts)
        keys, values = op.keys * op.key_dim * size, op.keys * op.value_dim * size
        if keys > self.hardware.k_buffer_bytes:
            keys = tiles * (keys + self._narrow_bytes(keys))
        if values > self.hardware.v_buffer_bytes:
            values *= tiles
        queries = op.queries * op.key_dim * size
        loads = {"Q": self.heads * queries, "K": self.heads * keys, "V": self.heads * values}
        kept = self.on_chip.size_bytes(op, self.hardware)
        return {name: loaded - kept[name] for name, loaded in loads.items()}

    def _narrow_bytes(self, whole: int) -> int:
        """Bytes of the prediction's operands, of ``whole`` bytes as the hardware has them."""
        return -(-whole // self.method.products_per_mac)

    @property
    def stored(self) -> int:
        """Bytes of the output."""
        return self.heads * self.op.queries * self.op.value_dim * self.hardware.operand_bytes

    def reads(self) -> dict[str, int]:
        """Bytes that the array reads by tensor. Predicting takes Q narrow once a column tile
        and K once a row tile; computing reads a query once a packed piece, a key and a value
        once a kept entry."""
        op, hardware = self.op, self.hardware
        size, width, height = hardware.operand_bytes, hardware.macs_per_line, hardware.lines
        queries = self._narrow_bytes(op.queries * op.key_dim * size) * -(-op.keys // width)
        keys = self._narrow_bytes(op.keys * op.key_dim * size) * -(-op.queries // height)
        pieces = self.images * sum(unit.pieces for unit in self.packed)
        return {
            "Q": self.heads * queries + pieces * op.key_dim * size,
            "K": self.heads * keys + self.kept * op.key_dim * size,
            "V": self.kept * op.value_dim * size,
        }

    def traffic(self) -> tuple[Traffic, ...]:
        """Bytes at the DRAM, the buffers and the lines."""
        reads, loads = self.reads(), self.loads
        rows = [Traffic(name, "dram", loaded, 0) for name, loaded in loads.items()]
        rows.append(Traffic("output", "dram", 0, self.stored))
        filled = self.on_chip.size_bytes(self.op, self.hardware)
        rows += [Traffic(name, "buffer", reads[name], loads[name] + filled[name]) for name in reads]
        rows += [Traffic(name, "lines", reads[name], 0) for name in reads]
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


def held_cycles(rows: int, dim: int, height: int, width: int, skewed: bool) -> int:
    """Cycles of ``rows`` packed rows with scores held in the array, ``dim`` a tile of them;
    the array's skew once, or for each tile."""
    tiles, skew = -(-rows // height), height + width - 2
    if not tiles:
        return 0
    return tiles * dim + skew * (tiles if skewed else 1)


def _tile(op: Attention, hardware: Hardware, kept: np.ndarray, method: Sanger) -> int:
    """Queries of a unit, as many as fit: the masks and scores of as many units as are held at
    once, and one unit's Q."""
    for tiles in range(1, op.queries + 1):
        tile = -(-op.queries // tiles)
        if not _shortages(op, hardware, tile, kept, method):
            return tile
    name, need = next(iter(_shortages(op, hardware, 1, kept, method).items()))
    raise ValueError(
        f"{op.name}: one query needs {need} bytes, {name} is {getattr(hardware, name)}"
    )


def _shortages(
    op: Attention, hardware: Hardware, tile: int, kept: np.ndarray, method: Sanger
) -> dict[str, int]:
    """The buffers that are too small for units of ``tile`` queries, and what they need."""
    scores = int(np.add.reduceat(kept, range(0, op.queries, tile), axis=1).max())
    needs = {
        "index_buffer_bytes": method.units_held * tile * -(-op.keys // 8),
        "output_buffer_bytes": method.units_held * scores * hardware.score_bytes,
        "q_buffer_bytes": tile * op.key_dim * hardware.operand_bytes,
    }
    return {name: need for name, need in needs.items() if getattr(hardware, name) < need}


SANGER = Simulator(
    "sanger",
    costs,
    "finds the same pattern anew for every image, by a dense 4-bit product",
    parameters=Sanger(),
)

__getattr__ = old_names(__name__)
