"""The compiled core: a ViTCoD-style attention engine, stepped cycle by cycle.

One cycle: the DRAM moves bytes in and output rows out, the decoder turns latent tokens into
queries and keys, and every MAC line asks for its next word. Requests meet at banked buffers:
one word a bank and cycle, the same word for several lines is one read (multicast), lines
that ask one bank for different words wait. The line that is served first moves on by one
each cycle.

A stage is one product (SDDMM or SpMM) of one head, query tile and key tile; stages follow
each other, each begins when its index bytes up to the stream are there (and, for SpMM, room
for its output rows), and ends when the last result has left the pipeline. Loads for later
stages, decoding, softmax and stores run beside it.

Choices: scores and probabilities have ports enough (the lines make at most lines / words
scores a cycle), and so have the pointers and bitmaps in IdxBuf; all of them are counted, by
`program` and its user. A cycle in which nothing changes but time is not stepped again: each
line does what it did before, which is exact.

Arrays in, arrays out: `Program` says what to do, `run` returns a `Trace`. Witnesses: a naive
twin in the tests, and the lines in Verilog (rtl/).
"""

from __future__ import annotations

from ...jit import cached_core, core, sources_digest
from ..mapping import Mapping
from ..pattern import SDDMM, SPMM
from ..program import INDEX, Program
from .dma_ddr4 import all_landed, serve_lines
from .dma_flat import arrive, serve_dram
from .idle import let_drip, mark, next_event, rounds_of_drips
from .limits import check_limits
from .mac_lines import open_piece, step_scores, step_values
from .registers import (
    BUSY,
    COUNT,
    DECODER,
    DRAM,
    IMBALANCE,
    INDEX_REFILL,
    NEVER,
    P_DECODE,
    P_LOAD,
    P_RECONFIGURE,
    P_SOFTMAX,
    P_STORE,
    PIPELINE,
    RECONFIGURE,
    SOFTMAX,
    STORE_ROOM,
    Trace,
    empty_trace,
    initial_state,
    machine_of,
)


@core
def _begin(program, state, stage):
    """Lines at the start of a stage; rows at the start of a unit."""
    run, lines, plan = state.run, state.lines, stage.plan
    run.turn, run.begun = 0, 1
    for number in range(lines.size):
        line = lines[number]
        line.piece = program.line_piece[plan, number]
        line.last_piece = program.line_piece[plan, number + 1]
        line.fetched = line.consumed = program.line_entry[plan, number]
        line.last_entry = program.line_entry[plan, number + 1]
        line.word = line.waiting = line.holds = line.preload = line.draining = 0
        line.address = -1
        open_piece(line, program.pieces)
    if stage.opens_unit:
        rows = state.rows[stage.unit % 2]
        first = program.unit_row[stage.unit]
        for row in range(program.unit_row[stage.unit + 1] - first):
            rows[row].scores = rows[row].left = program.row_scores[first + row]
            rows[row].list = program.row_lists[first + row]


@core
def _step_lines(machine, program, state, stage, counts):
    """One cycle of all lines: `state.counted` says how many did what."""
    run, lines, channels, counted = state.run, state.lines, state.channels, state.counted
    rows, lists = state.rows[stage.unit % 2], state.lists[stage.unit % 2]
    pieces, entries = program.pieces, program.entries
    q, k, v, o = state.query_banks, state.key_banks, state.value_banks, state.output_banks
    run.moved = run.index_reads = run.index_freed = run.piece_done = 0
    run.wake_at = NEVER
    run.on_chip = channels[INDEX].arrived - stage.index_bytes
    counted[:] = 0
    first = run.cycle % lines.size
    for step in range(lines.size):
        number = first + step
        if number >= lines.size:
            number -= lines.size
        line = lines[number]
        if stage.kind == SDDMM:
            did = step_scores(
                machine, run, stage, line, pieces, entries, channels, q, k, rows, lists, counts
            )
        else:
            did = step_values(
                machine, run, stage, line, pieces, entries, channels, v, o, rows, lists, counts
            )
        counted[did] += 1
    freed = run.index_freed * (1 - stage.index_stays)
    channels[INDEX].used -= freed * machine.dram_denominator


