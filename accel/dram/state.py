"""A DDR4 memory's registers, as the compiled controller (`controller`) keeps them.

Every register is an int64 field of a record; channels come first in every array.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .ddr4 import DramTiming, checked_map

NEVER = 2**62


def _record(*fields: str) -> np.dtype:
    return np.dtype([(field, np.int64) for field in fields])


MEMORY = _record(
    "channels", "ranks", "bank_groups", "banks_per_group", "row_lines",
    "burst", "cl", "cwl", "rcd", "rp", "ras", "rtp", "wr", "ccd_s", "ccd_l", "rrd_s", "rrd_l",
    "faw", "wtr_s", "wtr_l", "rtrs", "rfc", "refresh_interval",
    "read_queue", "write_queue", "bank_queue", "drain_above", "row_hits",
)  # fmt: skip
"""`DramTiming` as the core needs it; a refresh of some rank is due every refresh_interval."""

PLACE = _record("line_divide", "line_modulo")
"""How to find a field of a line's number: divide, then modulo; rows of a table in the order
channel, rank, bank group, bank, column, row."""

CONTROLLER = _record(
    "now",  # next cycle to step
    "wake",  # first cycle in which anything can happen
    "turn",  # bank that had the last command
    "reads",  # in the queue of reads, of writes, and in the banks' queues
    "writes",
    "queued",
    "draining",  # writes that go before any further read
    "flush",  # no further request will come: write what is left
    "refresh_at",  # next refresh is due
    "refresh_rank",  # the next to be refreshed
    "refreshes_due",
    "busy_until",  # end of the last data
    "hits",  # column commands on a row already used
    "columns",
    "activates",
    "refreshes",
    "logged",
)

RANK = _record("read_at", "write_at", "act_at", "act_0", "act_1", "act_2", "act_3")
"""First cycle of a command by what happened in any bank of the rank; the last activates."""

GROUP = _record("read_at", "write_at", "act_at")
BANK = _record(
    "row",  # open; -1: none
    "hits",
    "column_at",  # first cycle of a command by what happened in this bank
    "act_at",
    "pre_at",
    "ref_at",
    "waiting",  # requests in its queue
)
REQUEST = _record("rank", "group", "bank", "row", "column", "write", "tag")


class Dram(NamedTuple):
    """A memory's state: arrays over channels first."""

    memory: np.void  # MEMORY
    places: np.ndarray  # (6) PLACE
    controllers: np.ndarray  # (channels) CONTROLLER
    ranks: np.ndarray  # (channels, ranks)
    groups: np.ndarray  # (channels, ranks * groups)
    banks: np.ndarray  # (channels, ranks * groups * banks)
    reads: np.ndarray  # (channels, read_queue) REQUEST, oldest first
    writes: np.ndarray
    queues: np.ndarray  # (channels, banks, bank_queue) REQUEST, oldest first
    done: np.ndarray  # (tags) end of a request's data; 0: not yet
    log: np.ndarray  # (channels, commands, 6) cycle, command, rank, group, bank, row; may be empty


def new_dram(
    timing: DramTiming, address_map: str, channels: int, tags: int, logged: int = 0
) -> Dram:
    """An idle memory, all rows closed."""
    memory, shape = np.zeros(1, MEMORY), (channels, timing.banks)
    for name in MEMORY.names or ():
        memory[name] = getattr(timing, name, 0)
    memory["channels"] = channels
    memory["refresh_interval"] = timing.refi // timing.ranks
    controllers = np.zeros(channels, CONTROLLER)
    controllers["refresh_at"] = memory["refresh_interval"]
    banks = np.zeros(shape, BANK)
    banks["row"] = -1
    ranks = np.zeros((channels, timing.ranks), RANK)
    for name in ("act_0", "act_1", "act_2", "act_3"):
        ranks[name] = -timing.faw
    return Dram(
        memory[0],
        _places(timing, address_map, channels),
        controllers,
        ranks,
        np.zeros((channels, timing.ranks * timing.bank_groups), GROUP),
        banks,
        np.zeros((channels, timing.read_queue), REQUEST),
        np.zeros((channels, timing.write_queue), REQUEST),
        np.zeros((*shape, timing.bank_queue), REQUEST),
        np.zeros(tags, np.int64),
        np.zeros((channels, logged, 6), np.int64),
    )


def _places(timing: DramTiming, address_map: str, channels: int) -> np.ndarray:
    places, step = np.zeros(6, PLACE), 1
    order = ("ch", "ra", "bg", "ba", "co", "ro")
    for field in reversed(checked_map(address_map)):
        size = NEVER if field == "ro" else timing.size(field, channels)
        places[order.index(field)] = (step, size)
        step *= 1 if field == "ro" else size
    return places
