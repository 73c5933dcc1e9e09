"""How fast a DDR4 memory serves a trace of requests, and what a stream reaches.

The controller is stepped as it is in the engine (`controller`); here a trace is fed to it.
Witness: the tests compare bandwidths with those of DRAMsim3 (Li et al., CAL 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from ...checks import integer
from ..jit import cached_core, sources_digest
from .controller import advance, channel_of, has_room, offer, pending
from .ddr4 import DRAM_TIMINGS, LINE_BYTES, DramTiming
from .state import new_dram

STREAM_LINES = 32_768
"""Lines of the stream that gives a memory's effective bandwidth: 2 MB, seven refreshes."""

MOST_CHANNELS = 256
"""A choice: 4.9e12 bytes/s of "ddr4_2400", whose stream takes ten seconds to measure."""


@dataclass(frozen=True)
class DramRun:
    """What a trace took. ``done`` holds, for each request, the cycle in which its data ends."""

    cycles: int  # of the memory's clock, until the last data
    lines: int
    row_hits: int  # requests that found their row open and used before
    activates: int
    refreshes: int
    clock_hz: int
    done: np.ndarray
    commands: np.ndarray  # (channels, commands, 6), where they were asked for

    @property
    def bytes_per_s(self) -> float:
        """Of all channels together."""
        return self.lines * LINE_BYTES * self.clock_hz / self.cycles


def replay(
    addresses: np.ndarray,
    writes: np.ndarray | None = None,
    *,
    timing: str | DramTiming = "ddr4_2400",
    address_map: str = "groups_interleaved",
    channels: int = 1,
    log_commands: int = 0,
) -> DramRun:
    """Serve requests of 64 bytes in order of arrival, one offered a cycle for each channel.

    addresses     int [requests], bytes; each stands for the line that holds it
    writes        bool [requests]; None: all read
    timing        a name of `DRAM_TIMINGS` or the numbers themselves
    address_map   a name of `ADDRESS_MAPS` or the fields spelt out
    log_commands  of each channel, the first so many are kept

    A request waits until the queue of its channel takes it, and those behind it wait too.
    Raises ValueError for unknown names, addresses below zero and arrays of different length.
    """
    memory = _timing(timing)
    lines = np.asarray(addresses, dtype=np.int64) // LINE_BYTES
    kinds = np.zeros(len(lines), np.int64) if writes is None else np.asarray(writes, np.int64)
    if len(kinds) != len(lines):
        raise ValueError(f"writes must be one for each of {len(lines)} addresses, got {len(kinds)}")
    if len(lines) and lines.min() < 0:
        raise ValueError(f"addresses must not be negative, got {np.min(addresses)}")
    channels = integer("channels", channels, 1, MOST_CHANNELS)
    dram = new_dram(memory, address_map, channels, len(lines), log_commands)
    _serve(dram, lines, kinds, channels)
    total = {name: int(dram.controllers[name].sum()) for name in ("hits", "activates", "refreshes")}
    logged = dram.controllers["logged"].max(initial=0)
    return DramRun(
        int(dram.controllers["busy_until"].max(initial=0)),
        len(lines),
        total["hits"],
        total["activates"],
        total["refreshes"],
        memory.clock_hz,
        dram.done,
        dram.log[:, :logged],
    )


@lru_cache(maxsize=64)
def stream_efficiency(timing: str, address_map: str, channels: int) -> Fraction:
    """Share of the peak bandwidth that reads of one long stream reach, measured by `replay`."""
    addresses = np.arange(STREAM_LINES * channels) * LINE_BYTES
    run = replay(addresses, timing=timing, address_map=address_map, channels=channels)
    return Fraction(STREAM_LINES * _timing(timing).burst, run.cycles)


def _timing(timing: str | DramTiming) -> DramTiming:
    if isinstance(timing, DramTiming):
        return timing
    if timing not in DRAM_TIMINGS:
        raise ValueError(f"timing must be one of {', '.join(DRAM_TIMINGS)}, got {timing!r}")
    return DRAM_TIMINGS[timing]


def _compiled(sources: str):
    @cached_core
    def serve(dram, lines, kinds, a_cycle):
        """Offer requests in order, at most ``a_cycle`` a cycle, and step until all are done."""
        assert sources
        time, first = 0, 0
        while first < lines.size:
            time += 1
            for number in range(dram.controllers.size):
                advance(dram, number, time)
            for request in range(first, min(first + a_cycle, lines.size)):
                number = channel_of(dram, lines[request])
                if not has_room(dram, number, kinds[request]):
                    break
                offer(dram, number, lines[request], kinds[request], request)
                first += 1
        for number in range(dram.controllers.size):
            dram.controllers[number].flush = 1
            while pending(dram, number):
                advance(dram, number, dram.controllers[number].now + dram.memory.refresh_interval)

    return serve


_serve = _compiled(sources_digest("dram/bandwidth", "dram/controller", "dram/state", "jit"))