@core
def _book(stage, stalls, phases, counted, cycles):
    """Add the lines' states to the stage, and the time to a phase."""
    worst, most = IMBALANCE, 0
    for cause in range(counted.size):
        stalls[cause] += counted[cause] * cycles
        if cause != IMBALANCE and counted[cause] > most:
            worst, most = cause, counted[cause]
    phase = 0 if stage.kind == SDDMM else 1
    if counted[BUSY] == 0:
        if worst in (DRAM, INDEX_REFILL):
            phase = P_LOAD
        elif worst == DECODER:
            phase = P_DECODE
        elif worst == SOFTMAX:
            phase = P_SOFTMAX
    phases[phase] += cycles


@core
def _lines_done(run, lines):
    """Is every line done with the stage? Opens the next lockstep round where it may."""
    done, held = True, False
    for number in range(lines.size):
        line = lines[number]
        if line.piece < line.last_piece:
            done = False
            held = held or line.round == run.turn
        elif line.draining > 0:
            done = False
    if not held:
        run.turn += 1
        run.still = 0
    return done


@core
def _whole_array(machine, run, stage, channels, stalls, phases, counts, cycles):
    """Cycles in which all lines wait for one thing: books them and returns True, if so."""
    cause, phase = BUSY, 0 if stage.kind == SDDMM else 1
    if run.flush > 0:
        run.flush -= cycles
        cause = PIPELINE
    elif run.split > 0:
        run.split -= cycles
        if run.split == 0:
            run.still = 0
        cause, phase = RECONFIGURE, P_RECONFIGURE
    elif run.begun == 0 and counts.stores_done < stage.stores:
        cause, phase = STORE_ROOM, P_STORE
    elif run.begun == 0 and channels[INDEX].arrived < stage.index_bytes:
        cause, phase = INDEX_REFILL, P_LOAD
    if cause == BUSY:
        return False
    stalls[cause] += machine.lines * cycles
    phases[phase] += cycles
    return True


@core
def _step_stage(machine, program, state, trace, counts):
    """One cycle of the stage in work; returns whether it has ended."""
    run, lines = state.run, state.lines
    stage, stalls = program.stages[run.stage], trace.stage_stalls[run.stage]
    phases = trace.stage_phases[run.stage]
    if _whole_array(machine, run, stage, state.channels, stalls, phases, counts, 1):
        return run.begun == 1 and run.flush == 0
    if run.begun == 0:
        run.still = 0
        _begin(program, state, stage)
    elif not (run.moved or run.arrived or run.cycle >= run.wake_at):
        _book(stage, stalls, phases, state.counted, 1)  # each line does what it did before
        return False
    _step_lines(machine, program, state, stage, counts)
    _book(stage, stalls, phases, state.counted, 1)
    if run.moved:
        run.still = 0
    idle = state.counted[IMBALANCE] == lines.size
    if not ((run.piece_done or idle) and _lines_done(run, lines)):
        return False
    run.flush = machine.pipeline
    run.still = 0
    return run.flush == 0


@core
def _pass(machine, program, state, trace, counts, ended, cycles):
    """``cycles`` more like the last one, in which nothing changed."""
    run = state.run
    run.cycle += cycles
    if ended:
        counts.tail_cycles += cycles
        trace.stage_phases[run.stage, P_STORE] += cycles
        return
    stage, stalls = program.stages[run.stage], trace.stage_stalls[run.stage]
    phases = trace.stage_phases[run.stage]
    if not _whole_array(machine, run, stage, state.channels, stalls, phases, counts, cycles):
        _book(stage, stalls, phases, state.counted, cycles)


@core
def _pass_idle(machine, program, state, trace, counts, ended):
    """After a cycle in which nothing changed: on to the next in which anything can. Returns
    False where there is none."""
    run = state.run
    event = next_event(machine, state, ended)
    if run.dripping:
        run.dripped += 1
        if run.quiet == 0:
            mark(state)
        run.quiet += 1
        if run.quiet > state.channels.size:
            rounds = rounds_of_drips(state, event)
            let_drip(state, rounds, counts)
            _pass(machine, program, state, trace, counts, ended, rounds * state.channels.size)
            run.quiet = 0
        return True
    run.quiet = 0
    if machine.ddr4 and not run.idle_memory:
        return True
    if event == NEVER:
        return False
    if event > run.cycle:
        _pass(machine, program, state, trace, counts, ended, event - run.cycle)
    return True


@core
def _log_rows(program, rows, unit, row_ready):
    """When the probabilities of a unit's rows were there."""
    first = program.unit_row[unit]
    for row in range(program.unit_row[unit + 1] - first):
        if program.row_scores[first + row] > 0:
            row_ready[first + row] = rows[row].ready_at


