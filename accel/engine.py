"""The compiled core: a ViTCoD-style attention engine, stepped cycle by cycle.

One cycle: the DRAM moves bytes in and output rows out, the decoder turns latent tokens into
queries and keys, and every MAC line asks for its next word. Requests meet at banked buffers:
one word a bank and cycle, the same word for several lines is one read (multicast), lines
that ask one bank for different words wait. The line that is served first moves on by one
each cycle. A line acts on its registers as they were at the start of the cycle.

Arrays in, arrays out: `Program` says what to do, `Machine` how fast, `run` returns `Trace`.
"""

from __future__ import annotations

import logging

import numpy as np
from numba import njit

from .hardware import Hardware
from .lines import step_line
from .machine import (
    ARRIVED,
    BUSY,
    CYCLES,
    DECODER,
    DRAINING,
    DRAM,
    FETCHED,
    IMBALANCE,
    INDEX_REFILL,
    P_DECODE,
    P_LOAD,
    P_RECONFIGURE,
    P_SOFTMAX,
    P_STORE,
    PIECE,
    PIPELINE,
    RECONFIGURE,
    SOFTMAX,
    STORE_ROOM,
    STORES_DONE,
    TAIL_CYCLES,
    Trace,
    empty_trace,
    initial_state,
    machine_of,
)
from .mapping import Mapping
from .memory import arrive, release, serve_dram
from .program import (
    INDEX,
    INDEX_BYTES,
    KIND,
    PLAN,
    RECONFIGURE_CYCLES,
    ROUND,
    SDDMM,
    STORE,
    STORES,
    UNIT,
    Program,
)

# Columns of the run's own registers: the stage in work, whether its lines have begun, the
# lockstep round, cycles of reconfiguration and of pipeline drain still to wait.
STAGE, BEGUN, TURN, SPLIT, FLUSH = range(5)


@njit
def _begin(machine, program, state, stage):
    """Lines at the start of a stage; rows at the start of a unit."""
    plan, unit = program.stages[stage, PLAN], program.stages[stage, UNIT]
    state.lines[:] = 0
    for line in range(machine.lines):
        state.lines[line, PIECE] = program.line_piece[plan, line]
        state.lines[line, FETCHED : FETCHED + 2] = program.line_entry[plan, line]
    again = stage > 0 and program.stages[stage - 1, UNIT] == unit
    if program.stages[stage, KIND] == SDDMM and not again:
        first, last = program.unit_row[unit], program.unit_row[unit + 1]
        state.rows[unit % 2, : last - first, 0] = program.row_scores[first:last]


@njit
def _book(program, trace, stage, counted):
    """Add one cycle's line states to the stage, and the cycle to a phase."""
    worst, most = IMBALANCE, 0
    for cause in range(counted.size):
        trace.stage_stalls[stage, cause] += counted[cause]
        if cause != IMBALANCE and counted[cause] > most:
            worst, most = cause, counted[cause]
    phase = 0 if program.stages[stage, KIND] == SDDMM else 1
    if counted[BUSY] == 0:
        if worst in (DRAM, INDEX_REFILL):
            phase = P_LOAD
        elif worst == DECODER:
            phase = P_DECODE
        elif worst == SOFTMAX:
            phase = P_SOFTMAX
    trace.phases[phase] += 1


@njit
def _wait(machine, trace, stage, cause, phase):
    """A cycle in which all lines wait for one thing."""
    trace.stage_stalls[stage, cause] += machine.lines
    trace.phases[phase] += 1


@njit
def _finished(machine, program, state, run):
    """Are the lines done with the stage? Opens the next lockstep round where they are not."""
    plan = program.stages[run[STAGE], PLAN]
    done, held = True, False
    for line in range(machine.lines):
        piece = state.lines[line, PIECE]
        if piece < program.line_piece[plan, line + 1]:
            done = False
            held = held or program.pieces[piece, ROUND] == run[TURN]
        elif state.lines[line, DRAINING] > 0:
            done = False
    if not held:
        run[TURN] += 1
    return done


@njit
def _step_lines(machine, program, state, trace, run, counted, cycle):
    """One cycle of all lines; returns whether the stage is done."""
    counted[:] = 0
    reads = 0
    for step in range(machine.lines):
        line = (cycle + step) % machine.lines
        did, reads = step_line(
            machine, program, state, trace, run[STAGE], line, run[TURN], reads, cycle
        )
        counted[did] += 1
    _book(program, trace, run[STAGE], counted)
    return _finished(machine, program, state, run)


