"""The compiled core: a ViTCoD-style attention engine, stepped cycle by cycle.

One cycle: the DRAM moves bytes into buffers and output rows out, the decoder turns latent
tokens into queries and keys, and every MAC line asks for its next word. Requests meet at
banked buffers: one word a bank and cycle, the same word for several lines is one read
(multicast), lines that ask one bank for different words wait. The line that is served first
moves on by one each cycle. What a line sees is the state at the start of the cycle.

A line in SDDMM holds a key (and loads the next into a second register); a line in SpMM holds
an output row, whose accumulators then drain word by word into the output buffer, which adds
them up: so partial rows (cut rows, and the two engines' halves) cost a drain each.

Arrays in, arrays out: `Program` says what to do, `Machine` how fast, `run` returns `Trace`.
No figure is read from anything else, so a plain twin can follow the same rules.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
from numba import njit

from .assign import DENSE_ROUND
from .hardware import Hardware
from .mapping import Mapping
from .program import CODEC, INDEX, SDDMM, STORE, K, Program, Q, V

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
    "tail",
)
"""What a line does in a cycle: each line-cycle is counted under exactly one.

bank           another line has the bank      key_register  its key is still being read
index_port     IdxBuf serves other lines      index_refill  the index is not on chip yet
dram, decoder  operand or key not there yet   softmax       the row's probabilities are not
drain          last row still draining        barrier       lockstep: others are not done
imbalance      no work left in this stage     store         no room for output rows
reconfigure    the split changes              pipeline      the last results come through
tail           only stores are left
"""
(BUSY, BANK, KEY_REGISTER, INDEX_PORT, INDEX_REFILL, DRAM, DECODER, SOFTMAX, DRAIN, BARRIER,
 IMBALANCE, STORES, RECONFIGURE, PIPELINE, TAIL) = range(15)  # fmt: skip

PHASES = ("sddmm", "spmm", "load", "decode", "softmax", "store", "reconfigure")
"""What a cycle is spent on: a product while any line works at it, else what most lines wait
for (waits inside the machine count as the product)."""
P_LOAD, P_DECODE, P_SOFTMAX, P_STORE, P_RECONFIGURE = range(2, 7)


class Machine(NamedTuple):
    """`Hardware` and `Mapping` as the integers that the core needs.

    DRAM amounts are in 1/dram_denominator bytes, so that 153.6 bytes a cycle stay exact.
    """

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
    capacity: np.ndarray  # (6) bytes of each channel's buffer
    port_bytes: np.ndarray  # (6) bytes a cycle that may enter it
    decode_cost: int  # MACs a token; 0: no codec
    decoder_macs: int
    staging_tokens: int
    codec_bytes: int


class State(NamedTuple):
    """Everything that changes, preallocated."""

    # DRAM side, by channel
    current: np.ndarray  # transfer being served
    done: np.ndarray  # of it, in 1/denominator bytes
    used: np.ndarray  # of the buffer, in 1/denominator bytes
    release: np.ndarray  # next transfer whose room is to be freed
    landed: np.ndarray  # tokens (Q, K, V) or bytes that the DRAM has sent
    history: np.ndarray  # (6, latency + 1) landed in the last cycles
    arrived: np.ndarray  # tokens or bytes that can be used
    decoder: np.ndarray  # MACs left of the token in work, its channel
    # lines
    piece: np.ndarray
    operand: np.ndarray  # operands of the piece done
    word: np.ndarray
    holds: np.ndarray  # SDDMM: the key register is valid
    preload: np.ndarray  # SDDMM: words of the next key
    fetched: np.ndarray  # entries of the line read from IdxBuf, absolute
    consumed: np.ndarray
    draining: np.ndarray  # SpMM: words still to drain, and of which row
    drain_row: np.ndarray
    waiting: np.ndarray  # SDDMM: the query was asked for before it was there
    # banks
    vector_seen: np.ndarray  # cycle of the last grant, and the word granted
    vector_word: np.ndarray
    operand_seen: np.ndarray
    operand_word: np.ndarray
    output_seen: np.ndarray
    # rows of the two units in flight
    rows_left: np.ndarray
    probable_at: np.ndarray
    softmax_free: np.ndarray  # (3) when each pass of the unit is free
    taken: np.ndarray  # by channel, what entered in this cycle
    counted: np.ndarray  # lines by what they did in this cycle


class Trace(NamedTuple):
    """What a run leaves: all counts are totals over the run."""

    stage_start: np.ndarray  # first cycle of each stage, its reconfiguration included
    stage_end: np.ndarray
    stage_stalls: np.ndarray  # (stages, stalls) line-cycles
    phases: np.ndarray  # (phases) cycles; they sum to all cycles
    transfer_start: np.ndarray
    transfer_end: np.ndarray
    counts: np.ndarray  # see COUNTS


COUNTS = (
    "cycles",
    "tail",  # cycles after the last stage
    "dram_units",  # moved, in 1/denominator bytes
    "decoder_macs",
    "softmax_cycles",  # of one pass
    "key_reads",  # words read from the K buffer, and words that lines took
    "key_words",
    "query_reads",
    "query_words",
    "value_reads",
    "value_words",
    "index_reads",  # entries
    "drained_words",
    "forwarded",  # queries that the sparser engine found in the Q buffer when it asked
    "waited",  # ... that were still on their way
    "store_done",
)
(CYCLES, TAIL_CYCLES, DRAM_UNITS, DECODER_MACS, SOFTMAX_CYCLES, KEY_READS, KEY_WORDS,
 QUERY_READS, QUERY_WORDS, VALUE_READS, VALUE_WORDS, INDEX_READS, DRAINED, FORWARDED, WAITED,
 STORE_DONE) = range(16)  # fmt: skip


@njit(_nrt=False, error_model="numpy")
def _room(machine, program, state, channel, transfer):
    """How much may enter the channel's buffer now, in 1/denominator bytes."""
    unit = machine.dram_denominator
    left = program.transfer_bytes[transfer] * unit - state.done[channel]
    if channel == STORE or channel == CODEC:
        return left
    capacity = machine.capacity[channel] * unit
    if channel == INDEX:
        return min(left, capacity - state.used[INDEX])
    if state.done[channel] == 0:
        if state.used[channel] + program.transfer_room[transfer] * unit > capacity:
            return 0
    if machine.decode_cost and channel != V:
        waiting = machine.staging_tokens - (state.landed[channel] - state.arrived[channel])
        width = program.transfer_token_bytes[transfer] * unit
        return min(left, waiting * width - state.done[channel] % width)
    return left


