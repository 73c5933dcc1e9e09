"""The vocabulary of the compiled engine: its registers, and what a run leaves.

Every register is an int64 field of a record, so that the compiled core (`dma_flat`,
`mac_lines`, `engine`) reads like the machine: ``line.word``, ``channel.arrived``. Amounts of
DRAM traffic are in 1/dram_denominator bytes ("units"), so that 153.6 bytes a cycle stay exact.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np

from ...dram.ddr4 import DRAM_TIMINGS
from ...dram.state import Dram, new_dram
from ...hardware import Hardware
from ..mapping import Mapping
from ..program import CHANNELS, INDEX, LATENT, K, Program, Q, V
from .limits import held

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
"""What a line does in a cycle: each line-cycle of a stage is counted under exactly one.

bank           another line has the bank      key_register  its key is still being read
index_port     its index is being read        index_refill  its index is not on chip yet
dram, decoder  operand or key not there yet   softmax       the row's probabilities are not
drain          last row still draining        barrier       lockstep: others are not done
imbalance      no work left in this stage     store         no room for output rows
reconfigure    the split changes              pipeline      the last results come through
"""
(BUSY, BANK, KEY_REGISTER, INDEX_PORT, INDEX_REFILL, DRAM, DECODER, SOFTMAX, DRAIN, BARRIER,
 IMBALANCE, STORE_ROOM, RECONFIGURE, PIPELINE) = range(len(STALLS))  # fmt: skip

PHASES = ("sddmm", "spmm", "load", "decode", "softmax", "store", "reconfigure")
"""What a cycle is spent on: a product while any line works at it, else what most lines wait
for (waits inside the lines count as the product); "store" also after the last stage."""
P_LOAD, P_DECODE, P_SOFTMAX, P_STORE, P_RECONFIGURE = range(2, len(PHASES))

COUNTS: tuple[str, ...] = (
    "cycles",
    "tail_cycles",  # after the last stage, until the channels are done
    "dram_units",  # moved, in 1/denominator bytes
    "dram_cycles",  # in which anything moved (DDR4: was asked for)
    "dram_lines",  # DDR4: bursts, and those that found their row open and used before
    "dram_row_hits",
    "dram_activates",
    "dram_refreshes",
    "decoder_macs",
    "decoder_cycles",  # in which it worked
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


def _record(*fields: str) -> np.dtype:
    return np.dtype([(field, np.int64) for field in fields])


COUNT = _record(*COUNTS)


class Machine(NamedTuple):
    """A `Mapping` and its hardware as the integers that the core needs: fields of MACHINE."""

    lines: int  # that get work
    index_entries: int  # read from IdxBuf in a cycle
    lists: int  # SpMM reads keys from lists of rows: as SDDMM wrote them (1), sorted (2)
    pipeline: int
    softmax_lanes: int
    softmax_latency: int
    dram_numerator: int  # units a cycle
    dram_denominator: int  # units a byte
    dram_latency: int
    ddr4: bool  # the DRAM is stepped command by command
    dram_clock_numerator: int  # cycles of the memory in a cycle of the machine
    dram_clock_denominator: int
    landing_latency: int  # of what has been counted as landed: none in DDR4
    decode_cost: int  # MACs a token of Q or K; 0: no codec
    decoder_rate: int  # MACs a cycle
    codec_bytes: int  # that must be there before anything is decoded


MACHINE = _record(*Machine._fields)


def machine_of(mapping: Mapping) -> np.void:
    """The MACHINE record of the mapping's hardware running it."""
    hardware, latency = mapping.hardware, mapping.hardware.dram_latency_cycles
    rate, timing = hardware.dram_bytes_per_cycle, DRAM_TIMINGS[hardware.dram_timing]
    ddr4, clock = hardware.dram_model == "ddr4", Fraction(timing.clock_hz, hardware.clock_hz)
    filled = Machine(
        lines=hardware.lines,
        index_entries=hardware.index_entries_per_cycle,
        lists=mapping.one_stream * (1 + hardware.sorted_lists),
        pipeline=hardware.pipeline_cycles,
        softmax_lanes=hardware.softmax_lanes,
        softmax_latency=hardware.softmax_latency_cycles,
        dram_numerator=rate.numerator,
        dram_denominator=rate.denominator,
        dram_latency=latency,
        ddr4=ddr4,
        dram_clock_numerator=clock.numerator,
        dram_clock_denominator=clock.denominator,
        landing_latency=0 if ddr4 else latency,
        decode_cost=mapping.decode_macs,
        decoder_rate=mapping.decoder_rate,
        codec_bytes=mapping.codec_bytes if mapping.decode_macs else 0,
    )
    return np.array([filled], MACHINE)[0]