@njit
def _step_stage(machine, program, state, trace, run, counted, cycle):
    """One cycle of the stage in work; returns whether it has ended."""
    stage = run[STAGE]
    if run[FLUSH] > 0:
        run[FLUSH] -= 1
        product = 0 if program.stages[stage, KIND] == SDDMM else 1
        _wait(machine, trace, stage, PIPELINE, product)
        return run[FLUSH] == 0
    if run[SPLIT] > 0:
        run[SPLIT] -= 1
        _wait(machine, trace, stage, RECONFIGURE, P_RECONFIGURE)
        return False
    if run[BEGUN] == 0:
        if trace.counts[STORES_DONE] < program.stages[stage, STORES]:
            _wait(machine, trace, stage, STORE_ROOM, P_STORE)
            return False
        if state.channels[INDEX, ARRIVED] < program.stages[stage, INDEX_BYTES]:
            _wait(machine, trace, stage, INDEX_REFILL, P_LOAD)
            return False
        _begin(machine, program, state, stage)
        run[BEGUN], run[TURN] = 1, 0
    done = _step_lines(machine, program, state, trace, run, counted, cycle)
    if done and machine.pipeline > 0:
        run[FLUSH] = machine.pipeline
        return False
    return done


@njit
def _next_stage(machine, program, state, trace, run, cycle):
    """Close the stage in work and free what only it and earlier ones needed."""
    trace.stage_times[run[STAGE], 1] = cycle + 1
    run[STAGE] += 1
    run[BEGUN] = 0
    release(machine, program, state, run[STAGE])
    if run[STAGE] < program.stages.shape[0]:
        trace.stage_times[run[STAGE], 0] = cycle + 1
        run[SPLIT] = program.stages[run[STAGE], RECONFIGURE_CYCLES]


@njit
def _run(machine, program, state, trace, limit):
    """Step until every stage and store is done; False where ``limit`` cycles do not do."""
    stages = program.stages.shape[0]
    stores = program.channel_first[STORE + 1] - program.channel_first[STORE]
    counted = np.zeros(trace.stage_stalls.shape[1], np.int64)
    run = np.zeros(5, np.int64)
    for cycle in range(limit):
        if run[STAGE] == stages and trace.counts[STORES_DONE] == stores:
            trace.counts[CYCLES] = cycle
            return True
        serve_dram(machine, program, state, trace, run[STAGE], cycle)
        arrive(machine, state, trace, cycle)
        if run[STAGE] == stages:
            trace.counts[TAIL_CYCLES] += 1
            trace.phases[P_STORE] += 1
        elif _step_stage(machine, program, state, trace, run, counted, cycle):
            _next_stage(machine, program, state, trace, run, cycle)
    return False


def run(program: Program, hardware: Hardware, mapping: Mapping) -> Trace:
    """Step ``program`` on ``hardware`` to its end.

    The first call on a machine compiles the core (seconds) and caches it on disk; that is
    logged under the logger ``sievit.accel``.
    """
    machine, trace = machine_of(hardware, mapping), empty_trace(program)
    if not _run.signatures:
        logging.getLogger("sievit.accel").info(
            "loading the cycle engine; the first time on a machine it is compiled, which "
            "takes some seconds"
        )
    limit = _cycle_limit(program, hardware, mapping)
    if not _run(machine, program, initial_state(machine, program), trace, limit):
        raise RuntimeError(
            f"{mapping.op.name} did not end within {limit} cycles: a fault of the engine or "
            f"of its program (mapping {mapping.group} heads x {mapping.query_tile} queries)"
        )
    return trace


def _cycle_limit(program: Program, hardware: Hardware, mapping: Mapping) -> int:
    """More cycles than any run takes: everything on one line, one thing after the other."""
    words = max(mapping.key_words, mapping.value_words) + 1
    work = 2 * (int(program.row_scores.sum()) + len(program.row_scores)) * words
    byte_count = int(program.transfers[:, 0].sum())
    softmax = 3 * int(program.row_scores.sum())
    tokens = int((program.transfers[:, 0] // program.transfers[:, 6]).sum())
    decode = tokens * (mapping.decode_macs // hardware.decoder_macs + 1)
    waits = (
        hardware.pipeline_cycles
        + hardware.reconfigure_cycles
        + hardware.dram_latency_cycles
        + hardware.softmax_latency_cycles
    )
    steps = len(program.stages) + len(program.transfers) + 1
    total = work * hardware.lines + hardware.dram_cycles(byte_count) + softmax + decode
    return 4 * (total + waits * steps) + 1000