@njit(_nrt=False, error_model="numpy")
def _take(machine, program, state, trace, channel, given, cycle):
    """Book ``given`` on the channel's transfer; what arrived is visible after the latency."""
    unit = machine.dram_denominator
    transfer = state.current[channel]
    if state.done[channel] == 0:
        trace.transfer_start[transfer] = cycle
        if channel < INDEX:
            state.used[channel] += program.transfer_room[transfer] * unit
    if channel == INDEX:
        state.used[INDEX] += given
    done = state.done[channel] + given
    state.done[channel] = done
    token_bytes = program.transfer_token_bytes[transfer]
    state.landed[channel] = program.transfer_token[transfer] + done // (token_bytes * unit)
    trace.counts[DRAM_UNITS] += given
    if done == program.transfer_bytes[transfer] * unit:
        trace.transfer_end[transfer] = cycle + 1
        state.current[channel] += 1
        state.done[channel] = 0
        if channel == STORE:
            trace.counts[STORE_DONE] += 1


@njit(_nrt=False, error_model="numpy")
def _serve_dram(machine, program, state, trace, stage, cycle):
    """One cycle of the DRAM: the channel whose data is needed first goes first; equals turn."""
    credit = machine.dram_numerator
    unit = machine.dram_denominator
    taken = state.taken
    taken[:] = 0
    while credit > 0:
        best, best_need, best_room = -1, 0, 0
        for step in range(6):
            channel = (cycle + step) % 6
            transfer = state.current[channel]
            if transfer == program.channel_first[channel + 1]:
                continue
            need = program.transfer_need[transfer]
            if program.transfer_after[transfer] > stage or (best >= 0 and need >= best_need):
                continue
            room = _room(machine, program, state, channel, transfer)
            room = min(room, machine.port_bytes[channel] * unit - taken[channel])
            if room > 0:
                best, best_need, best_room = channel, need, room
        if best < 0:
            return
        given = min(credit, best_room)
        credit -= given
        taken[best] += given
        _take(machine, program, state, trace, best, given, cycle)


