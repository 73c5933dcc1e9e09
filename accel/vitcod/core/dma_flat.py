"""Part of the compiled core: flat DRAM, DMA channels, decoder, and banked buffers.

One DRAM serves six channels (Q, K, V, index, codec weights, output), each in the order of
its transfers; first the channel whose data is needed by the earliest stage, equals in turn.
A chunk of Q, K or V takes its room when its first byte is sent and gives it back when it is
whole and no stage needs it any more; index entries free theirs as they are read. What was
sent is usable after the DRAM's latency, latents of Q and K after decoding.
"""

from __future__ import annotations

from ...jit import core
from ..program import CODEC, INDEX, LATENT, STORE, K, Q
from .decoder import decode_resident


@core
def grant(port, address, cycle):
    """Ask a bank for a word: 2 = a new read, 1 = multicast of this cycle's read, 0 = wait."""
    if port.cycle != cycle:
        port.cycle = cycle
        port.address = address
        return 2
    return 1 if port.address == address else 0


@core
def serve_dram(machine, run, channels, transfers, transfer_times, landed_at, counts):
    """One cycle of the DRAM at its full rate, as far as anything can be moved."""
    free_chunks(machine, run, channels, transfers)
    credit = machine.dram_numerator
    for number in range(channels.size):
        channels[number].port_left = channels[number].port
    while credit > 0:
        number, room = _next_channel(machine, run, channels, transfers)
        if room == 0:
            break
        given = min(credit, room)
        credit -= given
        channel = channels[number]
        _move(machine, run, channel, number, transfers, transfer_times, landed_at, given)
        counts.stores_done += number == STORE and channel.done == 0
    moved = machine.dram_numerator - credit
    if moved > 0:
        counts.dram_units += moved
        counts.dram_cycles += 1
        run.dripping = 1


@core
def free_chunks(machine, run, channels, transfers):
    """Give back the room of whole chunks that only stages before this one needed, and of
    latents that nothing is to be decoded from any more."""
    for number in range(channels.size):
        channel = channels[number]
        if INDEX <= number < LATENT:
            continue
        while channel.freed < channel.current:
            if transfers[channel.freed].release > run.stage:
                break
            if number == LATENT and _still_decoding(channels, transfers, channel.freed):
                break
            channel.used -= transfers[channel.freed].room * machine.dram_denominator
            channel.freed += 1


@core
def _still_decoding(channels, transfers, latents):
    """Is a token of Q or K to be decoded from this chunk of latents?"""
    behind = transfers[latents].token + transfers[latents].tokens
    for number in range(Q, K + 1):
        channel = channels[number]
        if channel.current < channel.last and transfers[channel.current].source < behind:
            return True
    return False


@core
def _next_channel(machine, run, channels, transfers):
    """(channel to serve, units that may enter it now); (-1, 0) where nothing can move."""
    best, best_need, best_room = -1, 0, 0
    for step in range(channels.size):
        number = (run.cycle + step) % channels.size
        channel = channels[number]
        if channel.current == channel.last or channel.decoded:
            continue
        transfer = transfers[channel.current]
        if transfer.after > run.stage or (best >= 0 and transfer.need >= best_need):
            continue
        room = min(_room(machine, channel, number, transfer), channel.port_left)
        if room > 0:
            best, best_need, best_room = number, transfer.need, room
    return best, best_room


@core
def _room(machine, channel, number, transfer):
    """Units of the transfer that its buffer, or the decoder's queue, can take."""
    left = transfer.bytes * machine.dram_denominator - channel.done
    free = channel.capacity - channel.used
    if number == INDEX:
        return min(left, free)
    if channel.done == 0 and transfer.room * machine.dram_denominator > free:
        return 0
    if channel.staging >= 0:
        width = transfer.token_bytes * machine.dram_denominator
        waiting = channel.landed - channel.arrived
        return min(left, (channel.staging - waiting) * width - channel.done % width)
    return left


@core
def _move(machine, run, channel, number, transfers, transfer_times, landed_at, given):
    """Book ``given`` units on the channel's transfer."""
    transfer = transfers[channel.current]
    if channel.done == 0:
        run.still = 0
        transfer_times[channel.current, 0] = run.cycle
        if number < INDEX or number == LATENT:
            channel.used += transfer.room * machine.dram_denominator
    if number == INDEX:
        channel.used += given
    channel.port_left -= given
    channel.done += given
    width = transfer.token_bytes * machine.dram_denominator
    landed = transfer.token + channel.done // width
    channel.until = (channel.done // width + 1) * width
    if landed != channel.landed:
        run.still = 0
    if number < INDEX:
        for token in range(channel.landed, landed):
            landed_at[number, token] = run.cycle + 1
    channel.landed = landed
    if channel.done == transfer.bytes * machine.dram_denominator:
        transfer_times[channel.current, 1] = run.cycle + 1
        channel.current += 1
        channel.done = 0


@core
def arrive(machine, run, channels, program, flights, decoded_at, counts):
    """Data that was sent a latency ago is usable; latents of Q and K pass the decoder."""
    run.arrived = 0
    for number in range(channels.size):
        channel = channels[number]
        if number == STORE or channel.decoded:
            continue
        _fly(machine, run, channel, flights[number])
        if channel.staging < 0:
            channel.arrived = channel.sent
    if machine.decode_cost > 0 and channels[CODEC].arrived >= machine.codec_bytes:
        if channels[Q].decoded:
            decode_resident(machine, run, channels, program, decoded_at, counts)
        else:
            _decode(machine, run, channels, decoded_at, counts)
    if run.arrived:
        run.still = 0


@core
def _fly(machine, run, channel, ring):
    """What has landed in the memory's count sets out, and what set out a latency ago is there."""
    if channel.landed != channel.flying:
        channel.flying = channel.landed
        place = channel.flight + channel.flights
        flight = ring[place if place < ring.size else place - ring.size]
        flight.due, flight.landed = run.cycle + machine.landing_latency, channel.landed
        channel.flights += 1
    while channel.flights > 0 and ring[channel.flight].due <= run.cycle:
        channel.sent = ring[channel.flight].landed
        channel.flight = channel.flight + 1 if channel.flight + 1 < ring.size else 0
        channel.flights -= 1
        run.arrived = 1


@core
def _decode(machine, run, channels, decoded_at, counts):
    """One cycle of the decoder: token after token, Q and K in turn where both wait."""
    credit = machine.decoder_rate
    while credit > 0:
        if run.decode_left == 0:
            other = Q + K - run.decoding
            if channels[other].sent > channels[other].arrived:
                run.decoding = other
            elif channels[run.decoding].sent == channels[run.decoding].arrived:
                break
            run.decode_left = machine.decode_cost
        given = min(credit, run.decode_left)
        credit -= given
        run.decode_left -= given
        if run.decode_left == 0:
            decoded_at[run.decoding, channels[run.decoding].arrived] = run.cycle + 1
            channels[run.decoding].arrived += 1
    if credit < machine.decoder_rate:
        counts.decoder_macs += machine.decoder_rate - credit
        counts.decoder_cycles += 1
        run.arrived = 1