CHANNEL = _record(
    "current",  # transfer in work
    "last",  # behind the channel's transfers
    "done",  # units of it
    "until",  # ... with which its next token is whole
    "mark",  # ... when a round of drips began
    "capacity",  # units, of its buffer
    "used",
    "freed",  # next transfer (Q, K, V) whose room is to be freed
    "port",  # units a cycle that its buffer takes
    "port_left",
    "staging",  # latent tokens that may wait for the decoder; -1: not decoded on arrival
    "decoded",  # the decoder brings it, from latents on chip, instead of the DRAM
    "burst",  # DDR4: next line to be asked for, and to land
    "landing",
    "whole",  # DDR4: the transfer whose lines land
    "asked",  # DDR4: tokens (bytes) whose lines are asked for
    "held_up",  # DDR4: by the ports alone, in the last cycle
    "landed",  # tokens (Q, K, V) or bytes that the DRAM has sent
    "flying",  # ... that are on their way or there
    "flight",  # the first on its way, of `State.flights`, and how many are
    "flights",
    "sent",  # ... at least its latency ago
    "arrived",  # ... and decoded: the lines can use them
)

LINE = _record(
    "piece",  # in work, and behind the line's last
    "last_piece",
    "round",  # of the piece
    "vector",
    "left",  # operands of it, the one in work included
    "operand",  # denser: the one in work
    "fetched",  # sparser: entries read from IdxBuf, and used up
    "consumed",
    "last_entry",
    "word",  # of the operand
    "row",  # SDDMM: of the score in work
    "address",  # of the next word; -1: the operand is not known to be there
    "bank",
    "waiting",  # SDDMM: the query was asked for before it was there
    "holds",  # SDDMM: the key register is valid
    "preload",  # words in the second key register
    "key_address",
    "key_bank",
    "draining",  # SpMM: words of the row before that still drain
    "drain_bank",
)

BANK_PORT = _record("cycle", "address")
"""The last read of a bank."""

ROW = _record("scores", "left", "ready_at", "list")
"""Of a unit in flight: scores, those still missing, first cycle of the probabilities, where in
its list the next key goes."""

RUN = _record(
    "cycle",
    "stage",  # in work
    "begun",  # its lines have started
    "turn",  # lockstep round
    "split",  # cycles of reconfiguration left
    "flush",  # cycles until the last results are through
    "credit",  # DDR4: units that may still be asked for
    "index_reads",  # in this cycle
    "index_freed",  # bytes
    "on_chip",  # bytes of the stage's index stream
    "piece_done",  # by a line in this cycle, or a drain
    "denser_end",  # cycle after the last piece of each engine in the stage
    "sparser_end",
    "moved",  # anything in the lines in this cycle
    "wake_at",  # first cycle in which a row that a line waits for is ready
    "arrived",  # anything in this cycle
    "still",  # nothing changed in this cycle but parts of tokens
    "dripping",  # a part of a token moved in this cycle
    "dripped",  # cycles of the round in which one did
    "quiet",  # cycles of it so far
    "idle_memory",  # DDR4: nothing to be asked for
    "decoding",  # channel of the decoder's token, and MACs left of it
    "decode_left",
    "maximum_free",  # when each pass of the softmax unit is free
    "sum_free",
    "division_free",
)
"""The run's own registers."""

FLIGHT = _record("due", "landed")
"""What a channel has sent, and the cycle in which it arrives."""

NEVER = 2**62

TAGS = 4096
"""DDR4: lines of a DMA channel that may be on their way."""


class State(NamedTuple):
    """Everything that changes while the core runs."""

    run: np.void  # RUN
    channels: np.ndarray  # (6) CHANNEL
    flights: np.ndarray  # (channels, most on their way) FLIGHT, a ring each
    lines: np.ndarray  # (lines) LINE
    query_banks: np.ndarray  # BANK_PORT
    key_banks: np.ndarray
    value_banks: np.ndarray
    output_banks: np.ndarray
    rows: np.ndarray  # (2, rows) ROW of the two units in flight
    lists: np.ndarray  # (2, entries) keys of the scores of their rows
    counted: np.ndarray  # lines by what they did in this cycle
    dram: Dram  # in the flat model an idle one
    ask_times: np.ndarray  # (lines on their way) cycle in which each was asked for


class Trace(NamedTuple):
    """What a run leaves."""

    stage_times: np.ndarray  # (stages, 2) first cycle, reconfiguration included, and end
    stage_stalls: np.ndarray  # (stages, stalls) line-cycles
    stage_phases: np.ndarray  # (stages + 1, phases) cycles; the last row: after all stages
    stage_engines: np.ndarray  # (stages, 2) end of the denser, the sparser engine; 0: no work
    transfer_times: np.ndarray  # (transfers, 2)
    row_ready: np.ndarray  # (rows of all units) first cycle of the probabilities; 0: no score
    landed_at: np.ndarray  # (3, tokens) end of the cycle that brought each token of Q, K, V
    decoded_at: np.ndarray  # (2, tokens) end of decoding each token of Q and of K
    counts: np.ndarray  # totals, see COUNTS

    def count(self, name: str) -> int:
        """A total by its name in COUNTS."""
        return int(self.counts[COUNTS.index(name)])