@njit(_nrt=False, error_model="numpy")
def _arrive(machine, program, state, trace, cycle):
    """Data that left the DRAM a latency ago is usable; latents pass through the decoder."""
    slots = machine.dram_latency + 1
    now, then = cycle % slots, (cycle + 1) % slots
    for channel in range(STORE):
        state.history[channel, now] = state.landed[channel]
        if not (machine.decode_cost and channel < V):
            state.arrived[channel] = state.history[channel, then]
    if machine.decode_cost == 0 or state.arrived[CODEC] < machine.codec_bytes:
        return
    credit = machine.decoder_macs
    while credit > 0:
        if state.decoder[0] == 0:
            other = K if state.decoder[1] == Q else Q
            if state.history[other, then] > state.arrived[other]:
                state.decoder[1] = other
            elif state.history[state.decoder[1], then] <= state.arrived[state.decoder[1]]:
                return
            state.decoder[0] = machine.decode_cost
        given = min(credit, state.decoder[0])
        credit -= given
        state.decoder[0] -= given
        trace.counts[DECODER_MACS] += given
        if state.decoder[0] == 0:
            state.arrived[state.decoder[1]] += 1


@njit(_nrt=False, error_model="numpy")
def _grant(seen, granted, banks, word, cycle):
    """Ask a bank for a word: 2 = a new read, 1 = multicast of this cycle's read, 0 = wait."""
    bank = word % banks
    if seen[bank] != cycle:
        seen[bank] = cycle
        granted[bank] = word
        return 2
    return 1 if granted[bank] == word else 0


@njit(_nrt=False, error_model="numpy")
def _score_done(machine, program, state, trace, unit, row, cycle):
    """A score of ``row`` is written; the row's last one sends it through the softmax unit.

    Three passes in a pipeline (maximum; exponential and sum; division), each ``lanes``
    scores a cycle, rows in the order in which they become complete.
    """
    slot = unit % 2
    state.rows_left[slot, row] -= 1
    if state.rows_left[slot, row]:
        return
    scores = program.row_scores[program.unit_row[unit] + row]
    took = (scores + machine.softmax_lanes - 1) // machine.softmax_lanes
    ready = cycle + 1
    for step in range(3):
        ready = max(ready, state.softmax_free[step]) + took
        state.softmax_free[step] = ready
    trace.counts[SOFTMAX_CYCLES] += took
    state.probable_at[slot, row] = ready + machine.softmax_latency


@njit(_nrt=False, error_model="numpy")
def _missing(machine, state, channel, cycle):
    """Why a token is not there: it is in DRAM, or it waits for the decoder."""
    if machine.decode_cost == 0 or channel == V:
        return DRAM
    slots = machine.dram_latency + 1
    landed = state.history[channel, (cycle + 1) % slots]
    return DECODER if landed > state.arrived[channel] else DRAM


@njit(_nrt=False, error_model="numpy")
def _next_index(machine, program, state, trace, stage, line, reads):
    """Fill the line's two index registers from IdxBuf; returns the reads of this cycle."""
    plan = program.stage_plan[stage]
    entry = state.fetched[line]
    if entry == program.line_entry[plan, line + 1] or entry - state.consumed[line] >= 2:
        return reads
    if reads < machine.index_entries and _indexed(machine, program, state, stage, entry):
        state.fetched[line] += 1
        state.used[INDEX] -= machine.entry_bytes * machine.dram_denominator
        trace.counts[INDEX_READS] += 1
        return reads + 1
    return reads


@njit(_nrt=False, error_model="numpy")
def _indexed(machine, program, state, stage, entry):
    """Is this entry of the stage's index stream on chip?"""
    before = program.stage_index_bytes[stage] + program.arrival[entry] * machine.entry_bytes
    return state.arrived[INDEX] >= before + machine.entry_bytes


