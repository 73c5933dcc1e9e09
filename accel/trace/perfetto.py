"""A `Timeline` as a trace that Perfetto and chrome://tracing open (Trace Event Format, JSON).

Each machine is a process, each resource a thread of it, each slice a complete event;
counters give DRAM traffic by tensor in GB/s and the share of the MAC lines at work. Times
are simulated, in microseconds, whole nanoseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from ...files import written_whole
from .timeline import DENSER, SPARSER, Timeline

BINS = 32
"""Counter samples of one operation, at most."""

Event = dict[str, Any]


def trace_events(timeline: Timeline, process: int = 1) -> list[Event]:
    """Metadata first, then slices and counters in the order of time."""
    report = timeline.report
    title = f"{report.simulator}: {report.workload}, batch {report.batch}"
    tracks = {name: number for number, name in enumerate(timeline.tracks, start=1)}
    events: list[Event] = [_named("process_name", process, 0, name=title)]
    for name, thread in tracks.items():
        unit = timeline.peak(name)[1]
        shown = name if unit == "cycles" else f"{name} ({unit})"
        events.append(_named("thread_name", process, thread, name=shown))
        events.append(_named("thread_sort_index", process, thread, sort_index=thread))
    timed = [*_slices(timeline, process, tracks), *_counters(timeline, process)]
    return events + sorted(timed, key=lambda event: event["ts"])


def write_trace(timelines: Iterable[Timeline], path: str | os.PathLike[str]) -> None:
    """Write the machines of ``timelines`` as one trace, whole or not at all."""
    events = [
        event
        for process, timeline in enumerate(timelines, start=1)
        for event in trace_events(timeline, process)
    ]
    with written_whole(path) as temporary, temporary.open("w") as file:
        trace = {"displayTimeUnit": "ns", "traceEvents": events}
        json.dump(trace, file, allow_nan=False, separators=(",", ":"))


def _named(kind: str, process: int, thread: int, **arguments: Any) -> Event:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": arguments}


def _nanoseconds(cycle: int, timeline: Timeline) -> int:
    return round(cycle * 10**9 / timeline.report.hardware.clock_hz)


def _slices(timeline: Timeline, process: int, tracks: dict[str, int]) -> Iterator[Event]:
    for piece in timeline.slices:
        start, end = (_nanoseconds(cycle, timeline) for cycle in (piece.start, piece.end))
        unit = timeline.peak(piece.track)[1]
        work = {"first cycle": piece.start, "cycles": piece.end - piece.start}
        yield {
            "name": piece.name,
            "cat": piece.track,
            "ph": "X",
            "pid": process,
            "tid": tracks[piece.track],
            "ts": start / 1000,
            "dur": (end - start) / 1000,
            "args": work | {f"work ({unit})": piece.work} | dict(piece.notes),
        }


def _counters(timeline: Timeline, process: int) -> Iterator[Event]:
    """GB/s by tensor, and the share of the MAC lines at work, bin by bin; both end at zero."""
    edges = timeline.edges(BINS)
    cycles = (edges[1:] - edges[:-1]).astype(float)
    clock_hz = timeline.report.hardware.clock_hz
    dram = [name for name in timeline.tracks if name.startswith("DRAM ")]
    lines = [name for name in timeline.tracks if name in (DENSER, SPARSER, "MAC lines")]
    groups = {
        "DRAM GB/s": {
            name[len("DRAM ") :]: timeline.work_between(name, edges) / cycles * clock_hz / 1e9
            for name in dram
        },
        "MAC lines at work, %": {
            name: 100 * timeline.work_between(name, edges) / cycles / timeline.peak(name)[0]
            for name in lines
        },
    }
    for title, series in groups.items():
        for number, edge in enumerate(edges if series else ()):
            values = {
                name: round(float(row[number]), 6) if number < len(row) else 0.0
                for name, row in series.items()
            }
            yield {
                "name": title,
                "ph": "C",
                "pid": process,
                "tid": 0,
                "ts": _nanoseconds(int(edge), timeline) / 1000,
                "args": values,
            }