def initial_state(program: Program, mapping: Mapping) -> State:
    """Empty buffers, nothing begun."""
    hardware, run = mapping.hardware, np.zeros(1, RUN)
    run["decoding"] = K
    run["split"] = program.stages["reconfigure"][0]
    rows = max(int(np.diff(program.unit_row).max()), 1)
    dram, channels = _dram(hardware), _channels(program, mapping)
    return State(
        run[0],
        channels,
        np.zeros((len(channels), _most_flights(program, hardware)), FLIGHT),
        np.zeros(hardware.lines, LINE),
        _idle_ports(hardware.q_banks),
        _idle_ports(hardware.k_banks),
        _idle_ports(hardware.v_banks),
        _idle_ports(hardware.output_banks),
        np.zeros((2, rows), ROW),
        np.zeros((2, program.list_entries), np.int64),
        np.zeros(len(STALLS), np.int64),
        dram,
        np.zeros(len(dram.done), np.int64),
    )


def _idle_ports(banks: int) -> np.ndarray:
    return np.full(banks, -1, np.int64).repeat(2).view(BANK_PORT)


def _most_flights(program: Program, hardware: Hardware) -> int:
    """One a cycle of the latency, and no more than there are tokens (bytes) of a channel."""
    latency = hardware.dram_latency_cycles if hardware.dram_model == "flat" else 0
    most = max(program.tokens(channel) for channel in range(CHANNELS))
    return min(latency, most) + 1


def _dram(hardware: Hardware) -> Dram:
    if hardware.dram_model == "flat":
        return _IDLE
    timing = DRAM_TIMINGS[hardware.dram_timing]
    return new_dram(timing, hardware.dram_map, hardware.dram_channels, CHANNELS * TAGS)


_IDLE = new_dram(DRAM_TIMINGS["ddr4_2400"], "groups_interleaved", 1, 0)
"""Stands in the state of a flat memory; never stepped."""


def _channels(program: Program, mapping: Mapping) -> np.ndarray:
    hardware = mapping.hardware
    channels = np.zeros(CHANNELS if mapping.resident_latents else LATENT, CHANNEL)
    first, burst = program.channel_first[: len(channels) + 1], program.channel_burst[:-1]
    channels["current"] = channels["freed"] = channels["whole"] = first[:-1]
    channels["burst"] = channels["landing"] = burst[: len(channels)]
    channels["last"] = first[1:]
    unit, word, cut = hardware.dram_bytes_per_cycle.denominator, hardware.word_bytes, mapping.cut
    sizes = {
        Q: (cut.q, hardware.q_banks, mapping.kept.q),
        K: (cut.k, hardware.k_banks, mapping.kept.k),
        V: (cut.v, hardware.v_banks, mapping.kept.v),
    }
    if mapping.resident_latents:
        sizes[LATENT] = (mapping.latent_space_bytes, hardware.latent_banks, mapping.kept.latents)
    channels["capacity"] = channels["port"] = NEVER
    for number, (size, banks, kept) in sizes.items():
        channel = channels[number : number + 1]
        channel["capacity"], channel["port"] = held(size * unit), held(banks * word * unit)
        _keep(channel, program, kept, unit)
    channels[INDEX]["capacity"] = held(hardware.index_buffer_bytes * unit)
    channels["staging"] = -1
    if mapping.resident_latents:
        channels["decoded"][[Q, K]] = 1
    elif mapping.decode_macs:
        channels["staging"][[Q, K]] = mapping.staging_tokens
    return channels


def _keep(channel: np.ndarray, program: Program, kept: int, unit: int) -> None:
    """The channel's first ``kept`` chunks are there from the beginning."""
    first = int(channel["freed"][0])
    chunks = program.transfers[first : first + kept]
    for place in ("current", "whole"):
        channel[place] = first + kept
    for count in ("landed", "flying", "sent", "arrived", "asked"):
        channel[count] = chunks["tokens"].sum()
    channel["used"] = chunks["room"].sum() * unit


def empty_trace(program: Program, mapping: Mapping) -> Trace:
    """All zero."""
    stages = len(program.stages)
    tokens = max(map(program.tokens, (Q, K, V)))
    return Trace(
        np.zeros((stages, 2), np.int64),
        np.zeros((stages, len(STALLS)), np.int64),
        np.zeros((stages + 1, len(PHASES)), np.int64),
        np.zeros((stages, 2), np.int64),
        np.zeros((len(program.transfers), 2), np.int64),
        np.zeros(len(program.row_scores), np.int64),
        np.zeros((3, tokens), np.int64),
        np.zeros((2, tokens if mapping.decode_macs else 0), np.int64),
        np.zeros(len(COUNTS), np.int64),
    )
