"""Part of the compiled core: one MAC line, one cycle.

A line in SDDMM holds a key, and reads the next into a second register; each cycle it takes
one word of a query. A line in SpMM holds an output row in its accumulators and takes one
word of a value row; a finished row drains word by word into the output buffer, whose banks
add what they get, so cut rows and the two engines' halves of a row cost a drain each.

Pieces of the denser engine go through their operands in order; those of the sparser engine
read them from IdxBuf, through two index registers a line.
"""

from __future__ import annotations

from .assign import DENSE_ROUND
from .machine import (
    ARRIVED,
    AT_WORK,
    BANK,
    BARRIER,
    BUSY,
    CONSUMED,
    DECODER,
    DRAIN,
    DRAIN_ROW,
    DRAINED,
    DRAINING,
    DRAM,
    FETCHED,
    FORWARDED,
    HOLDS,
    IMBALANCE,
    INDEX_PORT,
    INDEX_READS,
    INDEX_REFILL,
    KEY_READS,
    KEY_REGISTER,
    KEY_WORDS,
    OPERAND,
    OPERAND_BANK,
    OUTPUT_BANK,
    PIECE,
    PRELOAD,
    QUERY_READS,
    QUERY_WORDS,
    SOFTMAX,
    SOFTMAX_CYCLES,
    SOFTMAX_FREE,
    TURN,
    USED,
    VALUE_READS,
    VALUE_WORDS,
    VECTOR_BANK,
    WAITED,
    WAITING,
    WORD,
    core,
)
from .memory import grant, sent
from .program import (
    ENTRY_ARRIVAL,
    ENTRY_OPERAND,
    FIRST,
    HEAD,
    HEADS,
    INDEX,
    INDEX_BYTES,
    KIND,
    LENGTH,
    OPERAND_TOKEN,
    PLAN,
    ROUND,
    SDDMM,
    UNIT,
    VECTOR,
    VECTOR_TOKEN,
    WORDS,
    K,
    Q,
    V,
)


@core
def step_line(machine, program, state, trace, stage, line, reads, cycle):
    """Returns (what the line did, index reads of this cycle so far)."""
    piece = state.lines[line, PIECE]
    draining = state.lines[line, DRAINING] > 0
    end = program.line_piece[program.stages[stage, PLAN], line + 1]
    if piece == end and not draining:
        return IMBALANCE, reads
    preloading = piece + 1 if state.lines[line, HOLDS] else piece
    had = state.lines[line, FETCHED]
    reads = _next_index(machine, program, state, trace, stage, line, reads)
    scores = program.stages[stage, KIND] == SDDMM
    if piece == end:
        did = DRAIN
    elif program.pieces[piece, ROUND] > state.run[TURN]:
        did = BARRIER
    elif scores:
        did = _score_word(machine, program, state, trace, stage, line, had, cycle)
    else:
        did = _value_word(machine, program, state, trace, stage, line, had, cycle)
    if scores and preloading < end:
        _load_key(machine, program, state, trace, stage, line, preloading, cycle)
    elif draining:
        _drain(machine, program, state, trace, stage, line, cycle)
    if state.lines[line, PIECE] == end and state.lines[line, DRAINING] == 0:
        state.run[AT_WORK] -= 1
    return did, reads


@core
def _indexed(machine, program, state, stage, entry):
    """Is this entry of the stage's index stream on chip?"""
    place = program.entries[entry, ENTRY_ARRIVAL] + 1
    needed = program.stages[stage, INDEX_BYTES] + place * machine.entry_bytes
    return state.channels[INDEX, ARRIVED] >= needed


@core
def _next_index(machine, program, state, trace, stage, line, reads):
    """Read an entry into a free index register, if IdxBuf has it and a port is left."""
    entry = state.lines[line, FETCHED]
    last = program.line_entry[program.stages[stage, PLAN], line + 1]
    if entry == last or entry - state.lines[line, CONSUMED] >= 2:
        return reads
    if reads == machine.index_entries or not _indexed(machine, program, state, stage, entry):
        return reads
    state.lines[line, FETCHED] += 1
    state.channels[INDEX, USED] -= machine.entry_bytes * machine.dram_denominator
    trace.counts[INDEX_READS] += 1
    return reads + 1


@core
def _operand(machine, program, state, stage, line, piece, had):
    """(operand that the line is at, BUSY), or what it waits for.

    ``had``: entries in its registers at the start of the cycle.
    """
    place = program.pieces[piece, FIRST] + state.lines[line, OPERAND]
    if program.pieces[piece, ROUND] == DENSE_ROUND:
        return place, BUSY
    if had > state.lines[line, CONSUMED]:
        return program.entries[place, ENTRY_OPERAND], BUSY
    if _indexed(machine, program, state, stage, place):
        return place, INDEX_PORT
    return place, INDEX_REFILL


@core
def _missing(machine, state, channel):
    """Why a token is not there: it is in DRAM, or it waits for the decoder."""
    if machine.decode_cost == 0 or channel >= V:
        return DRAM
    landed = sent(state, channel)
    return DECODER if landed > state.channels[channel, ARRIVED] else DRAM


@core
def _advance(program, state, line, piece, words):
    """One word is done; returns 0, or 1 = the operand is finished, or 2 = the piece is."""
    state.lines[line, WORD] += 1
    if state.lines[line, WORD] < words:
        return 0
    state.lines[line, WORD] = 0
    state.lines[line, OPERAND] += 1
    if program.pieces[piece, ROUND] != DENSE_ROUND:
        state.lines[line, CONSUMED] += 1
    if state.lines[line, OPERAND] < program.pieces[piece, LENGTH]:
        return 1
    state.lines[line, OPERAND] = 0
    state.lines[line, PIECE] += 1
    return 2


