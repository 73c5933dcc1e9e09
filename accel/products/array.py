"""The MAC array and one dense product on it: dataflows in closed form.

An array of H = lines by W = MACs a line multiplies [M, K] by [K, N] in tiles. Output-stationary
(OS) keeps outputs in the array, weight-stationary (WS) the [K, N] operand, input-stationary (IS)
the [M, K] operand. With the "per_tile" fill policy each tile pays the array's skew; the sums are
then SCALE-Sim's (its "reported" cycle is one less):

    OS  ceil(M/H) ceil(N/W) (K + H + W - 2)
    WS  ceil(K/H) ceil(N/W) (M + 2H + W - 2)
    IS  ceil(K/H) ceil(M/W) (N + 2H + W - 2)

"back_to_back" lets tiles follow each other and pays the skew once. The named dataflows are these
sums. "best" looks further (`_best`): it leaves lines idle that only add skew, splits K over lines
that would be idle (split-K), and lets the products of a batch follow each other as tiles do.
Sizes are elements, times cycles.

Partial sums: under WS and IS a tile gives partial sums of its ceil(K/H) slices of K. They are
accumulators (`Hardware.accumulator_bytes`) in the output buffer, which reads and writes a word of
W of them a cycle: the rate at which the array gives them, so they take bytes and no time there.
WS has M x W of them alive at once, IS N x W. What of these does not fit the output buffer goes to
DRAM after each slice but the last and comes back before the next. An array whose K fits the
lines has none, and OS adds up in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

from ..hardware import Hardware, schedule_of
from ..schedule import DEFAULT, Schedule

NEAR = 1.01
"""Layouts that take at most this much of the fastest one's time count as equally fast: the
fewest bytes of the buffers then decide."""


@dataclass(frozen=True)
class Array:
    """What of a machine and its schedule decides how a product is laid out.

    height, width     lines, and MACs a line
    adds_per_cycle    words of W partial sums that the output buffer adds
    words_per_cycle   words of W operands that the buffers of Q, K and V read
    operand_bytes, accumulator_bytes  widths
    room              accumulators that the output buffer holds
    dataflow, orientation, per_tile   of the schedule
    """

    height: int
    width: int
    adds_per_cycle: int
    words_per_cycle: int
    operand_bytes: int
    accumulator_bytes: int
    room: int
    dataflow: str
    orientation: str
    per_tile: bool

    @classmethod
    def of(cls, hardware: Hardware, schedule: Schedule) -> Array:
        """Of a run."""
        used = schedule_of(hardware, schedule)
        return cls(
            hardware.lines,
            hardware.macs_per_line,
            hardware.output_banks,
            hardware.q_banks + hardware.k_banks + hardware.v_banks,
            hardware.operand_bytes,
            hardware.accumulator_bytes,
            hardware.output_buffer_bytes // hardware.accumulator_bytes,
            used.dense_dataflow,
            used.dense_orientation,
            used.dense_fill == "per_tile",
        )


@dataclass(frozen=True)
class Layout:
    """How the array computes a product [m, k] x [k, n].

    dataflow        "os", "ws" or "is"
    turned          under OS: columns of the result lie on the lines, rows on a line's MACs
    parts           of K that lines of one tile work on at once; 1 without split-K
    stream_cycles   from one such product to the next of a batch
    end_cycles      what the last product of a batch takes beyond that: skew, last adds
    left_reads, right_reads  elements that the array reads of either operand
    partial_sums    written to the output buffer, and read from it again
    live_sums       of them, what must be held at once
    stripe          rows of the result that are finished together, one stripe after the other;
                    m where none is before the end
    tile_results    of a tile: two of them are on their way out at once
    outputs         m x n
    """

    dataflow: str
    turned: bool
    parts: int
    stream_cycles: int
    end_cycles: int
    left_reads: int
    right_reads: int
    partial_sums: int
    live_sums: int
    stripe: int
    tile_results: int
    outputs: int

    def cycles(self, count: int = 1) -> int:
        """Of ``count`` products, one after the other."""
        return count * self.stream_cycles + self.end_cycles

    def spilled_sums(self, room: int) -> int:
        """Partial sums that are written to DRAM, and read from it again, where the output buffer
        holds ``room`` of them: the last slice of K is never written."""
        over = max(self.live_sums - room, 0)
        if not over:
            return 0
        slices = self.partial_sums // self.outputs
        return self.outputs * over // self.live_sums * (slices - 1)

    def buffer_bytes(self, array: Array) -> int:
        """That the array reads and writes for one product, its final results apart."""
        operands = (self.left_reads + self.right_reads) * array.operand_bytes
        return operands + 2 * self.partial_sums * array.accumulator_bytes

    @property
    def summary(self) -> str:
        """For reports."""
        if self.dataflow != "os":
            return self.dataflow
        side = "features" if self.turned else "tokens"
        split = f", K in {self.parts} parts" if self.parts > 1 else ""
        return f"os, {side} on lines{split}"


def array_cycles(m: int, n: int, k: int, hardware: Hardware, schedule: Schedule = DEFAULT) -> int:
    """Cycles of one product [m, k] x [k, n] by the schedule's dataflow, orientation and fill."""
    return laid_out(m, n, k, hardware, schedule).cycles()


