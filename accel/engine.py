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
import zlib
from pathlib import Path

from numba import njit

from .hardware import Hardware
from .lines import step_line
from .machine import (
    ARRIVED,
    AT_WORK,
    BEGUN,
    BUSY,
    CONSUMED,
    CYCLES,
    DECODER,
    DRAM,
    FETCHED,
    FLUSH,
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
    SPLIT,
    STAGE,
    STORE_ROOM,
    STORES_DONE,
    TAIL_CYCLES,
    TURN,
    Trace,
    core,
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


@core
def _begin(machine, program, state, stage):
    """Lines at the start of a stage; rows at the start of a unit."""
    plan, unit = program.stages[stage, PLAN], program.stages[stage, UNIT]
    state.lines[:] = 0
    at_work = 0
    for line in range(machine.lines):
        state.lines[line, PIECE] = program.line_piece[plan, line]
        state.lines[line, FETCHED] = program.line_entry[plan, line]
        state.lines[line, CONSUMED] = program.line_entry[plan, line]
        at_work += program.line_piece[plan, line] < program.line_piece[plan, line + 1]
    state.run[BEGUN], state.run[TURN], state.run[AT_WORK] = 1, 0, at_work
    again = stage > 0 and program.stages[stage - 1, UNIT] == unit
    if program.stages[stage, KIND] == SDDMM and not again:
        first = program.unit_row[unit]
        for row in range(program.unit_row[unit + 1] - first):
            state.rows[unit & 1, row, 0] = program.row_scores[first + row]


@core
def _book(program, state, trace, stage):
    """Add one cycle's line states to the stage, and the cycle to a phase."""
    worst, most = IMBALANCE, 0
    for cause in range(state.did.size):
        lines = state.did[cause]
        trace.stage_stalls[stage, cause] += lines
        if cause != IMBALANCE and lines > most:
            worst, most = cause, lines
    phase = 0 if program.stages[stage, KIND] == SDDMM else 1
    if state.did[BUSY] == 0:
        if worst in (DRAM, INDEX_REFILL):
            phase = P_LOAD
        elif worst == DECODER:
            phase = P_DECODE
        elif worst == SOFTMAX:
            phase = P_SOFTMAX
    trace.phases[phase] += 1


@core
def _wait(machine, trace, stage, cause, phase):
    """A cycle in which all lines wait for one thing."""
    trace.stage_stalls[stage, cause] += machine.lines
    trace.phases[phase] += 1


@core
def _next_round(machine, program, state, stage):
    """Open the next lockstep round once no line has work of this one."""
    plan = program.stages[stage, PLAN]
    for line in range(machine.lines):
        piece = state.lines[line, PIECE]
        left = piece < program.line_piece[plan, line + 1]
        if left and program.pieces[piece, ROUND] == state.run[TURN]:
            return
    state.run[TURN] += 1


@core
def _step_lines(machine, program, state, trace, stage, cycle):
    """One cycle of all lines."""
    state.did[:] = 0
    reads = 0
    line = cycle % machine.lines
    for _ in range(machine.lines):
        did, reads = step_line(machine, program, state, trace, stage, line, reads, cycle)
        state.did[did] += 1
        line += 1
        if line == machine.lines:
            line = 0
    _book(program, state, trace, stage)
    if machine.lockstep:
        _next_round(machine, program, state, stage)


@core
def _step_stage(machine, program, state, trace, cycle):
    """One cycle of the stage in work; returns whether it has ended."""
    run = state.run
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
    _step_lines(machine, program, state, trace, stage, cycle)
    if run[AT_WORK] > 0:
        return False
    run[FLUSH] = machine.pipeline
    return machine.pipeline == 0


@core
def _next_stage(machine, program, state, trace, cycle):
    """Close the stage in work and free what only it and earlier ones needed."""
    trace.stage_times[state.run[STAGE], 1] = cycle + 1
    stage = state.run[STAGE] + 1
    state.run[STAGE], state.run[BEGUN] = stage, 0
    release(machine, program, state, stage)
    if stage < program.stages.shape[0]:
        trace.stage_times[stage, 0] = cycle + 1
        state.run[SPLIT] = program.stages[stage, RECONFIGURE_CYCLES]


def _compiled(sources: int):
    """The main loop, compiled when first called and cached on disk.

    The cache looks at this file alone; ``sources``, a fingerprint of all files of the core,
    makes a change in any of them count.
    """

    @njit(_nrt=False, error_model="numpy", cache=True)
    def stepped(machine, program, state, trace, limit):
        """Step until every stage and store is done; False where ``limit`` is not enough."""
        stages = program.stages.shape[0]
        stores = program.channel_first[STORE + 1] - program.channel_first[STORE]
        for cycle in range(limit if sources else 0):
            stage = state.run[STAGE]
            if stage == stages and trace.counts[STORES_DONE] == stores:
                trace.counts[CYCLES] = cycle
                return True
            serve_dram(machine, program, state, trace, stage, cycle)
            arrive(machine, state, trace)
            if stage == stages:
                trace.counts[TAIL_CYCLES] += 1
                trace.phases[P_STORE] += 1
            elif _step_stage(machine, program, state, trace, cycle):
                _next_stage(machine, program, state, trace, cycle)
        return False

    return stepped


def _fingerprint() -> int:
    """Of the sources that the core is compiled from; never 0."""
    names = ("assign", "engine", "lines", "machine", "memory", "program")
    folder = Path(__file__).parent
    text = b"".join((folder / f"{name}.py").read_bytes() for name in names)
    return zlib.crc32(text) or 1


_run = _compiled(_fingerprint())


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