@njit(_nrt=False, error_model="numpy")
def _operand(machine, program, state, stage, line, piece):
    """(operand of the line's current piece, stall): stall is BUSY where it is known."""
    place = program.piece_first[piece] + state.operand[line]
    if program.piece_round[piece] == DENSE_ROUND:
        return place, BUSY
    if state.fetched[line] > state.consumed[line]:
        return program.entry[place], BUSY
    if _indexed(machine, program, state, stage, place):
        return 0, INDEX_PORT
    return 0, INDEX_REFILL


@njit(_nrt=False, error_model="numpy")
def _advance(program, state, line, piece, words):
    """One word is done; returns (the operand is finished, the piece is finished)."""
    state.word[line] += 1
    if state.word[line] < words:
        return False, False
    state.word[line] = 0
    state.operand[line] += 1
    if program.piece_round[piece] != DENSE_ROUND:
        state.consumed[line] += 1
    if state.operand[line] < program.piece_length[piece]:
        return True, False
    state.operand[line] = 0
    state.piece[line] += 1
    return True, True


@njit(_nrt=False, error_model="numpy")
def _score_word(machine, program, state, trace, stage, line, cycle):
    """A line of SDDMM asks for the next word of its query; returns what it did."""
    piece = state.piece[line]
    if not state.holds[line]:
        key = program.stage_vector_token[stage] + program.piece_vector[piece]
        return KEY_REGISTER if key < state.arrived[K] else _missing(machine, state, K, cycle)
    row, stall = _operand(machine, program, state, stage, line, piece)
    if stall != BUSY:
        return stall
    words = program.stage_words[stage]
    token = program.stage_operand_token[stage] + row
    if token >= state.arrived[Q]:
        state.waiting[line] = True
        return _missing(machine, state, Q, cycle)
    heads, head = program.stage_heads[stage], program.stage_head[stage]
    word = (token * heads + head) * words + state.word[line]
    grant = _grant(state.operand_seen, state.operand_word, machine.q_banks, word, cycle)
    if grant == 0:
        return BANK
    trace.counts[QUERY_READS] += grant == 2
    trace.counts[QUERY_WORDS] += 1
    if state.word[line] == 0 and program.piece_round[piece] != DENSE_ROUND:
        trace.counts[WAITED if state.waiting[line] else FORWARDED] += 1
    state.waiting[line] = False
    finished, piece_done = _advance(program, state, line, piece, words)
    if finished:
        _score_done(machine, program, state, trace, program.stage_unit[stage], row, cycle)
    if piece_done:
        state.holds[line] = False
    return BUSY


@njit(_nrt=False, error_model="numpy")
def _load_key(machine, program, state, trace, stage, line, target, cycle):
    """A line of SDDMM reads a word of piece ``target``'s key into its spare register."""
    words = program.stage_words[stage]
    if target < program.line_piece[program.stage_plan[stage], line + 1]:
        token = program.stage_vector_token[stage] + program.piece_vector[target]
        if state.preload[line] < words and token < state.arrived[K]:
            heads, head = program.stage_heads[stage], program.stage_head[stage]
            word = (token * heads + head) * words + state.preload[line]
            grant = _grant(state.vector_seen, state.vector_word, machine.k_banks, word, cycle)
            trace.counts[KEY_READS] += grant == 2
            trace.counts[KEY_WORDS] += grant > 0
            state.preload[line] += grant > 0
    if not state.holds[line] and state.preload[line] == words:
        state.holds[line] = True
        state.preload[line] = 0


