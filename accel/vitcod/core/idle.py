"""Part of the compiled core: stretches in which nothing changes but time are passed at once.

What ends a stretch is known when it begins: data that arrives a latency after it was sent, a
row whose probabilities become ready, the last results leaving the pipeline, a new split, a
command of the memory. Where a slow flat memory moves parts of a token and nothing else
happens, whole rounds of its channels are passed up to the next whole token. The counts are
those of stepping each cycle. Where nothing is on its way and nothing can move, nothing ever
will.
"""

from __future__ import annotations

from ...dram.controller import pending
from ...jit import core, part
from ..program import INDEX, STORE
from .registers import NEVER, TAGS


@core
def next_event(machine, state, ended):
    """First cycle, from the one to come on, in which anything can change; NEVER: none."""
    run, soonest = state.run, NEVER
    if not ended:
        if run.flush > 0:
            soonest = run.cycle + run.flush - 1
        elif run.split > 0:
            soonest = run.cycle + run.split - 1
        elif run.begun and run.wake_at < NEVER:
            soonest = run.wake_at
    for number in range(state.channels.size):
        channel = state.channels[number]
        if channel.flights > 0:
            soonest = min(soonest, state.flights[number, channel.flight].due)
    if machine.ddr4:
        soonest = min(soonest, _memory_event(machine, state))
    return soonest


@part
def _memory_event(machine, state):
    """First cycle in which a controller can do anything for a request, or a line can land."""
    dram, soonest = state.dram, NEVER
    for number in range(dram.controllers.size):
        controller = dram.controllers[number]
        if pending(dram, number):
            soonest = min(soonest, _cycle_of(machine, controller.wake + 1))
        if controller.flush and controller.busy_until >= controller.now:
            soonest = min(soonest, _cycle_of(machine, controller.busy_until))
    for number in range(state.channels.size):
        channel = state.channels[number]
        if number != STORE and channel.landing < channel.burst:
            tag = number * TAGS + channel.landing % TAGS
            if dram.done[tag] > 0:
                there = _cycle_of(machine, dram.done[tag])
                soonest = min(soonest, max(there, state.ask_times[tag] + machine.dram_latency))
    return soonest


@core
def _cycle_of(machine, time):
    """First cycle that begins when ``time`` cycles of the memory are over."""
    clock = machine.dram_clock_numerator
    return (time * machine.dram_clock_denominator + clock - 1) // clock


@core
def rounds_of_drips(state, event):
    """Rounds of all channels that a slow memory can be let run before a token is whole, with
    ``event`` the next of other kinds; what it moved in the last one is channel.done - mark."""
    run, channels = state.run, state.channels
    rounds = (event - run.cycle) // channels.size
    for number in range(channels.size):
        channel = channels[number]
        moved = channel.done - channel.mark
        if moved > 0:
            rounds = min(rounds, (channel.until - channel.done - 1) // moved)
            if number == INDEX:
                rounds = min(rounds, (channel.capacity - channel.used - 1) // moved)
    return max(rounds, 0)


@core
def let_drip(state, rounds, counts):
    """Book ``rounds`` more of the last round's traffic."""
    run, channels = state.run, state.channels
    for number in range(channels.size):
        channel = channels[number]
        moved = rounds * (channel.done - channel.mark)
        channel.done += moved
        if number == INDEX:
            channel.used += moved
        counts.dram_units += moved
    counts.dram_cycles += rounds * run.dripped


@core
def mark(state):
    """From here on a round of drips is measured."""
    state.run.dripped = 0
    for number in range(state.channels.size):
        state.channels[number].mark = state.channels[number].done
