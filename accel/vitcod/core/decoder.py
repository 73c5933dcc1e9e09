"""Part of the compiled core: the decoder where latents of Q and K stay on chip.

It serves the channels of Q and K in place of the DRAM: chunk after chunk of each, a token at a
time, in the order in which the head has them; the chunk that the earlier stage needs goes
first, equals in turn. A chunk takes its room when its first token is begun. A token is begun
when all latents it is made of are there: their reads are one after the other in the region's
banks, and the decoder's rate (`Mapping.decoder_rate`) is no more than those ports give.
"""

from __future__ import annotations

from ...jit import core
from ..program import LATENT, K, Q


@core
def decode_resident(machine, run, channels, program, decoded_at, counts):
    """One cycle of the decoder."""
    credit = machine.decoder_rate
    while credit > 0:
        if run.decode_left == 0:
            number = _next_side(machine, run, channels, program)
            if number < 0:
                break
            run.decoding = number
            run.decode_left = machine.decode_cost
            _begin(machine, channels[number], program)
        given = min(credit, run.decode_left)
        credit -= given
        run.decode_left -= given
        if run.decode_left == 0:
            _end(run, channels[run.decoding], program, decoded_at)
    for number in range(Q, K + 1):
        in_work = run.decode_left > 0 and run.decoding == number
        waits = in_work or _need(machine, run, channels, program, number) >= 0
        channels[number].sent = channels[number].arrived + waits  # a line waits for the decoder
    if credit < machine.decoder_rate:
        counts.decoder_macs += machine.decoder_rate - credit
        counts.decoder_cycles += 1
        run.arrived = 1


@core
def _next_side(machine, run, channels, program):
    """Q or K, whichever has a token to be begun; -1: neither."""
    other = Q + K - run.decoding
    mine, theirs = (
        _need(machine, run, channels, program, run.decoding),
        _need(machine, run, channels, program, other),
    )
    if theirs >= 0 and (mine < 0 or theirs <= mine):
        return other
    return run.decoding if mine >= 0 else -1


@core
def _need(machine, run, channels, program, number):
    """The stage that needs the channel's next token; -1: it cannot be begun."""
    channel = channels[number]
    if channel.current == channel.last:
        return -1
    transfer = program.transfers[channel.current]
    if channel.done == 0:
        free = channel.capacity - channel.used
        if transfer.after > run.stage or transfer.room * machine.dram_denominator > free:
            return -1
    latent = transfer.source + program.orders[transfer.order + channel.done]
    if latent >= channels[LATENT].arrived:
        return -1
    return transfer.need


@core
def _begin(machine, channel, program):
    """The channel's next token is begun: a chunk's first one takes the chunk's room."""
    if channel.done == 0:
        channel.used += program.transfers[channel.current].room * machine.dram_denominator


@core
def _end(run, channel, program, decoded_at):
    """The token in work is decoded."""
    decoded_at[run.decoding, channel.arrived] = run.cycle + 1
    channel.arrived += 1
    channel.done += 1
    if channel.done == program.transfers[channel.current].tokens:
        channel.done = 0
        channel.current += 1