@njit(_nrt=False, error_model="numpy")
def _value_word(machine, program, state, trace, stage, line, cycle):
    """A line of SpMM asks for the next word of its value row; returns what it did."""
    piece = state.piece[line]
    row, unit = program.piece_vector[piece], program.stage_unit[stage]
    if cycle < state.probable_at[unit % 2, row]:
        return SOFTMAX
    key, stall = _operand(machine, program, state, stage, line, piece)
    if stall != BUSY:
        return stall
    words = program.stage_words[stage]
    last = state.operand[line] + 1 == program.piece_length[piece]
    if last and state.word[line] + 1 == words and state.draining[line]:
        return DRAIN
    token = program.stage_operand_token[stage] + key
    if token >= state.arrived[V]:
        return _missing(machine, state, V, cycle)
    word = token * words + state.word[line]
    grant = _grant(state.operand_seen, state.operand_word, machine.v_banks, word, cycle)
    if grant == 0:
        return BANK
    trace.counts[VALUE_READS] += grant == 2
    trace.counts[VALUE_WORDS] += 1
    _, piece_done = _advance(program, state, line, piece, words)
    if piece_done:
        state.draining[line] = words
        state.drain_row[line] = row
    return BUSY


@njit(_nrt=False, error_model="numpy")
def _drain(machine, program, state, trace, stage, line, cycle):
    """A finished row adds its next word into the output buffer, if the bank is free."""
    words = program.stage_words[stage]
    word = state.drain_row[line] * words + words - state.draining[line]
    bank = word % machine.output_banks
    if state.output_seen[bank] != cycle:
        state.output_seen[bank] = cycle
        state.draining[line] -= 1
        trace.counts[DRAINED] += 1


@njit(_nrt=False, error_model="numpy")
def _step_line(machine, program, state, trace, stage, line, turn, reads, cycle):
    """One line, one cycle; returns (what it did, index reads so far)."""
    piece = state.piece[line]
    end = program.line_piece[program.stage_plan[stage], line + 1]
    draining = state.draining[line] > 0
    target = piece + 1 if state.holds[line] else piece
    reads = _next_index(machine, program, state, trace, stage, line, reads)
    scores = program.stage_kind[stage] == SDDMM
    if piece == end:
        did = DRAIN if draining else IMBALANCE
    elif program.piece_round[piece] > turn:
        did = BARRIER
    elif scores:
        did = _score_word(machine, program, state, trace, stage, line, cycle)
    else:
        did = _value_word(machine, program, state, trace, stage, line, cycle)
    if scores:
        _load_key(machine, program, state, trace, stage, line, target, cycle)
    elif draining:
        _drain(machine, program, state, trace, stage, line, cycle)
    return did, reads


@njit(_nrt=False, error_model="numpy")
def _begin(machine, program, state, stage):
    """Lines at the start of a stage."""
    plan = program.stage_plan[stage]
    for line in range(machine.lines):
        state.piece[line] = program.line_piece[plan, line]
        state.fetched[line] = program.line_entry[plan, line]
        state.consumed[line] = program.line_entry[plan, line]
        state.operand[line] = 0
        state.word[line] = 0
        state.preload[line] = 0
        state.holds[line] = False
        state.waiting[line] = False
    state.operand_seen[:] = -1
    state.vector_seen[:] = -1
    unit = program.stage_unit[stage]
    if program.stage_kind[stage] == SDDMM:
        if stage == 0 or program.stage_kind[stage - 1] != SDDMM or (
            program.stage_unit[stage - 1] != unit
        ):  # fmt: skip
            first, last = program.unit_row[unit], program.unit_row[unit + 1]
            for row in range(last - first):
                state.rows_left[unit % 2, row] = program.row_scores[first + row]


@njit(_nrt=False, error_model="numpy")
def _finished(machine, program, state, stage, turn):
    """(the stage is done, the lockstep round that may run next)."""
    plan = program.stage_plan[stage]
    done, next_turn = True, turn + 1
    for line in range(machine.lines):
        piece = state.piece[line]
        if state.draining[line]:
            done = False
        if piece < program.line_piece[plan, line + 1]:
            done = False
            if program.piece_round[piece] == turn:
                next_turn = turn
    return done, next_turn


@njit(_nrt=False, error_model="numpy")
def _release(program, state, machine, stage):
    """Free the room of chunks that no later stage needs, in the order they were loaded."""
    for channel in range(STORE):
        while state.release[channel] < state.current[channel]:
            transfer = state.release[channel]
            if program.transfer_release[transfer] > stage:
                break
            freed = program.transfer_room[transfer]
            state.used[channel] -= freed * machine.dram_denominator
            state.release[channel] += 1


