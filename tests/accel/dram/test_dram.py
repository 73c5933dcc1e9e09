"""The DDR4 model: published bandwidths, legal commands, a naive twin.

The table of published bandwidths was measured with DRAMsim3 and Ramulator 2.1 (40,000 reads of
64 bytes, all there at once, DDR4-2400, one channel of two ranks). The figures of further kinds
of traces were made with a plain transcription of DRAMsim3's controller (command by command,
every cycle stepped, none of this code), which repeats eight of its ten published figures to
1.3 % and is within 4 % of the other two, whose traces are not described in full. Where the two
differ here: that controller merges reads of a line that already waits, this one does not.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from sievit.accel import presets, simulate
from sievit.accel.dram.bandwidth import replay, stream_efficiency
from sievit.accel.dram.controller import ACTIVATE, PRECHARGE, READ, REFRESH, WRITE
from sievit.accel.dram.ddr4 import ADDRESS_MAPS, DRAM_TIMINGS, FIELDS, checked_map
from sievit.workload import Attention, Gemm, Workload

DDR4 = DRAM_TIMINGS["ddr4_2400"]
LINES = np.arange(40_000)
BANK_STRIDE = 8192 * 32  # the next row of the same bank, in either map

ROWS, GROUPS = "rows_interleaved", "groups_interleaved"


def gathered(rows, row_bytes, chosen=40_000, seed=0):
    """Addresses of the lines of random rows of a tensor, row after row."""
    lines = row_bytes // 64
    picks = np.random.default_rng(seed).integers(0, rows, -(-chosen // lines))
    return (picks[:, None] * row_bytes + np.arange(lines) * 64).ravel()[:chosen]


RANDOM = np.random.default_rng(0).integers(0, 2**27, 40_000) * 64  # over 8 GiB
HALVES = LINES // 2 * 64 + LINES % 2 * 20_000 * 64  # read the first half, write the second

PUBLISHED = {
    "stream": (LINES * 64, None, 15.0, 18.6),
    "random rows over 8 GB": (RANDOM, None, 17.0, 17.0),
    "one bank, new row each": (LINES * BANK_STRIDE, None, 1.31, 1.31),
    "gather of 192-byte rows, not merged (Ramulator)": (gathered(197, 192), None, 17.7, 18.1),
    "write stream": (LINES * 64, LINES >= 0, 15.1, 18.3),
    "50:50 read-write": (HALVES, LINES % 2 == 1, 12.1, 18.0),
}
"""Trace, which of it is written, GB/s with rows and with groups interleaved."""


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("address_map", [ROWS, GROUPS])
def test_published_bandwidths_within_5_percent(name, address_map):
    addresses, writes, *published = PUBLISHED[name]
    run = replay(addresses, writes, address_map=address_map)
    expected = published[address_map == GROUPS]
    assert run.bytes_per_s / 1e9 == pytest.approx(expected, rel=0.05)


def streams(count, apart, block=1, lines=20_000):
    """Several streams in turn, a block of lines of each."""
    line = np.arange(lines)
    at = line // (block * count) * block + line % block
    return line // block % count * apart + at * 64


def kinds():
    """Further traces of 20,000 requests; the order in which random ones are drawn matters."""
    line, random = np.arange(20_000), np.random.default_rng(7)
    blocks, kib = np.arange(4) * 64, 1024
    made = {
        "4 streams, 1 MiB apart": (streams(4, 2**20), None),
        "4 streams, 1000 KiB + 64 apart": (streams(4, 1000 * kib + 64), None),
        "8 streams, 37 KiB apart": (streams(8, 37 * kib), None),
        "3 streams in blocks of 16 lines": (streams(3, 2**20 + 8192, 16), None),
        "16 streams, 64 KiB apart": (streams(16, 64 * kib), None),
        "stride of 1 KiB": (line * kib, None),
        "stride of 2 KiB": (line * 2 * kib, None),
        "stride of 4 KiB": (line * 4 * kib, None),
        "stride of 12 KiB": (line * 12 * kib, None),
        "stride of 8 KiB + 64": (line * (8192 + 64), None),
        "stride of 3 KiB + 192": (line * (3072 + 192), None),
        "random lines in 2 MiB": (random.integers(0, 2**15, 20_000) * 64, None),
        "random lines in 6 MiB": (random.integers(0, 3 * 2**15, 20_000) * 64, None),
    }
    starts = random.integers(0, 2**14, 5_000)[:, None] * 256
    made["random blocks of 4 lines in 4 MiB"] = ((starts + blocks).ravel(), None)
    starts = random.integers(0, 2**13, 3_334)[:, None] * 384
    made["random tokens of 384 bytes in 3 MiB"] = (
        (starts + np.arange(6) * 64).ravel()[:20_000],
        None,
    )
    made["3 streams read, 1 written"] = (streams(4, 2**20 + 24 * kib), line % 4 == 3)
    written = random.integers(0, 2**16, 20_000) * 64
    made["random lines of 4 MiB, a third written"] = (written, random.random(20_000) < 1 / 3)
    return made


KINDS = kinds()
REFERENCE = {
    "4 streams, 1 MiB apart": (5.912, 17.943),
    "4 streams, 1000 KiB + 64 apart": (17.836, 18.399),
    "8 streams, 37 KiB apart": (16.880, 18.546),
    "3 streams in blocks of 16 lines": (18.036, 18.056),
    "16 streams, 64 KiB apart": (14.089, 18.715),
    "stride of 1 KiB": (18.803, 13.316),
    "stride of 2 KiB": (18.564, 14.061),
    "stride of 4 KiB": (17.939, 14.167),
    "stride of 12 KiB": (15.814, 12.412),
    "stride of 8 KiB + 64": (16.385, 15.305),
    "stride of 3 KiB + 192": (18.119, 18.187),
    "random lines in 2 MiB": (18.346, 18.186),
    "random lines in 6 MiB": (17.307, 17.548),
    "random blocks of 4 lines in 4 MiB": (18.506, 17.424),
    "random tokens of 384 bytes in 3 MiB": (18.528, 17.968),
    "3 streams read, 1 written": (15.457, 17.490),
    "random lines of 4 MiB, a third written": (16.313, 16.390),
}
"""GB/s of the transcription, rows and groups interleaved."""


@pytest.mark.parametrize("name", REFERENCE)
def test_traces_of_other_kinds_within_2_percent(name):
    addresses, writes = KINDS[name]
    for address_map, expected in zip((ROWS, GROUPS), REFERENCE[name], strict=True):
        run = replay(addresses, writes, address_map=address_map)
        assert run.bytes_per_s / 1e9 == pytest.approx(expected, rel=0.02)


def least_gap(t, earlier, later):
    """Cycles that must lie between two commands (command, rank, group, bank), by JESD79-4."""
    first, second, columns = earlier[0], later[0], {READ, WRITE}
    same_rank = earlier[1] == later[1]
    same_group = same_rank and earlier[2] == later[2]
    same_bank = same_group and earlier[3] == later[3]
    if first == REFRESH:
        return t.rfc if same_rank and second in (ACTIVATE, REFRESH) else 0
    if second == REFRESH:
        return t.rp if same_rank and first == PRECHARGE else 0
    if first == ACTIVATE and second == ACTIVATE:
        return t.ras + t.rp if same_bank else t.rrd_l if same_group else t.rrd_s * same_rank
    if {first, second} <= columns:
        return column_gap(t, first, second, same_rank, same_group)
    if not same_bank:
        return 0
    return {
        (ACTIVATE, READ): t.rcd,
        (ACTIVATE, WRITE): t.rcd,
        (ACTIVATE, PRECHARGE): t.ras,
        (READ, PRECHARGE): t.rtp,
        (WRITE, PRECHARGE): t.cwl + t.burst + t.wr,
        (PRECHARGE, ACTIVATE): t.rp,
    }.get((first, second), 0)


def column_gap(t, first, second, same_rank, same_group):
    """Cycles between two reads or writes."""
    if not same_rank:  # their data must not meet on the bus
        lead = (t.cl if first == READ else t.cwl) - (t.cl if second == READ else t.cwl)
        return lead + t.burst + t.rtrs * ((first, second) != (WRITE, WRITE))
    if first == second:
        return t.ccd_l if same_group else t.ccd_s
    if first == READ:
        return t.cl + t.burst + t.rtrs - t.cwl
    return t.cwl + t.burst + (t.wtr_l if same_group else t.wtr_s)


def allowed(t, history, now, command):
    """May ``command`` go at ``now``, after ``history`` of (cycle, command)?"""
    for cycle, earlier in reversed(history):
        if now - cycle >= max(t.rfc, t.ras + t.rp):
            break
        if now - cycle < least_gap(t, earlier, command):
            return False
    if command[0] == ACTIVATE:
        acts = [c for c, e in history if e[0] == ACTIVATE and e[1] == command[1]]
        return len(acts) < 4 or now - acts[-4] >= t.faw
    return True


def assert_legal(t, log, lines):
    """No command too early, rows open where they must be, no two bursts at once, all refreshed."""
    history, rows, refreshed = deque(maxlen=600), {}, {rank: [0] for rank in range(t.ranks)}
    bursts = []
    for cycle, kind, rank, group, bank, row in log.tolist():
        command = (kind, rank, group, bank)
        assert not history or cycle > history[-1][0]
        assert allowed(t, history, cycle, command)
        history.append((cycle, command))
        place = (rank, group, bank)
        if kind == ACTIVATE:
            assert place not in rows
            rows[place] = row
        elif kind == PRECHARGE:
            del rows[place]
        elif kind == REFRESH:
            assert not any(other[0] == rank for other in rows)
            refreshed[rank].append(cycle)
        else:
            assert rows[place] == row
            start = cycle + (t.cl if kind == READ else t.cwl)
            bursts.append((start, start + t.burst))
    assert len(bursts) == lines
    assert_one_burst_at_once(bursts)
    for times in refreshed.values():
        assert_refreshed(t, times)


def assert_one_burst_at_once(bursts):
    assert all(before[1] <= after[0] for before, after in pairwise(sorted(bursts)))


def assert_refreshed(t, times):
    """DDR4 lets a refresh wait for eight intervals."""
    assert all(after - before <= 1.1 * t.refi for before, after in pairwise(times))


LEGAL = {
    "stream": (LINES[:3000] * 64, None),
    "random": (RANDOM[:1500], RANDOM[:1500] % 3 == 0),
    "halves": (HALVES[:2500], LINES[:2500] % 2 == 1),
    "one bank": (LINES[:300] * BANK_STRIDE, None),
    "strides": (LINES[:1500] * (12 * 1024), LINES[:1500] % 5 == 0),
}


@pytest.mark.parametrize("name", LEGAL)
@pytest.mark.parametrize("address_map", [ROWS, GROUPS])
def test_every_command_is_legal(name, address_map):
    addresses, writes = LEGAL[name]
    quick = replace(DDR4, refi=1500)  # refreshes come often
    for timing in (DDR4, quick):
        run = replay(
            addresses, writes, timing=timing, address_map=address_map, log_commands=9 * len(LINES)
        )
        assert_legal(timing, run.commands[0], len(addresses))
        assert run.cycles >= len(addresses) * timing.burst
        assert (run.done > 0).all()


class Twin:
    """The controller's rules as its docstring has them, every cycle stepped."""

    def __init__(self, timing, address_map):
        self.t, self.map = timing, checked_map(address_map)
        self.history, self.rows, self.hits = [], {}, {}
        self.reads, self.writes = [], []
        self.queues = {
            (rank, group, bank): []
            for rank in range(timing.ranks)
            for group in range(timing.bank_groups)
            for bank in range(timing.banks_per_group)
        }
        self.turn, self.draining, self.due, self.refreshed = 0, 0, 0, 0
        self.done = {}

    def request(self, address, write, tag):
        line, at = address // 64, {}
        for field in reversed(self.map):
            size = 2**62 if field == "ro" else self.t.size(field, 1)
            at[field], line = line % size, line // size
        place = (at["ra"], at["bg"], at["ba"])
        return SimpleNamespace(place=place, row=at["ro"], write=write, tag=tag)

    def try_(self, now, kind, place, row=0):
        command = (kind, *place)
        if not allowed(self.t, self.history, now, command):
            return False
        self.history.append((now, command))
        if kind == ACTIVATE:
            self.rows[place], self.hits[place] = row, 0
        elif kind == PRECHARGE:
            del self.rows[place]
        return True

    def step(self, now, flush):
        interval = self.t.refi // self.t.ranks
        self.due += now > 0 and now % interval == 0
        if not (self.due and self.refresh(now)):
            self.serve(now)
        self.move(flush)

    def refresh(self, now):
        rank = self.refreshed % self.t.ranks
        opened = [place for place in self.queues if place[0] == rank and place in self.rows]
        for place in opened:
            if self.try_(now, PRECHARGE, place):
                return True
        if not opened and self.try_(now, REFRESH, (rank, 0, 0)):
            self.due -= 1
            self.refreshed += 1
            return True
        return False

    def serve(self, now):
        places = list(self.queues)
        held = self.refreshed % self.t.ranks if self.due else None
        for number in [*range(self.turn + 1, len(places)), *range(self.turn + 1)]:
            if places[number][0] != held and self.serve_bank(now, places[number]):
                self.turn = number
                return

    def serve_bank(self, now, place):
        queue = self.queues[place]
        if queue and place not in self.rows:
            return self.try_(now, ACTIVATE, place, queue[0].row)
        row = self.rows.get(place)
        for request in queue:
            if request.row != row:
                hit = any(other.row == row for other in queue)
                may = request is queue[0] and (not hit or self.hits[place] >= self.t.row_hits)
                if may and self.try_(now, PRECHARGE, place):
                    return True
            elif self.try_(now, WRITE if request.write else READ, place):
                self.hits[place] += 1
                latency = self.t.cwl if request.write else self.t.cl
                self.done[request.tag] = now + latency + self.t.burst
                queue.remove(request)
                return True
        return False

    def move(self, flush):
        queued = any(self.queues.values())
        if not self.draining and (
            len(self.writes) == self.t.write_queue
            or (not queued and len(self.writes) > self.t.drain_above)
            or (flush and not self.reads)
        ):
            self.draining = len(self.writes)
        waiting = self.writes if self.draining else self.reads
        for request in waiting:
            if len(self.queues[request.place]) < self.t.bank_queue:
                self.queues[request.place].append(request)
                waiting.remove(request)
                self.draining -= self.draining > 0
                return

    def run(self, addresses, writes):
        trace = deque(map(self.request, addresses, writes, range(len(addresses))))
        for now in range(10**5):
            if len(self.done) == len(addresses):
                return [self.done[tag] for tag in range(len(addresses))]
            if now and trace:
                waiting = self.writes if trace[0].write else self.reads
                size = self.t.write_queue if trace[0].write else self.t.read_queue
                if len(waiting) < size:
                    waiting.append(trace.popleft())
            self.step(now, not trace)
        raise AssertionError("the twin does not end")