@core
def _next_stage(machine, program, state, trace):
    """Close the stage in work and free what only it needed of the index buffer."""
    run = state.run
    stage = program.stages[run.stage]
    trace.stage_times[run.stage, 1] = run.cycle + 1
    trace.stage_engines[run.stage, 0] = run.denser_end
    trace.stage_engines[run.stage, 1] = run.sparser_end
    run.denser_end = run.sparser_end = 0
    if stage.kind == SPMM:
        _log_rows(program, state.rows[stage.unit % 2], stage.unit, trace.row_ready)
    freed = stage.index_frees
    state.channels[INDEX].used -= freed * machine.dram_denominator
    run.stage += 1
    run.begun = 0
    if run.stage < program.stages.size:
        trace.stage_times[run.stage, 0] = run.cycle + 1
        run.split = program.stages[run.stage].reconfigure


@core
def _left(channels):
    """Transfers to be done and tokens to be decoded."""
    left = 0
    for number in range(channels.size):
        channel = channels[number]
        left += channel.last - channel.current
        if channel.staging >= 0:
            left += channel.landed - channel.arrived
    return left


@core
def _finished(machine, state):
    """After the last stage: is everything moved, decoded and written?"""
    return _left(state.channels) == 0 and (not machine.ddr4 or all_landed(machine, state))


def _compiled(sources: str):
    """The main loop, compiled when first called and cached on disk.

    Numba's cache looks at the file of this function alone; ``sources``, a digest of all
    files of the core, makes a change in any of them count.
    """

    @cached_core
    def step(machine, program, state, trace, counts):
        """Step until all stages and channels are done; False where nothing moves any more."""
        assert sources
        run, channels, transfers = state.run, state.channels, program.transfers
        while True:
            ended = run.stage == program.stages.size
            if ended and _finished(machine, state):
                counts.cycles = run.cycle
                return True
            run.still = 1
            run.dripping = 0
            if machine.ddr4:
                serve_lines(machine, program, state, trace.transfer_times, trace.landed_at, counts)
            else:
                serve_dram(
                    machine, run, channels, transfers, trace.transfer_times, trace.landed_at, counts
                )
            arrive(machine, run, channels, program, state.flights, trace.decoded_at, counts)
            if ended:
                counts.tail_cycles += 1
                trace.stage_phases[run.stage, P_STORE] += 1
            elif _step_stage(machine, program, state, trace, counts):
                _next_stage(machine, program, state, trace)
                run.still = 0
            run.cycle += 1
            if run.still == 0:
                run.quiet = 0
            elif not _pass_idle(machine, program, state, trace, counts, ended) and not (
                ended and _finished(machine, state)  # with the cycle just stepped
            ):
                return False

    return step


_step = _compiled(
    sources_digest(
        "dram/address", "dram/controller", "dram/ddr4", "dram/state", "jit", "vitcod/assign",
        "vitcod/core/decoder", "vitcod/core/dma_ddr4", "vitcod/core/dma_flat",
        "vitcod/core/engine", "vitcod/core/idle", "vitcod/core/mac_lines",
        "vitcod/core/registers", "vitcod/pattern", "vitcod/program",
    )
)  # fmt: skip


MEMORY_COUNTS = {
    "dram_row_hits": "hits",
    "dram_activates": "activates",
    "dram_refreshes": "refreshes",
}
"""Counts of a trace that the controllers of a DDR4 memory keep, by their names there."""


def run(program: Program, mapping: Mapping) -> Trace:
    """Step ``program`` on the mapping's hardware to its end.

    The first call on a computer compiles the core; see `jit`. Raises ValueError, naming the
    fields, for a run whose counts are too large (`limits`), and RuntimeError where the machine
    comes to a stand: a fault of the program or of the engine.
    """
    check_limits(program, mapping)
    machine, state = machine_of(mapping), initial_state(program, mapping)
    trace = empty_trace(program, mapping)
    counts = trace.counts.view(COUNT)[0]
    if not _step(machine, program, state, trace, counts):
        raise RuntimeError(
            f"{mapping.op.name} stands still at cycle {state.run['cycle']}, stage "
            f"{state.run['stage']} of {len(program.stages)}: a fault of the engine or of its "
            f"program (mapping {mapping.group} heads x {mapping.query_tile} queries)"
        )
    others = trace.stage_stalls.sum(axis=1) // mapping.hardware.lines * mapping.idle_lines
    trace.stage_stalls[:, IMBALANCE] += others
    for name, of_memory in MEMORY_COUNTS.items():
        counts[name] = state.dram.controllers[of_memory].sum()
    return trace
