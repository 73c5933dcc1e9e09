"""The vocabulary of the compiled engine: what a machine is, its state, and what a run leaves.

Plain int64 arrays with named columns: the core (`memory`, `lines`, `engine`) reads them, and
a plain twin can follow the same rules. Amounts of DRAM traffic are in 1/dram_denominator
bytes, so that 153.6 bytes a cycle stay exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .hardware import Hardware
from .mapping import Mapping
from .program import Program

core = njit(_nrt=False, error_model="numpy", forceinline=True)
"""Compiles a function of the core into its caller. Nothing is allocated in there, so numba
need not count references; counting them, or passing these tuples through real calls, makes
the core twenty times slower."""

STALLS = (
    "busy",
    "bank",
    "key_register",
    "index_port",
    "index_refill",
    "dram",
    "decoder",
    "softmax",
    "drain",
    "barrier",
    "imbalance",
    "store",
    "reconfigure",
    "pipeline",
)
"""What a line does in a cycle: each line-cycle is counted under exactly one.

bank           another line has the bank      key_register  its key is still being read
index_port     IdxBuf serves other lines      index_refill  the index is not on chip yet
dram, decoder  operand or key not there yet   softmax       the row's probabilities are not
drain          last row still draining        barrier       lockstep: others are not done
imbalance      no work left in this stage     store         no room for output rows
reconfigure    the split changes              pipeline      the last results come through
"""
(BUSY, BANK, KEY_REGISTER, INDEX_PORT, INDEX_REFILL, DRAM, DECODER, SOFTMAX, DRAIN, BARRIER,
 IMBALANCE, STORE_ROOM, RECONFIGURE, PIPELINE) = range(len(STALLS))  # fmt: skip

PHASES = ("sddmm", "spmm", "load", "decode", "softmax", "store", "reconfigure")
"""What a cycle is spent on: a product while any line works at it, else what most lines wait
for (waits inside the lines count as the product)."""
P_LOAD, P_DECODE, P_SOFTMAX, P_STORE, P_RECONFIGURE = range(2, len(PHASES))

COUNTS = (
    "cycles",
    "tail_cycles",  # after the last stage, until the last store is done
    "dram_units",  # moved, in 1/denominator bytes
    "decoder_macs",
    "softmax_cycles",  # of one of the unit's three passes
    "key_reads",  # words read from the K buffer
    "key_words",  # words that lines took: more than reads where one read serves several
    "query_reads",
    "query_words",
    "value_reads",
    "value_words",
    "index_reads",  # entries
    "drained_words",
    "forwarded",  # queries that the sparser engine found in the Q buffer when it asked
    "waited",  # ... that were still on their way
    "stores_done",
)
(CYCLES, TAIL_CYCLES, DRAM_UNITS, DECODER_MACS, SOFTMAX_CYCLES, KEY_READS, KEY_WORDS,
 QUERY_READS, QUERY_WORDS, VALUE_READS, VALUE_WORDS, INDEX_READS, DRAINED, FORWARDED, WAITED,
 STORES_DONE) = range(len(COUNTS))  # fmt: skip

# Columns of State.channels: transfer in work, how much of it is done, units in the buffer,
# next transfer to be freed, tokens (Q, K, V) or bytes sent by the DRAM, and usable.
CURRENT, DONE, USED, RELEASED, LANDED, ARRIVED = range(6)

# Columns of State.lines. OPERAND and WORD count inside the piece and the operand; HOLDS: the
# key register is valid; PRELOAD: words of the next key read; FETCHED and CONSUMED number the
# program's entries; DRAINING: words of DRAIN_ROW still to drain; WAITING: for its query.
(PIECE, OPERAND, WORD, HOLDS, PRELOAD, FETCHED, CONSUMED, DRAINING, DRAIN_ROW,
 WAITING) = range(10)  # fmt: skip

# First axis of State.banks; each bank keeps the cycle of its last grant and the word.
VECTOR_BANK, OPERAND_BANK, OUTPUT_BANK = range(3)

# State.units: MACs left of the decoder's token and its channel; the column of `history` that
# this cycle writes, and the one written a latency ago; when each softmax pass is free.
DECODER_LEFT, DECODER_CHANNEL, NOW, THEN, SOFTMAX_FREE = 0, 1, 2, 3, 4

# State.run: the stage in work, whether its lines have begun, lines with work left in it, the
# lockstep round, cycles of reconfiguration and of pipeline drain still to wait.
STAGE, BEGUN, AT_WORK, TURN, SPLIT, FLUSH = range(6)


class Machine(NamedTuple):
    """`Hardware` and `Mapping` as the integers that the core needs."""

    lines: int
    q_banks: int
    k_banks: int
    v_banks: int
    output_banks: int
    index_entries: int
    entry_bytes: int
    pipeline: int
    softmax_lanes: int
    softmax_latency: int
    dram_numerator: int
    dram_denominator: int
    dram_latency: int
    decode_cost: int  # MACs a token; 0: no codec
    decoder_macs: int
    staging_tokens: int
    codec_bytes: int
    lockstep: int
    buffers: np.ndarray  # (6, 2) capacity, and units a cycle that may enter


class State(NamedTuple):
    """Everything that changes while the core runs."""

    channels: np.ndarray  # (6, 6)
    history: np.ndarray  # (6, latency + 1) LANDED in the last cycles
    lines: np.ndarray  # (lines, 10)
    banks: np.ndarray  # (3, banks, 2)
    rows: np.ndarray  # (2, rows, 2) of the two units in flight: scores left, ready at
    units: np.ndarray  # (7)
    run: np.ndarray  # (6)
    taken: np.ndarray  # (6) by each channel in this cycle
    did: np.ndarray  # (stalls) lines by what they did in this cycle


class Trace(NamedTuple):
    """What a run leaves."""

    stage_times: np.ndarray  # (stages, 2) first cycle, reconfiguration included, and end
    stage_stalls: np.ndarray  # (stages, stalls) line-cycles
    phases: np.ndarray  # (phases) cycles; with reconfiguration they sum to all cycles
    transfer_times: np.ndarray  # (transfers, 2)
    counts: np.ndarray  # totals, see COUNTS

    def count(self, name: str) -> int:
        """A total by its name in COUNTS."""
        return int(self.counts[COUNTS.index(name)])


def machine_of(hardware: Hardware, mapping: Mapping) -> Machine:
    """The integers of ``hardware`` running ``mapping``."""
    rate = hardware.dram_bytes_per_cycle
    unit, unlimited = rate.denominator, 2**60
    banks = (hardware.q_banks, hardware.k_banks, hardware.v_banks)
    sizes = (hardware.q_buffer_bytes, hardware.k_buffer_bytes, hardware.v_buffer_bytes)
    buffers = [
        (size * unit, count * hardware.word_bytes * unit)
        for size, count in zip(sizes, banks, strict=True)
    ]
    buffers += [(hardware.index_buffer_bytes * unit, unlimited), (unlimited, unlimited)]
    buffers += [(unlimited, unlimited)]
    return Machine(
        hardware.lines,
        *banks,
        hardware.output_banks,
        hardware.index_entries_per_cycle,
        mapping.entry_bytes,
        hardware.pipeline_cycles,
        hardware.softmax_lanes,
        hardware.softmax_latency_cycles,
        rate.numerator,
        rate.denominator,
        hardware.dram_latency_cycles,
        mapping.decode_macs,
        hardware.decoder_macs,
        mapping.staging_tokens,
        mapping.codec_bytes,
        int(hardware.assignment == "lockstep"),
        np.array(buffers, np.int64),
    )


def initial_state(machine: Machine, program: Program) -> State:
    """Empty buffers, nothing begun."""
    channels = np.zeros((6, 6), np.int64)
    channels[:, CURRENT] = channels[:, RELEASED] = program.channel_first[:-1]
    rows = max(int(np.diff(program.unit_row).max()), 1)
    banks = max(machine.q_banks, machine.k_banks, machine.v_banks, machine.output_banks)
    return State(
        channels,
        np.zeros((6, machine.dram_latency + 1), np.int64),
        np.zeros((machine.lines, 10), np.int64),
        np.full((3, banks, 2), -1, np.int64),
        np.zeros((2, rows, 2), np.int64),
        np.zeros(7, np.int64),
        np.zeros(6, np.int64),
        np.zeros(6, np.int64),
        np.zeros(len(STALLS), np.int64),
    )


def empty_trace(program: Program) -> Trace:
    """All zero."""
    stages = len(program.stages)
    return Trace(
        np.zeros((stages, 2), np.int64),
        np.zeros((stages, len(STALLS)), np.int64),
        np.zeros(len(PHASES), np.int64),
        np.zeros((len(program.transfers), 2), np.int64),
        np.zeros(len(COUNTS), np.int64),
    )
