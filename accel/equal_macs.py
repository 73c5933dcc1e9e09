"""Machines of as many MACs in all: where a machine has a codec, its MACs are taken from the lines.

By default machines are compared with equal lines, and ViTCoD's encoder and decoder come on top.
Here a total is given instead. A machine that runs a codec is cut into lines, encoder and decoder
by a search; any other has all of the total as lines. MACs a line stay as they are, because a
bank's word, and with it every port, is that wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..workload import Workload
from .hardware import Hardware
from .report.report import OpCost, Report
from .report.silicon import uses_codec
from .schedule import DEFAULT, Schedule
from .simulators.registry import simulator_named
from .simulators.simulator import Simulator, without_parts

COARSE = 8
"""Counts of lines that the search tries first, evenly from few to all."""

NEAR = 1.01
"""Lines that slow attention down by less still serve the products beside it."""


def with_equal_macs(
    workload: Workload,
    hardware: Hardware,
    simulator: str,
    total_macs: int,
    batch: int = 1,
    *,
    schedule: Schedule = DEFAULT,
    parameters: Any = None,
) -> Hardware:
    """``hardware`` with its MACs cut up anew: at most ``total_macs`` in all, encoder and decoder
    included, for what ``simulator`` does with ``workload``.

    With a codec the cut is searched: `COARSE` counts of lines, then ever closer around the best of
    them, down to single lines. For each, the encoder is the smallest that the products before it
    hide, and the decoder has the rest. The cut of the fewest cycles is taken: attention, and what
    the encoder adds to products. The search is the same every time, but does not try every cut.

    Without a codec encoder and decoder have no MACs, and all MACs are lines; where the lines of
    ``hardware`` are fewer and attention is more than 1 % faster on them, it has those.

    Raises ValueError for a total that is too small for a line and the codec, and as `simulate`.
    """
    entry = simulator_named(simulator)
    coded = entry.stepped and any(
        op.codec for op in without_parts(workload, entry.without).attention
    )
    least = hardware.macs_per_line + (2 if coded else 0)
    if isinstance(total_macs, bool) or not isinstance(total_macs, int) or total_macs < least:
        raise ValueError(
            f"total_macs must be an integer >= {least} for {simulator!r} (a line of "
            f"{hardware.macs_per_line} MACs{', an encoder and a decoder' if coded else ''}), "
            f"got {total_macs!r}"
        )
    tried = _Tried(entry, workload, hardware, batch, schedule, parameters)
    return _coded_cut(tried, total_macs) if coded else _uncoded_cut(tried, total_macs)


class _Tried:
    """Cuts of one machine that were simulated, each once: cycles by cut."""

    def __init__(
        self,
        entry: Simulator,
        workload: Workload,
        hardware: Hardware,
        batch: int,
        schedule: Schedule,
        parameters: Any,
    ) -> None:
        self.hardware, self.encoder = hardware, 1
        self._run = lambda cut: entry(workload, cut, batch, schedule, parameters)
        self.cycles: dict[Hardware, int] = {}

    def report(self, cut: Hardware) -> Report:
        """Of ``cut``, whose cycles are remembered."""
        report = self._run(cut)
        self.cycles[cut] = report.attention_cycles + sum(map(_encoder_beyond, report.ops))
        return report

    def best(self) -> Hardware:
        """The cut of the fewest cycles; of two, the one with more lines."""
        return min(self.cycles, key=lambda cut: (self.cycles[cut], -cut.lines))


def _uncoded_cut(tried: _Tried, total: int) -> Hardware:
    hardware = replace(tried.hardware, encoder_macs=0, decoder_macs=0)
    lines = total // hardware.macs_per_line
    whole = replace(hardware, lines=lines)
    if hardware.lines >= lines:
        return whole
    for cut in (whole, hardware):
        tried.report(cut)
    slower = tried.cycles[whole] > NEAR * tried.cycles[hardware]
    return hardware if slower else whole


def _coded_cut(tried: _Tried, total: int) -> Hardware:
    most = (total - 2) // tried.hardware.macs_per_line
    step = max(most // COARSE, 1)
    counts = {*range(step, most + 1, step), most}
    if tried.hardware.total_macs <= total:
        tried.report(tried.hardware)
    seen: set[int] = set()
    while True:
        for lines in sorted(counts - seen, reverse=True):
            _try_lines(tried, lines, total)
        seen |= counts
        if step == 1:
            return tried.best()
        step = -(-step // 2)
        centre = tried.best().lines
        counts = {lines for lines in (centre - step, centre + step) if 1 <= lines <= most}


def _try_lines(tried: _Tried, lines: int, total: int) -> None:
    """Simulate ``lines`` lines with the smallest encoder that is hidden, and the rest as decoder.

    What an encoder must do is only known from a run: the first is one with the last encoder.
    """
    rest = total - lines * tried.hardware.macs_per_line
    for encoder in _encoders(tried, rest):
        cut = replace(
            tried.hardware, lines=lines, encoder_macs=encoder, decoder_macs=rest - encoder
        )
        tried.encoder = _hidden_encoder(tried.report(cut))


def _encoders(tried: _Tried, rest: int) -> Iterator[int]:
    """The last encoder, and where that was not the right one, the right one."""
    first = min(tried.encoder, rest - 1)
    yield first
    second = min(tried.encoder, rest - 1)
    if second != first:
        yield second


def _hidden_encoder(report: Report) -> int:
    """MACs of the smallest encoder that no product of the run waits for."""
    return max([1, *(-(-op.codec_macs // _others(op)) for op in _encoded(report))])


def _encoded(report: Report) -> list[OpCost]:
    """Products whose results pass the encoder."""
    return [op for op in report.ops if op.busy.get("encoder")] if uses_codec(report) else []


def _others(op: OpCost) -> int:
    """Cycles of the busiest resource but the encoder."""
    return max([1, *(cycles for name, cycles in op.busy.items() if name != "encoder")])


def _encoder_beyond(op: OpCost) -> int:
    """Cycles that an operation takes only because of the encoder."""
    return max(op.busy.get("encoder", 0) - _others(op), 0)