def twin_case(seed):
    """A small memory, a trace that makes its banks meet."""
    rng = np.random.default_rng(seed)
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    timing = replace(
        DDR4,
        ranks=pick(1, 2),
        bank_groups=pick(1, 2, 4),
        banks_per_group=pick(1, 2, 4),
        row_lines=pick(2, 8, 128),
        refi=pick(700, 9360),
        rfc=pick(40, 200),
        read_queue=pick(1, 4, 32),
        write_queue=pick(1, 5, 32),
        bank_queue=pick(1, 3, 8),
        drain_above=pick(1, 8),
        row_hits=pick(1, 4),
    )
    lines = int(pick(30, 70))
    near = rng.integers(0, pick(20, 3000), lines)
    addresses = np.where(rng.random(lines) < pick(0, 0.5), near, np.arange(lines)) * 64
    return timing, pick(ROWS, GROUPS), addresses, rng.random(lines) < pick(0, 0.3, 1)


@pytest.mark.parametrize("seed", range(24))
def test_equals_its_naive_twin(seed):
    timing, address_map, addresses, writes = twin_case(seed)
    run = replay(addresses, writes, timing=timing, address_map=address_map, log_commands=2000)
    twin = Twin(timing, address_map)
    assert run.done.tolist() == twin.run(addresses.tolist(), writes.tolist())
    logged = [(cycle, tuple(command)) for cycle, *command, _ in run.commands[0].tolist()]
    assert logged[: len(twin.history)] == twin.history


