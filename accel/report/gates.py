"""Gate equivalents of what stands around the MACs: registers of the lines, crossbars to the banks.

A gate equivalent is the area of a two-input NAND gate. The counts are estimates: cells of the
project's own Verilog (`accel/vitcod/rtl/mac_line.v`) after Yosys 0.23 (synth, abc), weighed with
the areas of the NanGate 45 nm open cell library (NAND2_X1 0.798 um2, MUX2_X1 1.862, DFF_X1 4.522).
Nothing was placed or routed. Used by `sievit.accel.report.energy.area`.
"""

from __future__ import annotations

from ..hardware import Hardware

FLIP_FLOP = 8.0
"""With an enable: 4.522 + 1.862 um2 over 0.798."""

MUX = 2.3
"""A 2:1 multiplexer of one bit: 1.862 um2 over 0.798. Yosys makes 2.30 and 2.29 of it, for each
input beyond the first of a multiplexer of 32 and of 64 words."""

SELECTION = 4.0
"""For each stored bit of a line: writing one word of many, and reading two. `mac_line.v` has
17,753 gate equivalents beside its flip-flops at 2 words a row and 33,148 at 8, and 640 bits a word:
2,566 / 640."""

DIMENSIONS = 64  # choice: of a head, what the paper's models have; a row of a line holds them
SETS = 2
"""Of accumulators and of key registers: one is filled or drained beside the one in work."""

PIPELINE_BITS_A_MAC = 82
"""A product (18), its term and the drained word (32 each)."""

PIPELINE_BITS = 404
"""Of a line: addresses, rows, counters and the partial score. With the bits above a line of 8 MACs
has 6,180 flip-flops, as Yosys counts them in `mac_line.v` with 8 words a row."""


def stored_bits(hardware: Hardware) -> int:
    """Accumulators and keys of one line."""
    return 8 * SETS * DIMENSIONS * (hardware.accumulator_bytes + hardware.operand_bytes)


def line_gates(hardware: Hardware) -> float:
    """Of one line beside its MACs and its control."""
    stored = stored_bits(hardware)
    pipeline = PIPELINE_BITS + PIPELINE_BITS_A_MAC * hardware.macs_per_line
    return FLIP_FLOP * (stored + pipeline) + SELECTION * stored


def crossbar_gates(hardware: Hardware) -> float:
    """Of all crossbars: each line takes a word of any bank of Q and V, and one of any bank of K;
    each of these banks takes the address of any line; each output bank takes a word of sums and
    its address."""
    lines, word = hardware.lines, 8 * hardware.word_bytes
    reads = lines * word * (hardware.q_banks + hardware.v_banks - 1 + hardware.k_banks - 1)
    sums = 8 * hardware.macs_per_line * hardware.accumulator_bytes
    banked = (
        (hardware.q_banks, hardware.q_buffer_bytes, hardware.word_bytes, 0),
        (hardware.k_banks, hardware.k_buffer_bytes, hardware.word_bytes, 0),
        (hardware.v_banks, hardware.v_buffer_bytes, hardware.word_bytes, 0),
        (hardware.output_banks, hardware.output_buffer_bytes, sums // 8, sums),
    )
    taken = sum(
        banks * (lines - 1) * (address_bits(size, word_bytes, banks) + bits)
        for banks, size, word_bytes, bits in banked
    )
    return MUX * (reads + taken)


def address_bits(size_bytes: int, word_bytes: int, banks: int) -> int:
    """That name a word of one of ``banks``."""
    words = -(-size_bytes // (word_bytes * banks))
    return (words - 1).bit_length()