def laid_out(
    m: int, n: int, k: int, hardware: Hardware, schedule: Schedule = DEFAULT, count: int = 1
) -> Layout:
    """How the schedule lays out ``count`` products [m, k] x [k, n] of a batch."""
    return _laid_out(m, n, k, count, Array.of(hardware, schedule))


def layouts(m: int, n: int, k: int, array: Array) -> tuple[Layout, ...]:
    """All that the schedule allows for a product [m, k] x [k, n]: one for a named dataflow and
    orientation."""
    sides = [side == "features_on_lines" for side in _orientations(array)]
    if array.dataflow == "best":
        return tuple(_best(m, n, k, array, sides))
    if array.dataflow == "os":
        return tuple(_output_stationary(m, n, k, turned, array) for turned in sides)
    return (_held(m, n, k, array.dataflow, array, array.height, following=False),)


@lru_cache(maxsize=4096)
def _laid_out(m: int, n: int, k: int, count: int, array: Array) -> Layout:
    """The fastest of `layouts`; of those near it the one that moves the fewest bytes, and of
    equal ones that with the narrowest stripes."""
    found = layouts(m, n, k, array)
    near = NEAR * min(layout.cycles(count) for layout in found)
    return min(
        (one for one in found if one.cycles(count) <= near),
        key=lambda one: (one.buffer_bytes(array), one.cycles(count), one.stripe),
    )


def _orientations(array: Array) -> tuple[str, ...]:
    if array.orientation == "best":
        return ("tokens_on_lines", "features_on_lines")
    return (array.orientation,)


# ---------------------------------------------------------------- the published closed forms


def _output_stationary(m: int, n: int, k: int, turned: bool, array: Array) -> Layout:
    """Every tile of the whole array, one product after the other."""
    on_lines, on_macs = (n, m) if turned else (m, n)
    rows, columns = _ceil(on_lines, array.height), _ceil(on_macs, array.width)
    skew, tiles = array.height + array.width - 2, rows * columns
    left, right = (rows, columns) if turned else (columns, rows)
    return Layout(
        "os",
        turned,
        parts=1,
        stream_cycles=tiles * (k + skew) if array.per_tile else tiles * k + skew,
        end_cycles=0,
        left_reads=m * k * left,
        right_reads=k * n * right,
        partial_sums=0,
        live_sums=0,
        stripe=min(array.width if turned else array.height, m),
        tile_results=array.height * array.width,
        outputs=m * n,
    )


def _held(
    m: int, n: int, k: int, dataflow: str, array: Array, height: int, following: bool
) -> Layout:
    """WS or IS on ``height`` lines: K lies on the lines, one operand stays tile by tile and the
    other streams past it. The next tile is loaded beside the one in work, a line a cycle; so is
    the first tile of a product ``following`` another of its batch."""
    stays, streams = (n, m) if dataflow == "ws" else (m, n)
    width = min(array.width, stays) if following else array.width
    slices, columns = _ceil(k, height), _ceil(stays, width)
    tiles, skew = slices * columns, 2 * height + width - 2
    between = max(streams, height)
    last = streams + skew - between
    stream, end = (tiles * between, last) if following else (tiles * between + last, 0)
    if array.per_tile:
        stream, end = tiles * (streams + skew), 0
    left, right = (columns, 1) if dataflow == "ws" else (1, columns)
    return Layout(
        dataflow,
        turned=False,
        parts=1,
        stream_cycles=stream,
        end_cycles=end,
        left_reads=m * k * left,
        right_reads=k * n * right,
        partial_sums=slices * m * n if slices > 1 else 0,
        live_sums=streams * min(width, stays) if slices > 1 else 0,
        stripe=min(width, m) if dataflow == "is" else m,
        tile_results=(height if following else array.height) * width,
        outputs=m * n,
    )


# ---------------------------------------------------------------- what "best" chooses from