def test_channels_share_a_stream():
    one, four = (replay(LINES[: 8000 * n] * 64, channels=n) for n in (1, 4))
    assert four.bytes_per_s == pytest.approx(4 * one.bytes_per_s, rel=0.02)


def test_a_stream_of_one_bank_group_is_capped_by_its_column_commands():
    """Bursts of 4 cycles every 6: two thirds of the peak, less the refreshes."""
    line = np.arange(20_000)
    addresses = (line // 128 * 128 * 16 + line % 128) * 64  # one row of a group, then the next
    run = replay(addresses, timing=replace(DDR4, ranks=1), address_map=ROWS)
    assert run.bytes_per_s <= 19.2e9 * 4 / 6


def test_the_stream_of_a_memory_is_measured():
    assert 0.93 < stream_efficiency("ddr4_2400", GROUPS, 4) < 1
    assert 0.74 < stream_efficiency("ddr4_2400", ROWS, 1) < 0.80


def test_address_maps_tell_lines_apart():
    for address_map in [*ADDRESS_MAPS, "ro-co-ch-bg-ba-ra"]:
        fields = checked_map(address_map)
        assert sorted(fields) == sorted(FIELDS)
        run = replay(LINES[:2000] * 64, address_map=address_map, channels=3)
        assert run.lines == 2000


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"groups_interleaved.*got 'zigzag'"):
        replay([0], address_map="zigzag")
    with pytest.raises(ValueError, match="row first, got 'ra-ro-co-ba-bg-ch'"):
        replay([0], address_map="ra-ro-co-ba-bg-ch")
    with pytest.raises(ValueError, match="timing must be one of ddr4_2400, got 'ddr9'"):
        replay([0], timing="ddr9")
    with pytest.raises(ValueError, match="not be negative, got -64"):
        replay([0, -64])
    with pytest.raises(ValueError, match="one for each of 2 addresses, got 1"):
        replay([0, 64], [True])
    with pytest.raises(ValueError, match="channels must be an integer >= 1, got 0"):
        replay([0], channels=0)
    with pytest.raises(ValueError, match="faw must be an integer >= 1, got 0"):
        replace(DDR4, faw=0)


