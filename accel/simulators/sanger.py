"""Sanger (MICRO 2021) on the hardware's MACs: a mask predicted and packed for every image.

Modelled: for every head a dense Q K^T of 4-bit operands, two products a MAC a cycle; the
threshold; reading the mask that comes out, packing it into rows of the array's width (long
rows split, short ones and remainders side by side); SDDMM and SpMM with the scores held in
the array, one packed entry a MAC; softmax on the shared unit; Q, K, V and the output
through DRAM, but for the heads that stay on chip after the projection (`residence`). The
workload's mask is taken as the one that the prediction finds, the same for each image of a
batch; another image's mask is another workload. Units are a head and a tile of queries, whose
mask, scores and Q fit their buffers.

Not modelled, each in Sanger's favour: the softmax that its algorithm puts before the
threshold, bank conflicts of the gathered keys and values, the sums of split rows; the
packer keeps all rows of a tile open. And one against it: its released hardware predicts on
an array of 4-bit MACs of its own, beside the other; at equal MACs there is no such array. A
codec is not used. Dense products as in `sievit.accel.products`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

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

    mask_bits_per_cycle  of the predicted mask, that the packer reads in a cycle

    Raises ValueError for a count below 1.
    """

    # Its released hardware (hatsu3/Sanger, pe_row/pack.scala) takes one bit of each row of a
    # tile, and its array has 64 rows (bench_sanger.py: 64 x 16 MACs).
    mask_bits_per_cycle: int = 64

    def __post_init__(self) -> None:
        bits = self.mask_bits_per_cycle
        if isinstance(bits, bool) or not isinstance(bits, int) or bits < 1:
            raise ValueError(f"mask_bits_per_cycle must be an integer >= 1, got {bits!r}")


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
    tile = _tile(op, hardware, kept_rows)
    starts = range(0, op.queries, tile)
    images = op.windows * batch
    width, height = hardware.macs_per_line, hardware.lines
    packed = [pack(rows[s : s + tile], width) for rows in kept_rows for s in starts]
    last = min(tile, op.queries - starts[-1])
    sizes = [tile] * (len(starts) - 1) + [last]
    half = -(-op.key_dim // 2)
    skewed = schedule_of(hardware, schedule).dense_fill == "per_tile"
    scored = sum(product_cycles(rows, op.keys, half, hardware, schedule) for rows in sizes)
    predict = images * op.heads * scored
    sddmm = images * sum(_held(p.rows, op.key_dim, height, width, skewed) for p in packed)
    spmm = images * sum(_held(p.rows, op.value_dim, height, width, skewed) for p in packed)
    kept, lanes = int(kept_rows.sum()), hardware.softmax_lanes
    softmax = [-(-int(kept_rows[:, s : s + tile].sum(1).max()) // lanes) for s in starts]
    row_reads = -(-op.keys // method.mask_bits_per_cycle)
    loads, stored = _dram(op, hardware, batch, len(starts), on_chip)
    dram = hardware.dram_cycles(sum(loads.values()) + stored)
    units = len(packed) * images
    first = -(-hardware.dram_cycles(sum(loads.values())) // units)
    array = {"predict": predict, "sddmm": sddmm, "spmm": spmm}
    exposed = {
        "load": first + hardware.dram_latency_cycles,
        "pack": tile * row_reads,
        "softmax": softmax[-1] + hardware.softmax_latency_cycles,
    }
    busy = {
        "MAC lines": sum(array.values()),
        "DRAM": dram,
        "packing": images * op.heads * op.queries * row_reads,
        "softmax": images * -(-kept // lanes),
    }
    phases = pipelined(array, exposed, busy)
    executed = kept * images * (op.key_dim + op.value_dim)
    predicted = op.entries * batch * op.key_dim
    slots = sum(p.rows for p in packed) * width
    return OpCost(
        op.name,
        "attention",
        sum(phases.values()),
        phases,
        macs=executed + -(-predicted // 2),
        kept_macs=executed,
        traffic=_traffic(op, hardware, images, kept, packed, loads, stored, on_chip),
        busy=busy,
        details={
            "queries_a_tile": tile,
            "packed_rows": sum(p.rows for p in packed) * images,
            "packed_fill": kept / slots if slots else 0.0,
            "predicted_4bit_products": predicted,
        },
    )


def _kept_rows(op: Attention) -> np.ndarray:
    if op.masks is None:
        return np.full((op.heads, op.queries), op.keys, dtype=np.int64)
    return np.stack([kept_by_row(mask) for mask in op.masks])


def _held(rows: int, dim: int, height: int, width: int, skewed: bool) -> int:
    """Cycles of ``rows`` packed rows with scores held in the array, ``dim`` a tile of them;
    the array's skew once, or for each tile."""
    tiles, skew = -(-rows // height), height + width - 2
    if not tiles:
        return 0
    return tiles * dim + skew * (tiles if skewed else 1)


def _tile(op: Attention, hardware: Hardware, kept: np.ndarray) -> int:
    """Queries of a unit, as many as fit: two units' masks and scores, and one unit's Q."""
    for tiles in range(1, op.queries + 1):
        tile = -(-op.queries // tiles)
        if not _shortages(op, hardware, tile, kept):
            return tile
    name, need = next(iter(_shortages(op, hardware, 1, kept).items()))
    raise ValueError(
        f"{op.name}: one query needs {need} bytes, {name} is {getattr(hardware, name)}"
    )


def _shortages(op: Attention, hardware: Hardware, tile: int, kept: np.ndarray) -> dict[str, int]:
    """The buffers that are too small for units of ``tile`` queries, and what they need."""
    scores = int(np.add.reduceat(kept, range(0, op.queries, tile), axis=1).max())
    needs = {
        "index_buffer_bytes": 2 * tile * -(-op.keys // 8),
        "output_buffer_bytes": 2 * scores * hardware.score_bytes,
        "q_buffer_bytes": tile * op.key_dim * hardware.operand_bytes,
    }
    return {name: need for name, need in needs.items() if getattr(hardware, name) < need}


def _dram(
    op: Attention, hardware: Hardware, batch: int, tiles: int, on_chip: Kept
) -> tuple[dict[str, int], int]:
    """Bytes loaded by tensor, of heads that are not on chip, and stored. Where K does not fit,
    each tile of queries loads it in 4 bits to predict and whole to compute; V likewise again for
    each tile."""
    heads, size = op.heads * op.windows * batch, hardware.operand_bytes
    keys, values = op.keys * op.key_dim * size, op.keys * op.value_dim * size
    if keys > hardware.k_buffer_bytes:
        keys = tiles * (keys + -(-keys // 2))
    if values > hardware.v_buffer_bytes:
        values *= tiles
    loads = {"Q": heads * op.queries * op.key_dim * size, "K": heads * keys, "V": heads * values}
    for name, kept in on_chip.size_bytes(op, hardware).items():
        loads[name] -= kept
    return loads, heads * op.queries * op.value_dim * size


def _traffic(
    op: Attention,
    hardware: Hardware,
    images: int,
    kept: int,
    packed: list[Packed],
    loads: dict[str, int],
    stored: int,
    on_chip: Kept,
) -> tuple[Traffic, ...]:
    """Prediction reads 4 bits of Q once a column tile and of K once a row tile; computing
    reads a query once a packed piece, a key and a value once a kept entry."""
    size, width, height = hardware.operand_bytes, hardware.macs_per_line, hardware.lines
    heads = images * op.heads
    q4 = heads * -(-op.queries * op.key_dim * size // 2) * -(-op.keys // width)
    k4 = heads * -(-op.keys * op.key_dim * size // 2) * -(-op.queries // height)
    reads = {
        "Q": q4 + images * sum(p.pieces for p in packed) * op.key_dim * size,
        "K": k4 + images * kept * op.key_dim * size,
        "V": images * kept * op.value_dim * size,
    }
    rows = [Traffic(name, "dram", loaded, 0) for name, loaded in loads.items()]
    rows.append(Traffic("output", "dram", 0, stored))
    filled = on_chip.size_bytes(op, hardware)
    rows += [Traffic(name, "buffer", reads[name], loads[name] + filled[name]) for name in reads]
    rows += [Traffic(name, "lines", reads[name], 0) for name in reads]
    bits = heads * op.queries * -(-op.keys // 8)
    scores = images * kept * hardware.score_bytes
    rows += [
        Traffic("index", "buffer", bits, bits),
        Traffic("scores", "buffer", 3 * scores, 2 * scores),
        Traffic("output", "buffer", stored, stored),
    ]
    return tuple(rows)


SANGER = Simulator(
    "sanger",
    costs,
    "finds the same pattern anew for every image, by a dense 4-bit product",
    parameters=Sanger(),
)

__getattr__ = old_names(__name__)
