"""The cycle engine again, object by object and slowly: what the compiled one must equal."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np

from sievit.accel.dram import controller
from sievit.accel.dram.ddr4 import DRAM_TIMINGS
from sievit.accel.dram.state import new_dram
from sievit.accel.vitcod.program import CODEC, INDEX, SDDMM, STORE, K, Q, V
from sievit.accel.vitcod.registers import STALLS


class Twin:
    """The rules of the engine, as plain as they are written in its docstrings."""

    def __init__(self, program, hardware, mapping):
        self.p, self.hw, self.mp = program, hardware, mapping
        self.places = list(mapping.units(len(program.unit_row)))
        rate = hardware.dram_bytes_per_cycle
        self.unit, self.rate = rate.denominator, rate.numerator
        self.count = Counter()
        self.phases = [Counter() for _ in range(len(program.stages) + 1)]
        self.stalls = [Counter() for _ in program.stages]
        self.engines = [[0, 0] for _ in program.stages]
        self.tokens = {Q: [], K: [], V: []}
        self.decoded = {Q: [], K: []}
        self.stage_times = [[0, 0] for _ in program.stages]
        self.transfer_times = {}
        word = hardware.word_bytes
        ports = {Q: hardware.q_banks * word, K: hardware.k_banks * word, V: hardware.v_banks * word}
        sizes = {Q: hardware.q_buffer_bytes, K: hardware.k_buffer_bytes, V: hardware.v_buffer_bytes}
        sizes[INDEX] = hardware.index_buffer_bytes
        self.channels = [
            SimpleNamespace(
                number=c,
                queue=list(range(*program.channel_first[c : c + 2])),
                loaded=[],  # whole chunks whose room is not yet free
                done=0,
                used=0,
                capacity=sizes.get(c, 10**12) * self.unit,
                port=ports.get(c, 10**12) * self.unit,
                landed=0,
                history=[],
                sent=0,
                arrived=0,
                decoded=bool(mapping.decode_macs) and c in (Q, K),
                bursts=list(program.bursts[slice(*program.channel_burst[c : c + 2])]),
                asked=[],  # lines on their way
                wanted_tokens=0,
                budget=0,
                held_up=False,
            )
            for c in range(6)
        ]
        self.stepped = hardware.dram_model == "ddr4"
        self.credit = 0
        if self.stepped:
            timing, channels = DRAM_TIMINGS[hardware.dram_timing], hardware.dram_channels
            lines = len(program.bursts)
            self.memory = new_dram(timing, hardware.dram_map, channels, lines)
        self.decoding, self.decode_left = K, 0
        self.decoder_rate = mapping.decoder_rate
        self.softmax_free = [0, 0, 0]
        self.ready = {}  # (unit, row) -> first cycle in which the probabilities are there
        self.left = {}  # (unit, row) -> scores still missing

    def ddr4(self, cycle, stage):
        """Whole lines, asked of the memory's controllers (which have a twin of their own)."""
        clock = Fraction(DRAM_TIMINGS[self.hw.dram_timing].clock_hz, self.hw.clock_hz)
        time = int(cycle * clock)
        for number in range(self.hw.dram_channels):
            controller.advance(self.memory, number, time)
        self.free(stage)
        for c in self.channels[:STORE]:
            while c.asked and self.landed(c.asked[0], time, cycle):
                _, burst, _, number = c.asked.pop(0)
                before, c.landed = (
                    c.landed,
                    int(self.p.transfers["token"][number] + burst["tokens"]),
                )
                if c.number < INDEX:
                    self.tokens[c.number] += [cycle] * (c.landed - before)
                if burst["closes"] >= 0:
                    self.transfer_times[number][1] = cycle
        line, before = 64 * self.unit, self.count["dram_lines"]
        self.credit += self.rate
        for c in self.channels:
            c.budget = c.port + (min(c.budget, line) if c.held_up else 0)
            c.held_up = False
        while True:
            best = None
            for c in self.in_turn(cycle):
                need = self.wanted(c, stage)
                if need is not None and (best is None or need < best[0]) and self.fits(c):
                    best = need, c
            if best is None:
                held = any(c.held_up for c in self.channels)
                self.credit = min(self.credit, line) if held else 0
                break
            if self.credit < line:
                best[1].held_up = True
                break
            self.credit -= line
            self.ask_line(best[1], cycle)
        self.count["dram_cycles"] += self.count["dram_lines"] > before

    def landed(self, asked, time, cycle):
        when, _, tag, _ = asked
        end = self.memory.done[tag]
        return 0 < end <= time and cycle >= when + self.hw.dram_latency_cycles

    def wanted(self, c, stage):
        """The need of a channel's next transfer, if it may begin."""
        if not c.queue or self.p.transfers["after"][c.queue[0]] > stage:
            return None
        return int(self.p.transfers["need"][c.queue[0]])

    def fits(self, c):
        """Can the buffer, its ports, the decoder's queue and the memory take the next line?"""
        t, burst, number = self.p.transfers[c.queue[0]], c.bursts[0], c.queue[0]
        units = int(burst["bytes"]) * self.unit
        if c.budget < units:
            c.held_up = True
            return False
        first = number not in self.transfer_times
        if c.number == INDEX and units > c.capacity - c.used:
            return False
        if c.number < INDEX and first and c.used + int(t["room"]) * self.unit > c.capacity:
            return False
        if c.decoded and c.wanted_tokens > c.arrived:
            waiting = int(t["token"] + burst["tokens"]) - c.arrived
            if waiting > self.mp.staging_tokens:
                return False
        channel = controller.channel_of(self.memory, burst["line"])
        return controller.has_room(self.memory, channel, c.number == STORE)

    def ask_line(self, c, cycle):
        number, burst = c.queue[0], c.bursts.pop(0)
        units = int(burst["bytes"]) * self.unit
        if number not in self.transfer_times:
            self.transfer_times[number] = [cycle, None]
            if c.number < INDEX:
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
        now, busy = self.memory.controllers, any(c.asked for c in self.channels[:STORE])
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
        return [self.channels[(cycle + step) % 6] for step in range(6)]

    def free(self, stage):
        for c in self.channels[:3]:
            while c.loaded and self.p.transfers["release"][c.loaded[0]] <= stage:
                c.used -= int(self.p.transfers["room"][c.loaded.pop(0)]) * self.unit

    def dram(self, cycle, stage):
        self.free(stage)
        credit, entered = self.rate, [0] * 6
        while credit:
            best = None
            for c in self.in_turn(cycle):
                if not c.queue:
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
        if c.decoded:
            width = int(t["token_bytes"]) * self.unit
            free = self.mp.staging_tokens - (c.landed - c.arrived)
            return min(left, free * width - c.done % width)
        return left

    def move(self, c, t, given, cycle):
        number = c.queue[0]
        if c.done == 0:
            self.transfer_times[number] = [cycle, None]
            if c.number < INDEX:
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
        for c in self.channels[:5]:
            c.history.append(c.landed)
            then = cycle - (0 if self.stepped else self.hw.dram_latency_cycles)
            c.sent = c.history[then] if then >= 0 else 0
            if not c.decoded:
                c.arrived = c.sent
        if self.mp.decode_macs and self.channels[CODEC].arrived >= self.mp.codec_bytes:
            self.decode(cycle)

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

    def begin(self, stage):
        plan, p = stage["plan"], self.p
        self.turn = 0
        self.lines = []
        for number in range(self.hw.lines):
            pieces = []
            for piece in p.pieces[slice(*p.line_piece[plan, number : number + 2])]:
                first, length = int(piece["first"]), int(piece["length"])
                dense = piece["round"] < 0
                operands = range(first, first + length)
                if not dense:
                    operands = [int(p.entries["operand"][e]) for e in operands]
                pieces.append(
                    SimpleNamespace(
                        vector=int(piece["vector"]),
                        operands=list(operands),
                        dense=dense,
                        round=int(piece["round"]),
                    )
                )
            entries = p.entries["arrival"][slice(*p.line_entry[plan, number : number + 2])]
            self.lines.append(
                SimpleNamespace(
                    pieces=pieces,
                    stream=[int(a) for a in entries],
                    registers=0,  # entries read and not used up
                    word=0,
                    asked=False,  # for a query that was not there
                    holds=False,
                    preload=0,
                    drain=[],  # words of the last row
                )
            )
        unit = int(stage["unit"])
        if stage["opens_unit"]:
            rows = p.row_scores[slice(*p.unit_row[unit : unit + 2])]
            self.left |= {(unit, row): int(scores) for row, scores in enumerate(rows)}

    def on_chip(self, stage, arrival):
        """Is this entry of the stage's index stream in IdxBuf?"""
        end = int(stage["index_bytes"]) + (arrival + 1) * self.mp.entry_bytes
        return self.channels[INDEX].arrived >= end

    def ask(self, banks, banks_read, word):
        """0: the bank is taken by another word, 1: the word is read anyway, 2: a new read."""
        got = banks_read.setdefault(word % banks, word)
        if got is not word and got != word:
            return 0
        first = (word, "read") not in banks_read
        banks_read[word, "read"] = True
        return 2 if first else 1

    def step_lines(self, stage, cycle):
        self.reads, self.cycle = 0, cycle
        self.operand_reads, self.key_reads, self.drained = {}, {}, set()
        did = Counter()
        start = cycle % self.hw.lines
        for line in self.lines[start:] + self.lines[:start]:
            step = self.scores if stage["kind"] == SDDMM else self.values
            did[step(stage, line)] += 1
        self.channels[INDEX].used -= self.reads * self.mp.entry_bytes * self.unit
        if not any(line.pieces and line.pieces[0].round == self.turn for line in self.lines):
            self.turn += 1
        return did

    def read_index(self, stage, line):
        """Returns what the line waits for if its operand was not known when the cycle began."""
        known = line.pieces[0].dense or line.registers > 0
        stall = None
        if not known:
            stall = "index_port" if self.on_chip(stage, line.stream[0]) else "index_refill"
        free = line.stream and line.registers < 2 and self.reads < self.hw.index_entries_per_cycle
        if free and self.on_chip(stage, line.stream[0]):
            line.stream.pop(0)
            line.registers += 1
            self.reads += 1
            self.count["index_reads"] += 1
        return stall

    def place(self, stage, side, number):
        """Vectors before this one in its buffer: whole chunks head after head, then its own
        chunk's heads before its head."""
        channel = (K if side == "vector" else Q) if stage["kind"] == SDDMM else V
        token = int(stage[f"{side}_token"]) + number
        first, last = self.p.channel_first[channel : channel + 2]
        heads = self.mp.group if channel != V else 1
        _, head, _ = self.places[int(stage["unit"])]
        for transfer in self.p.transfers[first:last]:
            begin, count = int(transfer["token"]), int(transfer["bytes"] // transfer["token_bytes"])
            if begin <= token < begin + count:
                return begin * heads + head % heads * count + token - begin
        raise AssertionError(f"token {token} is in no chunk")

    def missing(self, c):
        return "decoder" if c.sent > c.arrived else "dram"

    def scores(self, stage, line):
        if not line.pieces:
            return "imbalance"
        preloading = line.pieces[1:2] if line.holds else line.pieces[:1]
        did = self.score(stage, line)
        words, keys = int(stage["words"]), self.channels[K]
        if preloading and line.preload < words:
            token = int(stage["vector_token"]) + preloading[0].vector
            word = self.place(stage, "vector", preloading[0].vector) * words + line.preload
            if token < keys.arrived:
                got = self.ask(self.hw.k_banks, self.key_reads, word)
                line.preload += got > 0
                self.count["key_words"] += got > 0
                self.count["key_reads"] += got == 2
        if line.preload == words and not line.holds:
            line.holds, line.preload = True, 0
        return did

    def score(self, stage, line):
        piece, words = line.pieces[0], int(stage["words"])
        stall = self.read_index(stage, line)
        if piece.round > self.turn:
            return "barrier"
        if not line.holds:
            keys = self.channels[K]
            there = int(stage["vector_token"]) + piece.vector < keys.arrived
            return "key_register" if there else self.missing(keys)
        if stall:
            return stall
        row = piece.operands[0]
        token, queries = int(stage["operand_token"]) + row, self.channels[Q]
        if token >= queries.arrived:
            line.asked = True
            return self.missing(queries)
        word = self.place(stage, "operand", row) * words + line.word
        got = self.ask(self.hw.q_banks, self.operand_reads, word)
        if not got:
            return "bank"
        self.count["query_words"] += 1
        self.count["query_reads"] += got == 2
        if line.word == 0 and not piece.dense:
            self.count["waited" if line.asked else "forwarded"] += 1
            line.asked = False
        if self.advance(line, words):
            self.score_done(int(stage["unit"]), row)
            if line.pieces[:1] != [piece]:
                line.holds = False
        return "busy"

    def advance(self, line, words):
        """One word more; True where that was the operand's last."""
        piece = line.pieces[0]
        line.word = (line.word + 1) % words
        if line.word:
            return False
        piece.operands.pop(0)
        line.registers -= not piece.dense
        if not piece.operands:
            line.pieces.pop(0)
            self.engines[self.at][0 if piece.dense else 1] = self.cycle + 1
        return True

    def score_done(self, unit, row):
        self.left[unit, row] -= 1
        if self.left[unit, row]:
            return
        scores = int(self.p.row_scores[self.p.unit_row[unit] + row])
        took = -(-scores // self.hw.softmax_lanes)
        time = self.cycle + 1 + self.hw.pipeline_cycles
        for step in range(3):
            time = self.softmax_free[step] = max(time, self.softmax_free[step]) + took
        self.ready[unit, row] = time + self.hw.softmax_latency_cycles
        self.count["softmax_cycles"] += took

    def values(self, stage, line):
        draining = bool(line.drain)
        did = self.value(stage, line) if line.pieces else "drain" if draining else "imbalance"
        if draining and line.drain[0] % self.hw.output_banks not in self.drained:
            self.drained.add(line.drain.pop(0) % self.hw.output_banks)
            self.count["drained_words"] += 1
        if isinstance(did, int):  # a row is done: it drains from the next cycle on
            words = int(stage["words"])
            line.drain = list(range(did * words, (did + 1) * words))
            return "busy"
        return did

    def value(self, stage, line):
        piece, words = line.pieces[0], int(stage["words"])
        stall = self.read_index(stage, line)
        if piece.round > self.turn:
            return "barrier"
        if self.cycle < self.ready[int(stage["unit"]), piece.vector]:
            return "softmax"
        if stall:
            return stall
        if line.drain and len(piece.operands) == 1 and line.word == words - 1:
            return "drain"
        token = int(stage["operand_token"]) + piece.operands[0]
        if token >= self.channels[V].arrived:
            return "dram"
        got = self.ask(self.hw.v_banks, self.operand_reads, token * words + line.word)
        if not got:
            return "bank"
        self.count["value_words"] += 1
        self.count["value_reads"] += got == 2
        self.advance(line, words)
        return "busy" if line.pieces[:1] == [piece] else piece.vector

    def phase(self, stage, did):
        product = "sddmm" if stage["kind"] == SDDMM else "spmm"
        if did["busy"]:
            return product
        causes = [(did[name], -number) for number, name in enumerate(STALLS) if did[name]]
        worst = STALLS[-max([c for c in causes if STALLS[-c[1]] != "imbalance"] or causes)[1]]
        waits = {"dram": "load", "index_refill": "load", "decoder": "decode", "softmax": "softmax"}
        return waits.get(worst, product)

    def run(self, limit=10**5):
        at, begun, flush = 0, False, 0
        split = int(self.p.stages["reconfigure"][0])
        for cycle in range(limit):
            busy = any(c.queue or (c.decoded and c.landed > c.arrived) for c in self.channels)
            ended = at == len(self.p.stages) and not busy
            if ended and not (self.stepped and self.memory_busy(cycle)):
                self.count["cycles"] = cycle
                self.count_memory()
                return self
            (self.ddr4 if self.stepped else self.dram)(cycle, at)
            self.arrive(cycle)
            if at == len(self.p.stages):
                self.count["tail_cycles"] += 1
                self.phases[at]["store"] += 1
                continue
            stage, stalls, ended, self.at = self.p.stages[at], self.stalls[at], False, at
            product = "sddmm" if stage["kind"] == SDDMM else "spmm"
            if flush:
                flush -= 1
                ended = flush == 0
                stalls["pipeline"] += self.hw.lines
                self.phases[at][product] += 1
            elif split:
                split -= 1
                stalls["reconfigure"] += self.hw.lines
                self.phases[at]["reconfigure"] += 1
            elif not begun and self.count["stores_done"] < stage["stores"]:
                stalls["store"] += self.hw.lines
                self.phases[at]["store"] += 1
            elif not begun and self.channels[INDEX].arrived < stage["index_bytes"]:
                stalls["index_refill"] += self.hw.lines
                self.phases[at]["load"] += 1
            else:
                if not begun:
                    self.begin(stage)
                    begun = True
                did = self.step_lines(stage, cycle)
                stalls.update(did)
                self.phases[at][self.phase(stage, did)] += 1
                if not any(line.pieces or line.drain for line in self.lines):
                    flush = self.hw.pipeline_cycles
                    ended = flush == 0
            if ended:
                self.stage_times[at][1] = cycle + 1
                self.channels[INDEX].used -= int(stage["index_frees"]) * self.unit
                at, begun = at + 1, False
                if at < len(self.p.stages):
                    self.stage_times[at][0] = cycle + 1
                    split = int(self.p.stages["reconfigure"][at])
        raise AssertionError("the twin does not end")
