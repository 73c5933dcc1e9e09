"""The cycle engine again, object by object and slowly: what the compiled one must equal."""

from __future__ import annotations

from collections import Counter, defaultdict
from types import SimpleNamespace

from naive_index import stage_index, tiles_of
from naive_transfers import Transfers

from sievit.accel.vitcod.core.registers import STALLS
from sievit.accel.vitcod.pattern import SDDMM
from sievit.accel.vitcod.program import INDEX, K, Q, V


class Twin(Transfers):
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
        self.stage_times = [[0, 0] for _ in program.stages]
        self.open_channels()
        self.softmax_free = [0, 0, 0]
        self.ready = {}  # (unit, row) -> first cycle in which the probabilities are there
        self.left = {}  # (unit, row) -> scores still missing
        self.one_stream = mapping.schedule.index_streams == 1
        self.begun_tiles = Counter()  # (unit, kind) -> key tiles
        self.lists = defaultdict(list)  # (unit, key tile, row) -> keys of its scores

    def begin(self, stage):
        p, unit, kind = self.p, int(stage["unit"]), int(stage["kind"])
        self.turn = 0
        self.tile = self.begun_tiles[unit, kind]
        self.begun_tiles[unit, kind] += 1
        self.lines = [
            SimpleNamespace(
                pieces=self.pieces_of(stage, number),
                stream=[],  # (bytes of the stream that must be there, bytes that reading frees)
                registers=0,  # entries read and not used up
                word=0,
                asked=False,  # for a query that was not there
                holds=False,
                preload=0,
                drain=[],  # words of the last row
            )
            for number in range(self.hw.lines)
        ]
        if self.one_stream and kind != SDDMM:
            self.read_lists(unit)
        self.open_stream(stage)
        if stage["opens_unit"]:
            rows = p.row_scores[slice(*p.unit_row[unit : unit + 2])]
            self.left |= {(unit, row): int(scores) for row, scores in enumerate(rows)}

    def pieces_of(self, stage, number):
        """Of one line, in its order."""
        made, p, plan = [], self.p, stage["plan"]
        for piece in p.pieces[slice(*p.line_piece[plan, number : number + 2])]:
            first, length = int(piece["first"]), int(piece["length"])
            dense = piece["round"] < 0
            operands = list(range(first, first + length))
            if not dense and not (self.one_stream and stage["kind"] != SDDMM):
                operands = [int(p.entries["operand"][entry]) for entry in operands]
            made.append(
                SimpleNamespace(
                    vector=int(piece["vector"]),
                    operands=operands,
                    dense=dense,
                    round=int(piece["round"]),
                    place=int(piece["place"]),
                )
            )
        return made

    def read_lists(self, unit):
        """The pieces of a row share out its list, in the order of their places: as SDDMM wrote
        it, or sorted."""
        rows = defaultdict(list)
        for piece in (piece for line in self.lines for piece in line.pieces if not piece.dense):
            rows[piece.vector].append(piece)
        for row, pieces in rows.items():
            keys = list(self.lists[unit, self.tile, row])
            if self.hw.sorted_lists:
                keys.sort()
            assert len(keys) == sum(len(piece.operands) for piece in pieces)
            for piece in sorted(pieces, key=lambda piece: piece.place):
                count = len(piece.operands)
                piece.operands, keys = keys[:count], keys[count:]

    def open_stream(self, stage):
        """When each entry of the stage is whole in IdxBuf, and which bytes reading it frees."""
        _, head, rows = self.places[int(stage["unit"])]
        pieces = [
            (number, piece.vector, list(piece.operands))
            for number, line in enumerate(self.lines)
            for piece in line.pieces
            if not piece.dense
        ]
        keys = tiles_of(self.mp, head, rows)[self.tile]
        _, stream = stage_index(self.mp, int(stage["kind"]), head, rows, keys, pieces)
        bits = whole = 0
        entries = defaultdict(dict)
        for line, number, size in stream:
            before, bits = whole, bits + size
            whole = -(-bits // 8)
            entries[line][number] = int(stage["index_bytes"]) + whole, whole - before
        for line, mine in entries.items():
            self.lines[line].stream = [mine[number] for number in range(len(mine))]

    def on_chip(self, entry):
        """Is this entry of the stage's index stream in IdxBuf?"""
        return self.channels[INDEX].arrived >= entry[0]

    def ask(self, banks, banks_read, word):
        """0: the bank is taken by another word, 1: the word is read anyway, 2: a new read."""
        got = banks_read.setdefault(word % banks, word)
        if got is not word and got != word:
            return 0
        first = (word, "read") not in banks_read
        banks_read[word, "read"] = True
        return 2 if first else 1

    def step_lines(self, stage, cycle):
        self.reads, self.freed, self.cycle = 0, 0, cycle
        self.operand_reads, self.key_reads, self.drained = {}, {}, set()
        did = Counter()
        start = cycle % self.hw.lines
        for line in self.lines[start:] + self.lines[:start]:
            step = self.scores if stage["kind"] == SDDMM else self.values
            did[step(stage, line)] += 1
        self.channels[INDEX].used -= self.freed * self.unit
        if not any(line.pieces and line.pieces[0].round == self.turn for line in self.lines):
            self.turn += 1
        return did

    def read_index(self, stage, line):
        """Returns what the line waits for if its operand was not known when the cycle began."""
        if self.one_stream and stage["kind"] != SDDMM:
            return None
        known = line.pieces[0].dense or line.registers > 0
        stall = None
        if not known:
            stall = "index_port" if self.on_chip(line.stream[0]) else "index_refill"
        free = line.stream and line.registers < 2 and self.reads < self.hw.index_entries_per_cycle
        if free and self.on_chip(line.stream[0]):
            size = line.stream.pop(0)[1]
            self.freed += 0 if stage["index_stays"] else size
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
            begin, count = int(transfer["token"]), int(transfer["tokens"])
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
            if not piece.dense:
                self.lists[int(stage["unit"]), self.tile, row].append(piece.vector)
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
            self.engines[self.stage][0 if piece.dense else 1] = self.cycle + 1
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
        self.stage, self.begun, self.flush = 0, False, 0
        self.split = int(self.p.stages["reconfigure"][0])
        for cycle in range(limit):
            if self.is_over(cycle):
                self.count["cycles"] = cycle
                self.count_memory()
                return self
            (self.ddr4 if self.stepped else self.dram)(cycle, self.stage)
            self.arrive(cycle)
            if self.stage == len(self.p.stages):
                self.count["tail_cycles"] += 1
                self.phases[self.stage]["store"] += 1
            elif self.step_stage(cycle):
                self.end_stage(cycle)
        raise AssertionError("the twin does not end")

    def is_over(self, cycle):
        busy = any(c.queue or (c.staged and c.landed > c.arrived) for c in self.channels)
        ended = self.stage == len(self.p.stages) and not busy
        return ended and not (self.stepped and self.memory_busy(cycle))

    def step_stage(self, cycle):
        """One cycle of the stage; True where it was the last."""
        stage = self.p.stages[self.stage]
        if self.flush:
            self.flush -= 1
            self.all_wait("pipeline", "sddmm" if stage["kind"] == SDDMM else "spmm")
            return self.flush == 0
        if self.split:
            self.split -= 1
            self.all_wait("reconfigure", "reconfigure")
        elif not self.begun and self.count["stores_done"] < stage["stores"]:
            self.all_wait("store", "store")
        elif not self.begun and self.channels[INDEX].arrived < stage["index_bytes"]:
            self.all_wait("index_refill", "load")
        else:
            return self.work(stage, cycle)
        return False

    def all_wait(self, cause, phase):
        self.stalls[self.stage][cause] += self.hw.lines
        self.phases[self.stage][phase] += 1

    def work(self, stage, cycle):
        if not self.begun:
            self.begin(stage)
            self.begun = True
        did = self.step_lines(stage, cycle)
        self.stalls[self.stage].update(did)
        self.phases[self.stage][self.phase(stage, did)] += 1
        if any(line.pieces or line.drain for line in self.lines):
            return False
        self.flush = self.hw.pipeline_cycles
        return self.flush == 0

    def end_stage(self, cycle):
        self.stage_times[self.stage][1] = cycle + 1
        frees = int(self.p.stages[self.stage]["index_frees"])
        self.channels[INDEX].used -= frees * self.unit
        self.stage, self.begun = self.stage + 1, False
        if self.stage < len(self.p.stages):
            self.stage_times[self.stage][0] = cycle + 1
            self.split = int(self.p.stages["reconfigure"][self.stage])
