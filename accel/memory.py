"""Part of the compiled core: DRAM, DMA channels, decoder, and banked buffers.

One DRAM serves six channels (Q, K, V, index, codec weights, output), each in the order of
its transfers; first the channel whose data is needed by the earliest stage, equals in turn.
A chunk of Q, K or V takes its room when its first byte is sent; index entries free theirs as
they are read. What was sent is usable after the DRAM's latency, latents after decoding.
"""

from __future__ import annotations

from .machine import (
    ARRIVED,
    CURRENT,
    DECODER_CHANNEL,
    DECODER_LEFT,
    DECODER_MACS,
    DONE,
    DRAM_UNITS,
    LANDED,
    NOW,
    RELEASED,
    STORES_DONE,
    THEN,
    USED,
    core,
)
from .program import (
    AFTER,
    BYTES,
    CODEC,
    INDEX,
    NEED,
    RELEASE,
    ROOM,
    STORE,
    TOKEN,
    TOKEN_BYTES,
    K,
    Q,
    V,
)


@core
def _room(machine, program, state, channel, transfer):
    """How much may enter the channel's buffer now, in 1/denominator bytes."""
    unit = machine.dram_denominator
    done = state.channels[channel, DONE]
    left = program.transfers[transfer, BYTES] * unit - done
    free = machine.buffers[channel, 0] - state.channels[channel, USED]
    if channel == INDEX:
        return min(left, free)
    if done == 0 and program.transfers[transfer, ROOM] * unit > free:
        return 0
    if machine.decode_cost and channel < V:
        width = program.transfers[transfer, TOKEN_BYTES] * unit
        behind = state.channels[channel, LANDED] - state.channels[channel, ARRIVED]
        return min(left, (machine.staging_tokens - behind) * width - done % width)
    return left


@core
def _take(machine, program, state, trace, channel, given, cycle):
    """Book ``given`` on the transfer in work of a channel."""
    unit = machine.dram_denominator
    transfer = state.channels[channel, CURRENT]
    if state.channels[channel, DONE] == 0:
        trace.transfer_times[transfer, 0] = cycle
        if channel < INDEX:
            state.channels[channel, USED] += program.transfers[transfer, ROOM] * unit
    if channel == INDEX:
        state.channels[channel, USED] += given
    done = state.channels[channel, DONE] + given
    width = program.transfers[transfer, TOKEN_BYTES] * unit
    state.channels[channel, LANDED] = program.transfers[transfer, TOKEN] + done // width
    trace.counts[DRAM_UNITS] += given
    if done == program.transfers[transfer, BYTES] * unit:
        trace.transfer_times[transfer, 1] = cycle + 1
        state.channels[channel, CURRENT] += 1
        done = 0
        if channel == STORE:
            trace.counts[STORES_DONE] += 1
    state.channels[channel, DONE] = done


@core
def serve_dram(machine, program, state, trace, stage, cycle):
    """One cycle of the DRAM at its full rate, as far as anything can be moved."""
    credit = machine.dram_numerator
    state.taken[:] = 0
    while credit > 0:
        best, best_need, best_room = -1, 0, 0
        for step in range(6):
            channel = (cycle + step) % 6
            transfer = state.channels[channel, CURRENT]
            if transfer == program.channel_first[channel + 1]:
                continue
            need = program.transfers[transfer, NEED]
            if program.transfers[transfer, AFTER] > stage or (best >= 0 and need >= best_need):
                continue
            room = _room(machine, program, state, channel, transfer)
            room = min(room, machine.buffers[channel, 1] - state.taken[channel])
            if room > 0:
                best, best_need, best_room = channel, need, room
        if best < 0:
            return
        given = min(credit, best_room)
        credit -= given
        state.taken[best] += given
        _take(machine, program, state, trace, best, given, cycle)


@core
def release(machine, program, state, stage):
    """Free the room of chunks that stages before ``stage`` needed, in their order."""
    for channel in range(STORE):
        while state.channels[channel, RELEASED] < state.channels[channel, CURRENT]:
            transfer = state.channels[channel, RELEASED]
            if program.transfers[transfer, RELEASE] > stage:
                break
            freed = program.transfers[transfer, ROOM] * machine.dram_denominator
            state.channels[channel, USED] -= freed
            state.channels[channel, RELEASED] += 1


@core
def sent(state, channel):
    """Tokens (bytes) of a channel that left the DRAM at least its latency ago."""
    return state.history[channel, state.units[THEN]]


@core
def arrive(machine, state, trace):
    """Data that was sent a latency ago is usable; latents of Q and K pass the decoder."""
    now = state.units[THEN]
    state.units[NOW] = now
    state.units[THEN] = now + 1 if now < machine.dram_latency else 0
    for channel in range(STORE):
        state.history[channel, now] = state.channels[channel, LANDED]
        if machine.decode_cost == 0 or channel >= V:
            state.channels[channel, ARRIVED] = sent(state, channel)
    if machine.decode_cost and state.channels[CODEC, ARRIVED] == machine.codec_bytes:
        _decode(machine, state, trace)


@core
def _decode(machine, state, trace):
    """One cycle of the decoder: token after token, Q and K in turn where both wait."""
    credit = machine.decoder_macs
    while credit > 0:
        if state.units[DECODER_LEFT] == 0:
            last = state.units[DECODER_CHANNEL]
            other = K if last == Q else Q
            if sent(state, other) > state.channels[other, ARRIVED]:
                state.units[DECODER_CHANNEL] = other
            elif sent(state, last) == state.channels[last, ARRIVED]:
                return
            state.units[DECODER_LEFT] = machine.decode_cost
        given = min(credit, state.units[DECODER_LEFT])
        credit -= given
        state.units[DECODER_LEFT] -= given
        trace.counts[DECODER_MACS] += given
        if state.units[DECODER_LEFT] == 0:
            state.channels[state.units[DECODER_CHANNEL], ARRIVED] += 1


@core
def grant(state, kind, banks, word, cycle):
    """Ask a bank for a word: 2 = a new read, 1 = multicast of this cycle's read, 0 = wait."""
    bank = word % banks
    if state.banks[kind, bank, 0] != cycle:
        state.banks[kind, bank, 0] = cycle
        state.banks[kind, bank, 1] = word
        return 2
    return 1 if state.banks[kind, bank, 1] == word else 0