def _best(m: int, n: int, k: int, array: Array, sides: list[bool]) -> Iterator[Layout]:
    """Layouts whose partial sums stay on chip: OS either way round with split-K, WS and IS, each
    on as many lines as pay."""
    for turned in sides:
        on_lines, on_macs = (n, m) if turned else (m, n)
        for height in _heights(on_lines, array.height):
            yield _split_k(on_lines, on_macs, k, turned, array, height)
    for dataflow in ("is", "ws"):
        for height in _heights(k, array.height):
            layout = _held(m, n, k, dataflow, array, height, following=True)
            if layout.live_sums <= array.room:
                yield layout


def _heights(side: int, lines: int) -> list[int]:
    """Lines of a tile that are tried for a side: all, halves of them, equal shares of the side.

    What is tried on a machine is tried on one of twice the lines too, so more lines are never
    slower by more than `NEAR` allows.
    """
    halves = {lines >> shift for shift in range(lines.bit_length())}
    shares = {_ceil(side, tiles) for tiles in (*range(1, 17), 24, 32, 48, 64)}
    return sorted((h for h in halves | shares if 0 < h <= min(lines, side)), reverse=True)


class _RowTiles(NamedTuple):
    """Several ``tiles`` of ``rows`` lines, K in ``parts``: cycles that one streams, and those of
    its adds."""

    tiles: int
    rows: int
    parts: int
    cycles: int
    adds: int


def _split_k(
    on_lines: int, on_macs: int, k: int, turned: bool, array: Array, height: int
) -> Layout:
    """OS with tiles of ``height`` rows, split-K where a tile leaves lines idle.

    A tile of r rows in p parts has p groups of r lines, each with operands of its own and
    ceil(K/p) of K. The output buffer adds the p partial sums, ``adds_per_cycle`` words of W a
    cycle, while the next tile streams.
    """
    full, rest = divmod(on_lines, height)
    columns, width = _ceil(on_macs, array.width), min(array.width, on_macs)
    tiles = [
        _RowTiles(count, rows, *_parts(rows, width, k, array))
        for count, rows in ((full, height), (1, rest))
        if count and rows
    ]
    stream, end = _tile_times(tiles, columns, width, array.per_tile)
    split = [tile for tile in tiles if tile.parts > 1]
    again = full + (rest > 0)
    left, right = (again, columns) if turned else (columns, again)
    m, n = (on_macs, on_lines) if turned else (on_lines, on_macs)
    return Layout(
        "os",
        turned,
        parts=max(tile.parts for tile in tiles),
        stream_cycles=stream,
        end_cycles=end,
        left_reads=m * k * left,
        right_reads=k * n * right,
        partial_sums=sum(tile.tiles * tile.rows * tile.parts * on_macs for tile in split),
        live_sums=max((2 * tile.parts * tile.rows * width for tile in split), default=0),
        stripe=width if turned else height,
        tile_results=height * width,
        outputs=m * n,
    )


def _tile_times(
    tiles: list[_RowTiles], columns: int, width: int, per_tile: bool
) -> tuple[int, int]:
    """(cycles from one product to the next, what the last one takes beyond): ``tiles`` one after
    the other in each of ``columns``. A tile keeps the lines while it streams, and until the tile
    before is added up; the last tile's adds are waited for. Skew is that of the lines and MACs of
    a group.
    """
    skews = [tile.rows + width - 2 for tile in tiles]
    if per_tile:
        each = zip(tiles, skews, strict=True)
        return columns * sum(t.tiles * (t.cycles + t.adds + skew) for t, skew in each), 0
    column, before = 0, tiles[-1].adds
    for tile in tiles:
        column += max(tile.cycles, before) + (tile.tiles - 1) * max(tile.cycles, tile.adds)
        before = tile.adds
    return columns * column, min(tiles[0].cycles, before) + max(skews)


def _parts(rows: int, width: int, k: int, array: Array) -> tuple[int, int, int]:
    """(parts of K, cycles that a tile of ``rows`` streams, cycles of its adds): those that take
    a tile's time least, on idle lines, with a word of the operand on the MACs for each part, and
    with room in the output buffer for the partial sums of two tiles."""
    room = array.room // (2 * rows * width)
    most = max(min(array.height // rows, array.words_per_cycle, k, room), 1)
    balanced = isqrt(k * array.adds_per_cycle // rows)

    def of(parts: int) -> tuple[int, int, int]:
        cycles = _ceil(k, parts)
        parts = _ceil(k, cycles)  # the fewest that take no longer
        return parts, cycles, _ceil(parts * rows, array.adds_per_cycle) if parts > 1 else 0

    tried = {1, min(max(balanced, 1), most), min(balanced + 1, most)}
    return min(map(of, sorted(tried)), key=lambda made: (max(made[1:]), made[0]))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