@njit(_nrt=False, error_model="numpy")
def _book(counted, phases, scores, stalls):
    """Add one cycle's line states to the stage and the cycle to a phase."""
    worst, most = IMBALANCE, 0
    for cause in range(counted.size):
        stalls[cause] += counted[cause]
        if cause != IMBALANCE and counted[cause] > most:
            worst, most = cause, counted[cause]
    product = 0 if scores else 1
    if counted[BUSY] > 0:
        phases[product] += 1
    elif worst == DRAM or worst == INDEX_REFILL:
        phases[P_LOAD] += 1
    elif worst == DECODER:
        phases[P_DECODE] += 1
    elif worst == SOFTMAX:
        phases[P_SOFTMAX] += 1
    else:
        phases[product] += 1


@njit(_nrt=False, error_model="numpy")
def _whole(cause, phase, machine, trace, stage):
    """A cycle in which the whole array waits for one thing."""
    trace.stage_stalls[stage, cause] += machine.lines
    trace.phases[phase] += 1


@njit(_nrt=False, error_model="numpy")
def _step_array(machine, program, state, trace, stage, turn, counted, cycle):
    """One cycle of all lines; returns (the stage is done, lockstep round)."""
    counted[:] = 0
    reads = 0
    start = cycle % machine.lines
    for step in range(machine.lines):
        line = start + step
        if line >= machine.lines:
            line -= machine.lines
        did, reads = _step_line(machine, program, state, trace, stage, line, turn, reads, cycle)
        counted[did] += 1
    scores = program.stage_kind[stage] == SDDMM
    _book(counted, trace.phases, scores, trace.stage_stalls[stage])
    return _finished(machine, program, state, stage, turn)


@njit(_nrt=False, error_model="numpy")
def _run(machine, program, state, trace, limit):
    """Step until every stage and store is done; False where ``limit`` cycles were not enough."""
    stages = program.stage_kind.size
    stores = program.channel_first[STORE + 1] - program.channel_first[STORE]
    counted = state.counted
    stage, begun, turn, drain, cycle = 0, False, 0, 0, 0
    split = program.stage_reconfigure[0]
    while stage < stages or trace.counts[STORE_DONE] < stores:
        if cycle == limit:
            return False
        _serve_dram(machine, program, state, trace, stage, cycle)
        _arrive(machine, program, state, trace, cycle)
        product = 0 if stage == stages or program.stage_kind[stage] == SDDMM else 1
        done = False
        if stage == stages:
            trace.counts[TAIL_CYCLES] += 1
            trace.phases[P_STORE] += 1
        elif drain:
            drain -= 1
            _whole(PIPELINE, product, machine, trace, stage)
            done = drain == 0
        elif split:
            split -= 1
            _whole(RECONFIGURE, P_RECONFIGURE, machine, trace, stage)
        elif not begun and trace.counts[STORE_DONE] < program.stage_stores[stage]:
            _whole(STORES, P_STORE, machine, trace, stage)
        elif not begun and state.arrived[INDEX] < program.stage_index_bytes[stage]:
            _whole(INDEX_REFILL, P_LOAD, machine, trace, stage)
        else:
            if not begun:
                _begin(machine, program, state, stage)
                begun, turn = True, 0
            done, turn = _step_array(
                machine, program, state, trace, stage, turn, counted, cycle
            )  # fmt: skip
            if done and machine.pipeline:
                done, drain = False, machine.pipeline
        if done:
            trace.stage_end[stage] = cycle + 1
            stage += 1
            begun = False
            _release(program, state, machine, stage)
            if stage < stages:
                trace.stage_start[stage] = cycle + 1
                split = program.stage_reconfigure[stage]
        cycle += 1
    trace.counts[CYCLES] = cycle
    return True