def test_an_empty_trace_takes_no_time():
    assert replay(np.zeros(0)).cycles == 0


VITCOD = presets["vitcod"]
STEPPED = presets["vitcod_ddr4"]


def test_a_machine_takes_whole_channels():
    assert STEPPED.dram_channels == 4
    with pytest.raises(ValueError, match=r"multiple of 19200000000.*got 50000000000"):
        replace(STEPPED, dram_bytes_per_s=50_000_000_000)
    replace(VITCOD, dram_bytes_per_s=50_000_000_000)  # the flat model takes any bandwidth
    with pytest.raises(ValueError, match="dram_model must be one of flat, ddr4, got 'hbm'"):
        replace(VITCOD, dram_model="hbm")
    with pytest.raises(ValueError, match="address map must be one of"):
        replace(STEPPED, dram_map="zigzag")


def test_dense_streams_run_at_the_measured_rate():
    size = 10**7
    share = stream_efficiency("ddr4_2400", GROUPS, 4)
    assert STEPPED.dram_cycles(size) == -(-size // (Fraction(768, 5) * share))
    work = Workload("weights", (Gemm("head", 1, 4096, 4096),))
    flat, stepped = (simulate(work, hardware).ops[0] for hardware in (VITCOD, STEPPED))
    assert stepped.cycles >= flat.cycles
    assert stepped.busy["DRAM"] == pytest.approx(flat.busy["DRAM"] / share, rel=1e-4)


def test_the_report_says_which_memory():
    call = Attention("call", 1, 40, 40, 64, 64)
    work = Workload("one call", (call,))
    for hardware in (VITCOD, STEPPED):
        made = json.loads(json.dumps(simulate(work, hardware).to_dict()))
        details = made["ops"][0]["details"]
        assert made["hardware"]["dram_model"] == details["dram_model"] == hardware.dram_model
    assert details["dram_map"] == GROUPS
    assert details["dram_lines"] == 4 * 40  # Q, K, V and the output, a line a token
    assert 0 < details["dram_row_hits"] < details["dram_lines"]
