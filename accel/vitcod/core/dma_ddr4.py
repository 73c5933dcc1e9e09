"""Part of the compiled core: the DMA channels on a DDR4 memory, line by line.

As in the flat model the channel whose data is needed by the earliest stage goes first, equals
in turn, and no more bytes are asked for in a cycle than the peak moves, nor for one buffer
than its ports take. A line goes to the queue of its DRAM channel; where that is full another
DMA channel may go. Lines may come back out of order: a token counts once all lines of its
channel up to its last are there, and no line is sooner than the latency of the flat model
after it was asked for. A store is done once the controllers have taken its lines; the run
ends when they are written.
"""

from __future__ import annotations

from ...dram.controller import advance, channel_of, has_room, offer, pending
from ...dram.ddr4 import LINE_BYTES
from ...jit import core, part
from ..program import INDEX, LATENT, STORE
from .dma_flat import free_chunks
from .registers import TAGS


@part
def serve_lines(machine, program, state, transfer_times, landed_at, counts):
    """One cycle: the memory goes on, whole lines land, further lines are asked for."""
    run, dram = state.run, state.dram
    time = _memory_time(machine, run)
    for number in range(dram.controllers.size):
        controller = dram.controllers[number]
        if controller.wake < time:
            advance(dram, number, time)
        else:
            controller.now = time
    free_chunks(machine, run, state.channels, program.transfers)
    for number in range(state.channels.size):
        if number != STORE:
            _land(machine, program, state, number, transfer_times, landed_at, time)
    _ask_lines(machine, program, state, transfer_times, counts)


@core
def _memory_time(machine, run):
    """Cycles of the memory that are over when this cycle begins."""
    return run.cycle * machine.dram_clock_numerator // machine.dram_clock_denominator


@core
def _land(machine, program, state, number, transfer_times, landed_at, time):
    """Lines at the head of a channel that are there."""
    run, channel, done, ask_times = (
        state.run,
        state.channels[number],
        state.dram.done,
        state.ask_times,
    )
    while channel.landing < channel.burst:
        tag = number * TAGS + channel.landing % TAGS
        if done[tag] == 0 or done[tag] > time:
            break
        if run.cycle < ask_times[tag] + machine.dram_latency:
            break
        burst = program.bursts[channel.landing]
        landed = program.transfers[channel.whole].token + burst.tokens
        if number < INDEX:
            for token in range(channel.landed, landed):
                landed_at[number, token] = run.cycle
        channel.landed = landed
        if burst.closes >= 0:
            transfer_times[channel.whole, 1] = run.cycle
            channel.whole += 1
        channel.landing += 1
        run.still = 0


@core
def _ask_lines(machine, program, state, transfer_times, counts):
    """Ask for lines as long as this cycle's share of the peak lasts."""
    run, channels = state.run, state.channels
    line = LINE_BYTES * machine.dram_denominator
    run.credit += machine.dram_numerator
    for number in range(channels.size):
        channel = channels[number]
        channel.port_left = channel.port + (min(channel.port_left, line) if channel.held_up else 0)
        channel.held_up = 0
    moved = False
    while True:
        number = _next_channel(machine, program, state)
        if number < 0 or run.credit < line:
            _carry_over(run, channels, number, line)
            break
        run.credit -= line
        moved = True
        _ask(machine, program, state, number, transfer_times, counts)
    if moved:
        counts.dram_cycles += 1
        run.still = 0


@core
def _carry_over(run, channels, number, line):
    """What is left of the cycle's bytes serves the next one where a line could not be asked
    for with what there was: a line at most, of the peak and of a port."""
    if number >= 0:
        channels[number].held_up = 1
        run.idle_memory = False
        return
    waits = False
    for waiting in range(channels.size):
        waits = waits or channels[waiting].held_up == 1
    run.credit = min(run.credit, line) if waits else 0
    run.idle_memory = not waits


@core
def _next_channel(machine, program, state):
    """The channel to ask for a line, or -1."""
    run, channels, dram = state.run, state.channels, state.dram
    best, best_need = -1, 0
    for step in range(channels.size):
        number = (run.cycle + step) % channels.size
        channel = channels[number]
        if channel.current == channel.last or channel.decoded:
            continue
        transfer = program.transfers[channel.current]
        if transfer.after > run.stage or (best >= 0 and transfer.need >= best_need):
            continue
        burst = program.bursts[channel.burst]
        if (
            _has_room(machine, channel, number, transfer, burst)
            and has_room(dram, channel_of(dram, burst.line), number == STORE)
            and _port_takes(machine, channel, burst)
        ):
            best, best_need = number, transfer.need
    return best


@core
def _port_takes(machine, channel, burst):
    """Can the buffer's ports take the line? Asked last: what they could have moved is kept
    for the next cycle only where nothing else is in the way."""
    if channel.port_left < burst.bytes * machine.dram_denominator:
        channel.held_up = 1
        return False
    return True


@core
def _has_room(machine, channel, number, transfer, burst):
    """May the channel ask for its next line: can its buffer and the decoder's queue take it?"""
    if channel.burst - channel.landing == TAGS and number != STORE:
        return False
    free = channel.capacity - channel.used
    if number == INDEX:
        return burst.bytes * machine.dram_denominator <= free
    if channel.done == 0 and transfer.room * machine.dram_denominator > free:
        return False
    if channel.staging >= 0 and channel.asked > channel.arrived:
        return transfer.token + burst.tokens - channel.arrived <= channel.staging
    return True


@core
def _ask(machine, program, state, number, transfer_times, counts):
    """Ask the memory for the channel's next line."""
    run, channel, dram = state.run, state.channels[number], state.dram
    transfer, burst = program.transfers[channel.current], program.bursts[channel.burst]
    units = burst.bytes * machine.dram_denominator
    if channel.done == 0:
        transfer_times[channel.current, 0] = run.cycle
        if number < INDEX or number == LATENT:
            channel.used += transfer.room * machine.dram_denominator
    if number == INDEX:
        channel.used += units
    tag = number * TAGS + channel.burst % TAGS
    dram.done[tag] = 0
    state.ask_times[tag] = run.cycle
    offer(dram, channel_of(dram, burst.line), burst.line, number == STORE, tag)
    counts.dram_units += units
    counts.dram_lines += 1
    channel.port_left -= units
    channel.done += units
    channel.asked = transfer.token + burst.tokens
    channel.burst += 1
    if burst.closes >= 0:
        channel.current += 1
        channel.done = 0
        if number == STORE:
            counts.stores_done += 1
            transfer_times[burst.closes, 1] = run.cycle + 1


@part
def all_landed(machine, state):
    """Is all that was asked for there, and all written? Nothing more will be asked for."""
    channels, dram, time = state.channels, state.dram, _memory_time(machine, state.run)
    done = True
    for number in range(channels.size):
        if number != STORE:
            done = done and channels[number].landing == channels[number].burst
    for number in range(dram.controllers.size):
        controller = dram.controllers[number]
        if controller.flush == 0:
            controller.flush = 1
            controller.wake = min(controller.wake, controller.now)
        done = done and not pending(dram, number) and controller.busy_until <= time
    return done
