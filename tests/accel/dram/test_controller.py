"""The memory controller: no command too early, and every cycle that of its naive twin."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from dram_traces import BANK_STRIDE, DDR4, GROUPS, HALVES, LINES, RANDOM, ROWS

from sievit.accel.dram.bandwidth import replay
from sievit.accel.dram.controller import ACTIVATE, PRECHARGE, READ, REFRESH, WRITE
from sievit.accel.dram.ddr4 import checked_map


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
