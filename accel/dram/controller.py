"""Compiled part: the controller of one DRAM channel, command by command.

First-ready, first-come: requests wait in one queue for reads and one for writes, move from
there, one a cycle, to a queue at their bank, and of each bank's queue the first request that
can go on does: its column command where its row is open, else (for the oldest alone) an
activate or a precharge. A row that queued requests still hit is closed after `row_hits` hits
at the earliest. Banks take turns; a command a cycle. Writes go in groups: when their queue is
full, or no other request is left and enough of them wait. Refresh goes first: its rank is
closed bank by bank as timing allows and takes no other command until it is refreshed.

Every request is a burst of its own: none is merged with another of the same line, and none
is answered from the queue of writes. Time is in the memory's cycles; a cycle in which no
command can go is not stepped (`wake`), which is exact.
"""

from __future__ import annotations

from ..jit import core, part
from .state import NEVER

ACTIVATE, PRECHARGE, READ, WRITE, REFRESH = range(5)
"""Commands, as the log has them."""


@core
def _field(places, number, line):
    return line // places[number].line_divide % places[number].line_modulo


@part
def channel_of(dram, line):
    """The channel that holds a line (its address / 64)."""
    return _field(dram.places, 0, line)


@part
def has_room(dram, number, write):
    """Can channel ``number`` take another read (write)?"""
    if write:
        return dram.controllers[number].writes < dram.memory.write_queue
    return dram.controllers[number].reads < dram.memory.read_queue


@part
def pending(dram, number):
    """Has channel ``number`` anything to do?"""
    controller = dram.controllers[number]
    return controller.reads + controller.writes + controller.queued > 0


@part
def offer(dram, number, line, write, tag):
    """Queue a request at a channel that has room for it; it can move on from this cycle."""
    controller, places = dram.controllers[number], dram.places
    if write:
        request = dram.writes[number, controller.writes]
        controller.writes += 1
    else:
        request = dram.reads[number, controller.reads]
        controller.reads += 1
    request.rank = _field(places, 1, line)
    request.group = _field(places, 2, line)
    request.bank = _field(places, 3, line)
    request.column = _field(places, 4, line)
    request.row = _field(places, 5, line)
    request.write = write
    request.tag = tag
    controller.wake = min(controller.wake, controller.now)


@part
def advance(dram, number, until):
    """Step channel ``number`` up to, not including, cycle ``until``."""
    memory, controller, log = dram.memory, dram.controllers[number], dram.log[number]
    ranks, groups, banks = dram.ranks[number], dram.groups[number], dram.banks[number]
    reads, writes, queues = dram.reads[number], dram.writes[number], dram.queues[number]
    while controller.now < until:
        if controller.wake > controller.now:
            controller.now = min(controller.wake, until)
            continue
        now = controller.now
        while controller.refresh_at <= now:
            controller.refresh_at += memory.refresh_interval
            controller.refreshes_due += 1
        soonest, issued = NEVER, False
        if controller.refreshes_due > 0:
            soonest, issued = _refresh(memory, controller, banks, log)
        if not issued:
            chance, issued = _serve(
                memory, controller, ranks, groups, banks, queues, dram.done, log
            )
            soonest = min(soonest, chance)
        moved = _queue_at_bank(memory, controller, banks, reads, writes, queues)
        if issued or moved:
            controller.wake = now + 1
        else:
            controller.wake = min(soonest, controller.refresh_at)
        controller.now = now + 1


@core
def _refresh(memory, controller, banks, log):
    """Close the banks of the rank that is due, then refresh it: (first chance, issued)."""
    now, rank = controller.now, controller.refresh_rank
    size = memory.bank_groups * memory.banks_per_group
    soonest, closed = 0, True
    for number in range(rank * size, (rank + 1) * size):
        bank = banks[number]
        if bank.row >= 0:
            if bank.pre_at <= now:
                _precharge(memory, controller, banks, number, log)
                return now, True
            soonest = bank.pre_at if closed else min(soonest, bank.pre_at)
            closed = False
        elif closed:
            soonest = max(soonest, bank.ref_at)
    if not closed or soonest > now:
        return soonest, False
    for number in range(rank * size, (rank + 1) * size):
        banks[number].act_at = max(banks[number].act_at, now + memory.rfc)
        banks[number].ref_at = now + memory.rfc
    controller.refreshes_due -= 1
    controller.refreshes += 1
    controller.refresh_rank = (rank + 1) % memory.ranks
    _log(controller, log, REFRESH, rank, 0, 0, 0)
    return now, True