def run(program: Program, hardware: Hardware, mapping: Mapping) -> Trace:
    """Step ``program`` on ``hardware`` to its end.

    The first call on a machine compiles the core (seconds) and caches it on disk; that is
    logged once under the logger ``sievit.accel``.
    """
    machine = _machine(hardware, mapping)
    _say_if_compiling()
    stages = len(program.stage_kind)
    transfers = len(program.transfer_bytes)
    trace = Trace(
        np.zeros(stages, np.int64),
        np.zeros(stages, np.int64),
        np.zeros((stages, len(STALLS)), np.int64),
        np.zeros(len(PHASES), np.int64),
        np.zeros(transfers, np.int64),
        np.zeros(transfers, np.int64),
        np.zeros(len(COUNTS), np.int64),
    )
    limit = _cycle_limit(program, hardware, mapping)
    if not _run(machine, program, _state(machine, program, mapping), trace, limit):
        raise RuntimeError(
            f"{mapping.op.name} did not end within {limit} cycles: a fault of the engine or "
            f"of its program (mapping {mapping.group} heads x {mapping.query_tile} queries)"
        )
    return trace


def _say_if_compiling() -> None:
    if not _run.signatures:
        logging.getLogger("sievit.accel").info(
            "loading the cycle engine; the first time on a machine it is compiled, which "
            "takes some seconds"
        )


def _cycle_limit(program: Program, hardware: Hardware, mapping: Mapping) -> int:
    """Far more cycles than any run takes: everything one after the other, and a margin."""
    work = int(program.piece_length.sum()) + len(program.piece_length)
    words = max(mapping.key_words, mapping.value_words)
    repeats = len(program.stage_kind) // max(len(program.line_piece), 1) + 1
    transfers = hardware.dram_cycles(int(program.transfer_bytes.sum()))
    softmax = 3 * int(program.row_scores.sum()) + 2 * len(program.row_scores)
    tokens = int(program.transfer_bytes.sum()) // max(mapping.token_bytes, 1)
    decode = tokens * (mapping.decode_macs // hardware.decoder_macs + 1)
    each = hardware.pipeline_cycles + hardware.reconfigure_cycles + hardware.dram_latency_cycles
    each += hardware.softmax_latency_cycles + 8
    total = 4 * work * words * repeats * hardware.lines + transfers + softmax + decode
    return 10 * (total + each * (len(program.stage_kind) + len(program.transfer_bytes))) + 10_000


def _machine(hardware: Hardware, mapping: Mapping) -> Machine:
    rate = hardware.dram_bytes_per_cycle
    none = 2**40
    capacity = [
        hardware.q_buffer_bytes,
        hardware.k_buffer_bytes,
        hardware.v_buffer_bytes,
        hardware.index_buffer_bytes,
        none,
        none,
    ]
    word = hardware.word_bytes
    banks = [hardware.q_banks, hardware.k_banks, hardware.v_banks]
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
        np.array(capacity, np.int64),
        np.array([count * word for count in banks] + [none] * 3, np.int64),
        mapping.decode_macs,
        hardware.decoder_macs,
        mapping.staging_tokens,
        mapping.codec_bytes,
    )


def _state(machine: Machine, program: Program, mapping: Mapping) -> State:
    channels, lines = 6, machine.lines
    zeros = np.zeros
    rows = max(int(np.diff(program.unit_row).max()), 1)
    by_line = [zeros(lines, np.int64) for _ in range(3)]
    most_banks = max(machine.q_banks, machine.v_banks)
    return State(
        program.channel_first[:-1].copy(),
        zeros(channels, np.int64),
        zeros(channels, np.int64),
        program.channel_first[:-1].copy(),
        zeros(channels, np.int64),
        zeros((channels, machine.dram_latency + 1), np.int64),
        zeros(channels, np.int64),
        zeros(2, np.int64),
        *by_line,
        zeros(lines, np.bool_),
        *(zeros(lines, np.int64) for _ in range(5)),
        zeros(lines, np.bool_),
        np.full(machine.k_banks, -1, np.int64),
        zeros(machine.k_banks, np.int64),
        np.full(most_banks, -1, np.int64),
        zeros(most_banks, np.int64),
        np.full(machine.output_banks, -1, np.int64),
        zeros((2, rows), np.int64),
        zeros((2, rows), np.int64),
        zeros(3, np.int64),
        zeros(channels, np.int64),
        zeros(len(STALLS), np.int64),
    )
