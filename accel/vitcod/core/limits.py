"""What the compiled core's 64 bits can hold: amounts of a whole run, looked at before it.

Fields of the hardware are bounded one by one (`sievit.accel.hardware.RANGES`); products of
them with the size of a call are not. DRAM traffic is counted in 1/denominator bytes, so a
bandwidth that has no common factor with the clock makes the largest numbers.
"""

from __future__ import annotations

from fractions import Fraction

from ...dram.ddr4 import DRAM_TIMINGS
from ...hardware import Hardware
from ..mapping import Mapping
from ..program import K, Program, Q

LARGEST = 2**62
"""Half of what 64 bits hold: sums of two such numbers are still right."""


def held(amount: int) -> int:
    """A capacity or a rate as the core holds it: what no run can exhaust counts as unlimited."""
    return min(amount, LARGEST)


def check_limits(program: Program, mapping: Mapping) -> None:
    """Raises ValueError, naming the fields, for a run whose counts would not fit."""
    hardware, op = mapping.hardware, mapping.op
    rate = hardware.dram_bytes_per_cycle
    moved = int(program.transfers["bytes"].sum()) + int(program.transfers["room"].sum())
    _refuse_above(
        moved * rate.denominator + rate.numerator,
        f"{moved} bytes through a DRAM of {rate} bytes a cycle",
        f"dram_bytes_per_s {hardware.dram_bytes_per_s} and clock_hz {hardware.clock_hz} must "
        "have a larger common factor",
        mapping,
    )
    decoded = (program.tokens(Q) + program.tokens(K)) * mapping.decode_macs
    _refuse_above(
        decoded,
        f"{decoded} MACs of the decoder",
        f"heads {op.heads}, key_dim {op.key_dim} and the codec must be smaller",
        mapping,
    )
    cycles, clock = most_cycles(program, mapping), _clock(hardware)
    _refuse_above(
        cycles * max(hardware.lines, clock.numerator, clock.denominator),
        f"up to {cycles} cycles of {hardware.lines} lines",
        f"dram_bytes_per_s {hardware.dram_bytes_per_s} must be larger, or the _cycles fields, "
        f"lines {hardware.lines} and clock_hz {hardware.clock_hz} smaller",
        mapping,
    )


LINE_TICKS = 1000
"""Cycles of a DDR4 memory that one line takes at most: a choice, two refreshes and a closed row."""


def _clock(hardware: Hardware) -> Fraction:
    """Cycles of a stepped memory in one of the machine's; 1 in the flat model."""
    if hardware.dram_model == "flat":
        return Fraction(1)
    return Fraction(DRAM_TIMINGS[hardware.dram_timing].clock_hz, hardware.clock_hz)


def most_cycles(program: Program, mapping: Mapping) -> int:
    """About what a run takes at most: each part alone, nothing hidden behind another."""
    hardware, clock = mapping.hardware, _clock(mapping.hardware)
    rate, words = hardware.dram_bytes_per_cycle, mapping.key_words + mapping.value_words
    latency = (
        hardware.dram_latency_cycles + hardware.pipeline_cycles + hardware.reconfigure_cycles
        + hardware.softmax_latency_cycles + 1
    )  # fmt: skip
    moved = int(program.transfers["bytes"].sum())
    memory = moved * rate.denominator // rate.numerator
    memory += int(LINE_TICKS * len(program.bursts) / clock)
    scores, rows = int(program.row_scores.sum()), len(program.row_scores)
    lines = scores * (words + 8) + rows * mapping.value_words * hardware.lines
    tokens = program.tokens(Q) + program.tokens(K)
    decoder = 0
    if mapping.op.codec is not None:
        decoder = tokens * (mapping.decode_macs // mapping.decoder_rate + 1)
    waits = len(program.stages) + len(program.transfers)
    return waits * latency + memory + lines + decoder


def _refuse_above(amount: int, what: str, how: str, mapping: Mapping) -> None:
    if amount > LARGEST:
        raise ValueError(
            f"{mapping.op.name} on {mapping.hardware.name!r} is {what}, more than the "
            f"simulator can count: {how}"
        )