@core
def _serve(memory, controller, ranks, groups, banks, queues, done, log):
    """The next bank whose queue has a command that can go: (first chance, issued)."""
    soonest, now, size = NEVER, controller.now, memory.bank_groups * memory.banks_per_group
    if controller.queued == 0:
        return soonest, False
    held = controller.refresh_rank if controller.refreshes_due > 0 else -1
    number = controller.turn
    for _ in range(banks.size):
        number = number + 1 if number + 1 < banks.size else 0
        if banks[number].waiting == 0 or number // size == held:
            continue
        rank, group = ranks[number // size], groups[number // memory.banks_per_group]
        place, command, at = _choose(memory, rank, group, banks[number], queues[number], now)
        if at > now:
            soonest = min(soonest, at)
            continue
        controller.turn = number
        if command == ACTIVATE:
            _activate(memory, controller, rank, group, banks[number], queues[number], log)
        elif command == PRECHARGE:
            _precharge(memory, controller, banks, number, log)
        else:
            request = queues[number][place]
            _column(memory, controller, ranks, group, banks[number], request, done, log)
            _remove(queues[number], banks[number].waiting, place)
            banks[number].waiting -= 1
            controller.queued -= 1
        return now, True
    return soonest, False


@core
def _choose(memory, rank, group, bank, queue, now):
    """(request, command, first cycle) of the bank: the first that can go now, else the one
    that can go soonest."""
    if bank.row < 0:
        window = min(min(rank.act_0, rank.act_1), min(rank.act_2, rank.act_3)) + memory.faw
        return 0, ACTIVATE, max(max(bank.act_at, group.act_at), max(rank.act_at, window))
    best, command, soonest, hit = -1, PRECHARGE, NEVER, False
    read_at = max(bank.column_at, max(group.read_at, rank.read_at))
    write_at = max(bank.column_at, max(group.write_at, rank.write_at))
    for place in range(bank.waiting):
        if queue[place].row != bank.row:
            continue
        hit = True
        at = write_at if queue[place].write else read_at
        if at < soonest and soonest > now:
            best, command, soonest = place, READ + queue[place].write, at
    may_close = queue[0].row != bank.row and (not hit or bank.hits >= memory.row_hits)
    if may_close and (bank.pre_at <= now or bank.pre_at < soonest):
        return 0, PRECHARGE, bank.pre_at
    return best, command, soonest


@core
def _activate(memory, controller, rank, group, bank, queue, log):
    now, request = controller.now, queue[0]
    bank.row = request.row
    bank.hits = 0
    bank.column_at = now + memory.rcd
    bank.pre_at = now + memory.ras
    bank.act_at = now + memory.ras + memory.rp
    group.act_at = now + memory.rrd_l
    rank.act_at = now + memory.rrd_s
    rank.act_0, rank.act_1, rank.act_2, rank.act_3 = rank.act_1, rank.act_2, rank.act_3, now
    controller.activates += 1
    _log(controller, log, ACTIVATE, request.rank, request.group, request.bank, request.row)


@core
def _precharge(memory, controller, banks, number, log):
    now, bank = controller.now, banks[number]
    bank.row = -1
    bank.act_at = max(bank.act_at, now + memory.rp)
    bank.ref_at = max(bank.ref_at, now + memory.rp)
    group = number // memory.banks_per_group
    rank, group = group // memory.bank_groups, group % memory.bank_groups
    _log(controller, log, PRECHARGE, rank, group, number % memory.banks_per_group, 0)


@core
def _column(memory, controller, ranks, group, bank, request, done, log):
    """Read or write a line, and push back what may follow it."""
    now, burst = controller.now, memory.burst
    if request.write:
        end = now + memory.cwl + burst
        bank.pre_at = max(bank.pre_at, end + memory.wr)
        group.read_at = max(group.read_at, end + memory.wtr_l)
        group.write_at = max(group.write_at, now + memory.ccd_l)
        same_read, same_write = end + memory.wtr_s, now + memory.ccd_s
        other_read = end + memory.rtrs - memory.cl
        other_write = now + burst
    else:
        end = now + memory.cl + burst
        bank.pre_at = max(bank.pre_at, now + memory.rtp)
        group.read_at = max(group.read_at, now + memory.ccd_l)
        same_read, same_write = now + memory.ccd_s, end + memory.rtrs - memory.cwl
        other_read = now + burst + memory.rtrs
        other_write = end + memory.rtrs - memory.cwl
    for number in range(ranks.size):
        same = number == request.rank
        ranks[number].read_at = max(ranks[number].read_at, same_read if same else other_read)
        ranks[number].write_at = max(ranks[number].write_at, same_write if same else other_write)
    done[request.tag] = end
    controller.busy_until = max(controller.busy_until, end)
    controller.columns += 1
    controller.hits += bank.hits > 0
    bank.hits += 1
    command = READ + request.write
    _log(controller, log, command, request.rank, request.group, request.bank, request.row)


@core
def _queue_at_bank(memory, controller, banks, reads, writes, queues):
    """Move the oldest request whose bank has room to its bank; is there one?"""
    if controller.draining == 0:
        waiting = controller.writes
        idle = controller.queued == 0 and waiting > memory.drain_above
        last = controller.flush == 1 and controller.reads == 0
        if waiting == memory.write_queue or idle or last:
            controller.draining = waiting
    if controller.draining > 0:
        place = _first_with_room(memory, banks, writes, controller.writes, queues)
        if place >= 0:
            _remove(writes, controller.writes, place)
            controller.writes -= 1
            controller.draining -= 1
    else:
        place = _first_with_room(memory, banks, reads, controller.reads, queues)
        if place >= 0:
            _remove(reads, controller.reads, place)
            controller.reads -= 1
    controller.queued += place >= 0
    return place >= 0


@core
def _first_with_room(memory, banks, requests, count, queues):
    """Copy the first request whose bank has room to that bank; its place, or -1."""
    for place in range(count):
        request = requests[place]
        number = (request.rank * memory.bank_groups + request.group) * memory.banks_per_group
        number += request.bank
        if banks[number].waiting < memory.bank_queue:
            queues[number][banks[number].waiting] = request
            banks[number].waiting += 1
            return place
    return -1


@core
def _remove(requests, count, place):
    for later in range(place + 1, count):
        requests[later - 1] = requests[later]


@core
def _log(controller, log, command, rank, group, bank, row):
    if controller.logged < log.shape[0]:
        entry = log[controller.logged]
        entry[0], entry[1], entry[2] = controller.now, command, rank
        entry[3], entry[4], entry[5] = group, bank, row
        controller.logged += 1
