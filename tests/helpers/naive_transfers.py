"""The engine's transfers again, object by object and slowly: channels, memory and decoder."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np

from sievit.accel.dram import controller
from sievit.accel.dram.ddr4 import DRAM_TIMINGS
from sievit.accel.dram.state import new_dram
from sievit.accel.vitcod.program import CODEC, INDEX, LATENT, STORE, K, Q, V

CHUNKS = (Q, K, V, LATENT)
"""Channels whose transfers take room in a region as a whole."""


class Transfers:
    """What comes from memory and goes there; the half of `naive_engine.Twin` that the lines
    wait for."""

    def open_channels(self):
        self.tokens = {Q: [], K: [], V: []}
        self.decoded = {Q: [], K: []}
        self.transfer_times = {}
        word, cut, kept = self.hw.word_bytes, self.mp.cut, self.mp.kept
        ports = {Q: self.hw.q_banks, K: self.hw.k_banks, V: self.hw.v_banks}
        ports[LATENT] = self.hw.latent_banks
        sizes = {Q: cut.q, K: cut.k, V: cut.v, INDEX: self.hw.index_buffer_bytes}
        sizes[LATENT] = self.mp.latent_space_bytes
        here = {Q: kept.q, K: kept.k, V: kept.v, LATENT: kept.latents}
        self.resident = self.mp.resident_latents
        self.channels = [
            SimpleNamespace(
                number=c,
                queue=list(range(*self.p.channel_first[c : c + 2])),
                loaded=[],  # whole chunks whose room is not yet free
                done=0,
                used=0,
                capacity=sizes.get(c, 10**12) * self.unit,
                port=ports[c] * word * self.unit if c in ports else 10**12,
                landed=0,
                history=[],
                sent=0,
                arrived=0,
                # Latents that come by this channel pass the decoder, or latents on chip do.
                staged=bool(self.mp.decode_macs) and c in (Q, K) and not self.resident,
                decoded=c in (Q, K) and self.resident,
                bursts=list(self.p.bursts[slice(*self.p.channel_burst[c : c + 2])]),
                asked=[],  # lines on their way
                wanted_tokens=0,
                budget=0,
                held_up=False,
            )
            for c in range(7 if self.resident else 6)
        ]
        for number, chunks in here.items():
            for _ in range(chunks):
                self.keep(self.channels[number])
        self.stepped = self.hw.dram_model == "ddr4"
        self.credit = 0
        if self.stepped:
            timing = DRAM_TIMINGS[self.hw.dram_timing]
            lines = len(self.p.bursts)
            self.memory = new_dram(timing, self.hw.dram_map, self.hw.dram_channels, lines)
        self.decoding, self.decode_left = K, 0
        self.decoder_rate = self.mp.decoder_rate

    def keep(self, c):
        """The channel's next chunk is on chip from the beginning."""
        number = c.queue.pop(0)
        tokens = int(self.p.transfers["tokens"][number])
        c.loaded.append(number)
        c.used += int(self.p.transfers["room"][number]) * self.unit
        c.landed = c.sent = c.arrived = c.wanted_tokens = c.landed + tokens
        self.transfer_times[number] = [0, 0]
        if c.number in self.tokens:
            self.tokens[c.number] += [0] * tokens

    @property
    def loading(self):
        """Channels that the memory brings something by."""
        return [c for c in self.channels if c.number != STORE and not c.decoded]

    def ddr4(self, cycle, stage):
        """Whole lines, asked of the memory's controllers (which have a twin of their own)."""
        clock = Fraction(DRAM_TIMINGS[self.hw.dram_timing].clock_hz, self.hw.clock_hz)
        time = int(cycle * clock)
        for number in range(self.hw.dram_channels):
            controller.advance(self.memory, number, time)
        self.free(stage)
        for c in self.loading:
            while c.asked and self.landed(c.asked[0], time, cycle):
                self.land(c, cycle)
        before = self.count["dram_lines"]
        self.ask_lines(cycle, stage)
        self.count["dram_cycles"] += self.count["dram_lines"] > before

    def land(self, c, cycle):
        _, burst, _, number = c.asked.pop(0)
        before = c.landed
        c.landed = int(self.p.transfers["token"][number] + burst["tokens"])
        if c.number < INDEX:
            self.tokens[c.number] += [cycle] * (c.landed - before)
        if burst["closes"] >= 0:
            self.transfer_times[number][1] = cycle

    def ask_lines(self, cycle, stage):
        """As many lines as this cycle's share of the bandwidth pays for."""
        line = 64 * self.unit
        self.credit += self.rate
        for c in self.channels:
            c.budget = c.port + (min(c.budget, line) if c.held_up else 0)
            c.held_up = False
        while (best := self.most_needed(cycle, stage)) is not None:
            if self.credit < line:
                best.held_up = True
                return
            self.credit -= line
            self.ask_line(best, cycle)
        held = any(c.held_up for c in self.channels)
        self.credit = min(self.credit, line) if held else 0

    def most_needed(self, cycle, stage):
        """The channel whose next line is needed first, of those that can take one."""
        best = None
        for c in self.in_turn(cycle):
            need = self.wanted(c, stage)
            if need is not None and (best is None or need < best[0]) and self.fits(c):
                best = need, c
        return best and best[1]

    def landed(self, asked, time, cycle):
        when, _, tag, _ = asked
        end = self.memory.done[tag]
        return 0 < end <= time and cycle >= when + self.hw.dram_latency_cycles

    def wanted(self, c, stage):
        """The need of a channel's next transfer, if it may begin."""
        if c.decoded or not c.queue or self.p.transfers["after"][c.queue[0]] > stage:
            return None
        return int(self.p.transfers["need"][c.queue[0]])

    def fits(self, c):
        """Can the buffer, its ports, the decoder's queue and the memory take the next line?"""
        t, burst, number = self.p.transfers[c.queue[0]], c.bursts[0], c.queue[0]
        units = int(burst["bytes"]) * self.unit
        first = number not in self.transfer_times
        if c.number == INDEX and units > c.capacity - c.used:
            return False
        if c.number in CHUNKS and first and c.used + int(t["room"]) * self.unit > c.capacity:
            return False
        if c.staged and c.wanted_tokens > c.arrived:
            waiting = int(t["token"] + burst["tokens"]) - c.arrived
            if waiting > self.mp.staging_tokens:
                return False
        channel = controller.channel_of(self.memory, burst["line"])
        if not controller.has_room(self.memory, channel, c.number == STORE):
            return False
        c.held_up = c.budget < units
        return not c.held_up

    def ask_line(self, c, cycle):
        number, burst = c.queue[0], c.bursts.pop(0)
        units = int(burst["bytes"]) * self.unit
        if number not in self.transfer_times:
            self.transfer_times[number] = [cycle, None]
            if c.number in CHUNKS:
                c.used += int(self.p.transfers["room"][number]) * self.unit
        if c.number == INDEX:
            c.used += units
        c.budget -= units
        c.wanted_tokens = int(self.p.transfers["token"][number] + burst["tokens"])
        tag = self.count["dram_lines"]
        channel = controller.channel_of(self.memory, burst["line"])
        controller.offer(self.memory, channel, burst["line"], c.number == STORE, tag)
        c.asked.append((cycle, burst, tag, number))
        self.count["dram_lines"] += 1
        self.count["dram_units"] += units
        if burst["closes"] >= 0:
            c.queue.pop(0)
            c.loaded.append(number)
            if c.number == STORE:
                self.count["stores_done"] += 1
                self.transfer_times[number][1] = cycle + 1

    def memory_busy(self, cycle):
        """Lines on their way, or not yet written, when nothing more will be asked for."""
        clock = Fraction(DRAM_TIMINGS[self.hw.dram_timing].clock_hz, self.hw.clock_hz)
        now, busy = self.memory.controllers, any(c.asked for c in self.loading)
        now["wake"] = np.where(now["flush"] == 0, np.minimum(now["wake"], now["now"]), now["wake"])
        now["flush"] = 1
        waiting = sum(int(now[name].sum()) for name in ("reads", "writes", "queued"))
        return busy or waiting > 0 or now["busy_until"].max() > int(cycle * clock)

    def count_memory(self):
        if self.stepped:
            made = self.memory.controllers
            self.count["dram_row_hits"] = made["hits"].sum()
            self.count["dram_activates"] = made["activates"].sum()
            self.count["dram_refreshes"] = made["refreshes"].sum()

    def in_turn(self, cycle):
        count = len(self.channels)
        return [self.channels[(cycle + step) % count] for step in range(count)]

    def free(self, stage):
        """The room of whole chunks that no stage needs any more, nor the decoder."""
        for c in (c for c in self.channels if c.number in CHUNKS):
            while c.loaded and self.p.transfers["release"][c.loaded[0]] <= stage:
                if c.number == LATENT and self.still_decoding(c.loaded[0]):
                    break
                c.used -= int(self.p.transfers["room"][c.loaded.pop(0)]) * self.unit

    def still_decoding(self, block):
        """Is a token to be decoded whose latents this block holds?"""
        wanted = [c.queue[0] for c in self.channels[:V] if c.queue]
        return any(self.block_of(number) == block for number in wanted)

    def dram(self, cycle, stage):
        self.free(stage)
        credit, entered = self.rate, [0] * 7
        while credit:
            best = None
            for c in self.in_turn(cycle):
                if c.decoded or not c.queue:
                    continue
                t = self.p.transfers[c.queue[0]]
                if t["after"] > stage or (best and t["need"] >= best[0]):
                    continue
                room = min(self.room(c, t), c.port - entered[c.number])
                if room > 0:
                    best = (int(t["need"]), c, t, room)
            if best is None:
                break
            _, c, t, room = best
            given = min(credit, room)
            credit -= given
            entered[c.number] += given
            self.move(c, t, given, cycle)
        self.count["dram_units"] += self.rate - credit
        self.count["dram_cycles"] += credit < self.rate

    def room(self, c, t):
        left = int(t["bytes"]) * self.unit - c.done
        if c.number == INDEX:
            return min(left, c.capacity - c.used)
        if c.done == 0 and c.used + int(t["room"]) * self.unit > c.capacity:
            return 0
        if c.staged:
            width = int(t["token_bytes"]) * self.unit
            free = self.mp.staging_tokens - (c.landed - c.arrived)
            return min(left, free * width - c.done % width)
        return left

    def move(self, c, t, given, cycle):
        number = c.queue[0]
        if c.done == 0:
            self.transfer_times[number] = [cycle, None]
            if c.number in CHUNKS:
                c.used += int(t["room"]) * self.unit
        if c.number == INDEX:
            c.used += given
        c.done += given
        before, c.landed = c.landed, int(t["token"]) + c.done // (int(t["token_bytes"]) * self.unit)
        if c.number in self.tokens:
            self.tokens[c.number] += [cycle + 1] * (c.landed - before)
        if c.done == t["bytes"] * self.unit:
            self.transfer_times[number][1] = cycle + 1
            c.queue.pop(0)
            c.loaded.append(number)
            c.done = 0
            self.count["stores_done"] += c.number == STORE

    def arrive(self, cycle):
        for c in self.loading:
            c.history.append(c.landed)
            then = cycle - (0 if self.stepped else self.hw.dram_latency_cycles)
            if then >= 0:
                c.sent = c.history[then]
            if not c.staged:
                c.arrived = c.sent
        if self.mp.decode_macs and self.channels[CODEC].arrived >= self.mp.codec_bytes:
            (self.decode_resident if self.resident else self.decode)(cycle)

    def decode_resident(self, cycle):
        """Token after token of Q and K from the latents on chip, what the earlier stage needs
        first, both in turn where one stage needs them."""
        credit = self.decoder_rate
        while credit:
            if not self.decode_left:
                ready = [c for c in self.channels[:V] if self.can_be_decoded(c)]
                if not ready:
                    break
                needs = {c.number: int(self.p.transfers["need"][c.queue[0]]) for c in ready}
                first = [side for side in needs if needs[side] == min(needs.values())]
                if len(first) == 2:
                    first.remove(self.decoding)
                self.decoding = first[0]
                self.decode_left = self.mp.decode_macs
                self.begin_token(self.channels[self.decoding])
            given = min(credit, self.decode_left)
            credit -= given
            self.decode_left -= given
            if self.decode_left == 0:
                self.end_token(self.channels[self.decoding], cycle)
        for c in self.channels[:V]:
            in_work = self.decode_left and self.decoding == c.number
            c.sent = c.arrived + bool(in_work or self.can_be_decoded(c))
        self.count["decoder_macs"] += self.decoder_rate - credit
        self.count["decoder_cycles"] += credit < self.decoder_rate

    def can_be_decoded(self, c):
        """Is there a token with room for its chunk and all its latents on chip?"""
        if not c.queue:
            return False
        t = self.p.transfers[c.queue[0]]
        full = c.used + int(t["room"]) * self.unit > c.capacity
        if not c.done and (full or t["after"] > self.stage):
            return False
        return self.latent_of(c) < self.channels[LATENT].arrived

    def begin_token(self, c):
        if not c.done:
            c.used += int(self.p.transfers["room"][c.queue[0]]) * self.unit

    def end_token(self, c, cycle):
        c.arrived += 1
        c.done += 1
        self.decoded[c.number].append(cycle + 1)
        if c.done == self.p.transfers["tokens"][c.queue[0]]:
            c.loaded.append(c.queue.pop(0))
            c.done = 0

    def block_of(self, chunk):
        """The transfer of the latents that a chunk of Q or K is decoded from: blocks come once
        each, in order."""
        instance, head, _ = self.places[int(self.p.stages["unit"][self.p.transfers["need"][chunk]])]
        groups, instances = self.mp.op.codec.groups, 1 + max(place[0] for place in self.places)
        block = head * groups // self.mp.op.heads
        number = block * instances + instance if self.mp.index_held else instance * groups + block
        return int(self.p.channel_first[LATENT]) + number

    def latent_of(self, c):
        """The channel's next token among all latents: those of a block's keys, then those of
        its queries, in their original order."""
        op, chunk = self.mp.op, c.queue[0]
        _, head, rows = self.places[int(self.p.stages["unit"][self.p.transfers["need"][chunk]])]
        place = c.done
        if c.number == Q and not self.mp.whole_queries:
            place += rows.start
        if op.masks:
            mask = op.masks[head]
            place = int((mask.query_order if c.number == Q else mask.key_order)[place])
        place += op.keys if c.number == Q else 0
        return int(self.p.transfers["token"][self.block_of(chunk)]) + place

    def decode(self, cycle):
        credit = self.decoder_rate
        waits = lambda c: self.channels[c].sent > self.channels[c].arrived  # noqa: E731
        while credit:
            if not self.decode_left:
                other = Q if self.decoding == K else K
                if waits(other):
                    self.decoding = other
                elif not waits(self.decoding):
                    break
                self.decode_left = self.mp.decode_macs
            given = min(credit, self.decode_left)
            credit -= given
            self.decode_left -= given
            if self.decode_left == 0:
                self.channels[self.decoding].arrived += 1
                self.decoded[self.decoding].append(cycle + 1)
        self.count["decoder_macs"] += self.decoder_rate - credit
        self.count["decoder_cycles"] += credit < self.decoder_rate
