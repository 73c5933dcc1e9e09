"""Part of the compiled core: one MAC line, one cycle.

A line in SDDMM holds a key, and reads the next into a second register; each cycle it takes
one word of a query. A line in SpMM holds an output row in its accumulators and takes one
word of a value row; a finished row drains word by word into the output buffer, whose banks
add what they get, so cut rows and the two engines' halves of a row cost a drain each.

Pieces of the denser engine go through their operands in order; those of the sparser engine
read them from IdxBuf, through two index registers a line, or in SpMM from the list of their
row, into which SDDMM has written the key of each score as it came out. A line acts on its
registers as they were at the start of the cycle.
"""

from __future__ import annotations

from ...jit import core
from ..assign import DENSE_ROUND
from ..program import K, Q, V
from .dma_flat import grant
from .registers import (
    BANK,
    BARRIER,
    BUSY,
    DECODER,
    DRAIN,
    DRAM,
    IMBALANCE,
    INDEX_PORT,
    INDEX_REFILL,
    KEY_REGISTER,
    SOFTMAX,
)


@core
def open_piece(line, pieces):
    """Registers of the line's next piece, if it has one."""
    line.operand = line.left = 0
    if line.piece < line.last_piece:
        piece = pieces[line.piece]
        line.vector, line.round = piece.vector, piece.round
        line.operand, line.left = piece.place, piece.length


@core
def step_scores(
    machine,
    run,
    stage,
    line,
    pieces,
    entries,
    channels,
    read_banks,
    other_banks,
    rows,
    lists,
    counts,
):
    """A line of SDDMM, one cycle; returns what it did."""
    if line.piece == line.last_piece:
        return IMBALANCE
    known = line.round == DENSE_ROUND or line.fetched > line.consumed
    preloading = line.piece + line.holds
    _read_index(machine, run, line, entries, counts)
    if line.round > run.turn:
        did = BARRIER
    elif not line.holds:
        key = stage.vector_token + line.vector
        did = KEY_REGISTER if key < channels[K].arrived else _missing(channels[K])
    elif not known:
        did = _index_stall(run, line, entries)
    else:
        did = _query_word(run, stage, line, entries, channels[Q], read_banks, counts)
    if did == BUSY and _word_done(run, stage, line, read_banks):
        row = rows[line.row]
        if machine.lists == 1 and line.round != DENSE_ROUND:
            lists[row.list] = line.vector
            row.list += 1
        _score_done(machine, run, row, counts)
        if _operand_done(run, line, pieces):
            line.holds = 0
    _load_key(run, stage, line, pieces, preloading, channels[K], other_banks, counts)
    return did


@core
def step_values(
    machine,
    run,
    stage,
    line,
    pieces,
    entries,
    channels,
    read_banks,
    other_banks,
    rows,
    lists,
    counts,
):
    """A line of SpMM, one cycle; returns what it did."""
    draining = line.draining
    if line.piece == line.last_piece:
        did = DRAIN if draining > 0 else IMBALANCE
    else:
        known = machine.lists > 0 or line.round == DENSE_ROUND or line.fetched > line.consumed
        if machine.lists == 0:
            _read_index(machine, run, line, entries, counts)
        if line.round > run.turn:
            did = BARRIER
        elif run.cycle < rows[line.vector].ready_at:
            run.wake_at = min(run.wake_at, rows[line.vector].ready_at)
            did = SOFTMAX
        elif not known:
            did = _index_stall(run, line, entries)
        else:
            operands = (entries, lists)
            did = _value_word(machine, run, stage, line, operands, channels[V], read_banks, counts)
    if draining > 0:
        _drain(run, line, other_banks, counts)
    if did == BUSY:
        row = line.vector
        if _word_done(run, stage, line, read_banks) and _operand_done(run, line, pieces):
            line.draining = stage.words
            line.drain_bank = row * stage.words % other_banks.size
    return did


@core
def _read_index(machine, run, line, entries, counts):
    """Read an entry into a free index register, if IdxBuf has it and a port is left."""
    if line.fetched == line.last_entry or line.fetched - line.consumed == 2:
        return
    if run.index_reads < machine.index_entries and entries[line.fetched].arrival <= run.on_chip:
        run.index_freed += entries[line.fetched].size
        line.fetched += 1
        run.index_reads += 1
        counts.index_reads += 1
        run.moved = 1


@core
def _index_stall(run, line, entries):
    return INDEX_PORT if entries[line.consumed].arrival <= run.on_chip else INDEX_REFILL


@core
def _missing(channel):
    """Why a token is not there: it is in DRAM, or it waits for the decoder."""
    return DECODER if channel.sent > channel.arrived else DRAM