@core
def _score_word(machine, program, state, trace, stage, line, had, cycle):
    """A line of SDDMM asks for the next word of its query; returns what it did."""
    piece = state.lines[line, PIECE]
    if not state.lines[line, HOLDS]:
        key = program.stages[stage, VECTOR_TOKEN] + program.pieces[piece, VECTOR]
        if key < state.channels[K, ARRIVED]:
            return KEY_REGISTER
        return _missing(machine, state, K)
    row, stall = _operand(machine, program, state, stage, line, piece, had)
    if stall != BUSY:
        return stall
    token = program.stages[stage, OPERAND_TOKEN] + row
    if token >= state.channels[Q, ARRIVED]:
        state.lines[line, WAITING] = 1
        return _missing(machine, state, Q)
    words = program.stages[stage, WORDS]
    word = token * program.stages[stage, HEADS] + program.stages[stage, HEAD]
    word = word * words + state.lines[line, WORD]
    granted = grant(state, OPERAND_BANK, machine.q_banks, word, cycle)
    if granted == 0:
        return BANK
    trace.counts[QUERY_READS] += granted - 1
    trace.counts[QUERY_WORDS] += 1
    if state.lines[line, WORD] == 0 and program.pieces[piece, ROUND] != DENSE_ROUND:
        trace.counts[WAITED if state.lines[line, WAITING] else FORWARDED] += 1
    state.lines[line, WAITING] = 0
    finished = _advance(program, state, line, piece, words)
    if finished > 0:
        _score_done(machine, program, state, trace, program.stages[stage, UNIT], row, cycle)
    if finished == 2:
        state.lines[line, HOLDS] = 0
    return BUSY


@core
def _score_done(machine, program, state, trace, unit, row, cycle):
    """A score of ``row`` is written; the row's last one sends it through the softmax unit.

    Three passes in a pipeline (maximum; exponential and sum; division), each ``lanes``
    scores a cycle, rows in the order in which they become complete.
    """
    state.rows[unit & 1, row, 0] -= 1
    if state.rows[unit & 1, row, 0] > 0:
        return
    scores = program.row_scores[program.unit_row[unit] + row]
    took = (scores + machine.softmax_lanes - 1) // machine.softmax_lanes
    ready = cycle + 1
    for step in range(3):
        ready = max(ready, state.units[SOFTMAX_FREE + step]) + took
        state.units[SOFTMAX_FREE + step] = ready
    trace.counts[SOFTMAX_CYCLES] += took
    state.rows[unit & 1, row, 1] = ready + machine.softmax_latency


@core
def _load_key(machine, program, state, trace, stage, line, piece, cycle):
    """Read a word of ``piece``'s key into the spare register; use it once it is whole."""
    words = program.stages[stage, WORDS]
    token = program.stages[stage, VECTOR_TOKEN] + program.pieces[piece, VECTOR]
    if state.lines[line, PRELOAD] < words and token < state.channels[K, ARRIVED]:
        word = token * program.stages[stage, HEADS] + program.stages[stage, HEAD]
        word = word * words + state.lines[line, PRELOAD]
        granted = grant(state, VECTOR_BANK, machine.k_banks, word, cycle)
        if granted > 0:
            trace.counts[KEY_READS] += granted - 1
            trace.counts[KEY_WORDS] += 1
            state.lines[line, PRELOAD] += 1
    if not state.lines[line, HOLDS] and state.lines[line, PRELOAD] == words:
        state.lines[line, HOLDS] = 1
        state.lines[line, PRELOAD] = 0


@core
def _value_word(machine, program, state, trace, stage, line, had, cycle):
    """A line of SpMM asks for the next word of its value row; returns what it did."""
    piece = state.lines[line, PIECE]
    row, unit = program.pieces[piece, VECTOR], program.stages[stage, UNIT]
    if cycle < state.rows[unit & 1, row, 1]:
        return SOFTMAX
    key, stall = _operand(machine, program, state, stage, line, piece, had)
    if stall != BUSY:
        return stall
    words = program.stages[stage, WORDS]
    if state.lines[line, DRAINING] > 0:
        last = state.lines[line, OPERAND] + 1 == program.pieces[piece, LENGTH]
        if last and state.lines[line, WORD] + 1 == words:
            return DRAIN
    token = program.stages[stage, OPERAND_TOKEN] + key
    if token >= state.channels[V, ARRIVED]:
        return _missing(machine, state, V)
    word = token * words + state.lines[line, WORD]
    granted = grant(state, OPERAND_BANK, machine.v_banks, word, cycle)
    if granted == 0:
        return BANK
    trace.counts[VALUE_READS] += granted - 1
    trace.counts[VALUE_WORDS] += 1
    if _advance(program, state, line, piece, words) == 2:
        state.lines[line, DRAINING] = words
        state.lines[line, DRAIN_ROW] = row
    return BUSY


@core
def _drain(machine, program, state, trace, stage, line, cycle):
    """A finished row adds its next word into the output buffer, if the bank is free."""
    words = program.stages[stage, WORDS]
    left = state.lines[line, DRAINING]
    word = state.lines[line, DRAIN_ROW] * words + words - left
    bank = word % machine.output_banks
    if state.banks[OUTPUT_BANK, bank, 0] != cycle:
        state.banks[OUTPUT_BANK, bank, 0] = cycle
        state.lines[line, DRAINING] = left - 1
        trace.counts[DRAINED] += 1