@core
def _operand(line, entries):
    return line.operand if line.round == DENSE_ROUND else entries[line.consumed].operand


@core
def _listed_operand(machine, line, operands):
    """... of SpMM: where one stream serves both products, from the list of the row."""
    entries, lists = operands
    if machine.lists == 1 and line.round != DENSE_ROUND:
        return lists[line.operand]
    return _operand(line, entries)


@core
def _query_word(run, stage, line, entries, channel, banks, counts):
    """Ask for the next word of the line's query."""
    if line.address < 0:
        line.row = _operand(line, entries)
        token = stage.operand_token + line.row
        if token >= channel.arrived:
            line.waiting = 1
            return _missing(channel)
        line.address = (stage.operand_place + line.row) * stage.words
        line.bank = line.address % banks.size
    granted = grant(banks[line.bank], line.address, run.cycle)
    if granted == 0:
        return BANK
    counts.query_reads += granted - 1
    counts.query_words += 1
    if line.word == 0 and line.round != DENSE_ROUND:
        counts.waited += line.waiting
        counts.forwarded += 1 - line.waiting
        line.waiting = 0
    return BUSY


@core
def _value_word(machine, run, stage, line, operands, channel, banks, counts):
    """Ask for the next word of the line's value row."""
    if line.draining > 0 and line.left == 1 and line.word == stage.words - 1:
        return DRAIN
    if line.address < 0:
        operand = _listed_operand(machine, line, operands)
        if stage.operand_token + operand >= channel.arrived:
            return DRAM
        line.address = (stage.operand_place + operand) * stage.words
        line.bank = line.address % banks.size
    granted = grant(banks[line.bank], line.address, run.cycle)
    if granted == 0:
        return BANK
    counts.value_reads += granted - 1
    counts.value_words += 1
    return BUSY


@core
def _word_done(run, stage, line, banks):
    """Move on to the next word; is the operand finished?"""
    run.moved = 1
    line.word += 1
    line.address += 1
    line.bank += 1
    if line.bank == banks.size:
        line.bank = 0
    return line.word == stage.words


@core
def _operand_done(run, line, pieces):
    """Move on to the next operand; is the piece finished?"""
    line.word = 0
    line.address = -1
    line.left -= 1
    line.operand += 1
    if line.round != DENSE_ROUND:
        line.consumed += 1
    if line.left > 0:
        return False
    if line.round == DENSE_ROUND:
        run.denser_end = run.cycle + 1
    else:
        run.sparser_end = run.cycle + 1
    line.piece += 1
    run.piece_done = 1
    open_piece(line, pieces)
    return True


@core
def _score_done(machine, run, row, counts):
    """A score of ``row`` is made; the row's last one sends it through the softmax unit.

    Three passes in a pipeline (maximum; exponential and sum; division), each ``lanes``
    scores a cycle, rows in the order in which they become complete.
    """
    row.left -= 1
    if row.left > 0:
        return
    took = (row.scores + machine.softmax_lanes - 1) // machine.softmax_lanes
    written = run.cycle + 1 + machine.pipeline
    run.maximum_free = max(written, run.maximum_free) + took
    run.sum_free = max(run.maximum_free, run.sum_free) + took
    run.division_free = max(run.sum_free, run.division_free) + took
    row.ready_at = run.division_free + machine.softmax_latency
    counts.softmax_cycles += took


@core
def _load_key(run, stage, line, pieces, preloading, channel, banks, counts):
    """Read a word of a piece's key into the second register; use it once it is whole."""
    if line.preload < stage.words and preloading < line.last_piece:
        if line.preload == 0:
            vector = pieces[preloading].vector
            if stage.vector_token + vector >= channel.arrived:
                return
            line.key_address = (stage.vector_place + vector) * stage.words
            line.key_bank = line.key_address % banks.size
        granted = grant(banks[line.key_bank], line.key_address, run.cycle)
        if granted > 0:
            counts.key_reads += granted - 1
            counts.key_words += 1
            run.moved = 1
            line.preload += 1
            line.key_address += 1
            line.key_bank = line.key_bank + 1 if line.key_bank + 1 < banks.size else 0
    if line.preload == stage.words and not line.holds:
        line.holds = 1
        line.preload = 0


@core
def _drain(run, line, banks, counts):
    """The row before adds its next word into the output buffer, if the bank is free."""
    if grant(banks[line.drain_bank], 0, run.cycle) == 2:
        line.draining -= 1
        line.drain_bank = line.drain_bank + 1 if line.drain_bank + 1 < banks.size else 0
        counts.drained_words += 1
        run.moved = 1
        run.piece_done = 1
