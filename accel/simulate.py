"""One way in: a workload on a machine, by the name of its simulator."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ..checks import integer
from ..workload import Workload
from ..workload.masks import kept_by
from .equal_macs import with_equal_macs
from .hardware import Hardware, presets
from .report.report import Report
from .schedule import DEFAULT, Schedule, one_of
from .simulators.registry import simulator_named
from .simulators.simulator import without_parts
from .simulators.split import cycles_unsplit


def simulate(
    workload: Workload,
    hardware: Hardware = presets["vitcod"],
    simulator: str = "vitcod",
    batch: int = 1,
    *,
    schedule: Schedule = DEFAULT,
    parameters: Any = None,
) -> Report:
    """Run ``workload`` on ``hardware``.

    simulator   a name of `sievit.accel.simulators.registry.SIMULATORS`
    batch       images that go through together; weights are then loaded once
    schedule    how the hardware is used
    parameters  the simulator's own, as `sievit.accel.simulators.spatten.Spatten`; None: its
                defaults

    Warns (UserWarning) where the machine would be more than 1 % faster without global keys, which
    takes up to as long again to find; see `warn_of_split`.

    Raises ValueError for an unknown name, a batch below 1, parameters of another simulator
    and a workload that the machine cannot run (a buffer too small for one pass), naming what
    is short.
    """
    report = simulate_silently(
        workload, hardware, simulator, batch, schedule=schedule, parameters=parameters
    )
    warn_of_split(workload, report)
    return report


def simulate_silently(
    workload: Workload,
    hardware: Hardware = presets["vitcod"],
    simulator: str = "vitcod",
    batch: int = 1,
    *,
    schedule: Schedule = DEFAULT,
    parameters: Any = None,
) -> Report:
    """As `simulate`, without its warning and the time that takes: for many runs in a row."""
    entry, batch = simulator_named(simulator), check_batch(batch)
    if not isinstance(workload, Workload):
        raise ValueError(f"workload must be a Workload, got {workload!r}")
    if not isinstance(hardware, Hardware):
        raise ValueError(f"hardware must be a Hardware, got {hardware!r}")
    return entry(workload, hardware, batch, schedule, parameters)


def warn_of_split(workload: Workload, report: Report) -> None:
    """A UserWarning where the ``report`` of ``workload`` shows more than 1 % more cycles of
    attention than the machine takes without global keys: under which rule, and what to give.
    Silent for the schedule's "best", which chooses by the cycles of each head."""
    entry, schedule = simulator_named(report.simulator), report.schedule
    split = any(head.global_keys for op in report.attention for head in op.heads)
    if not entry.splits or not split or schedule.global_threshold == "best":
        return
    left, cycles = without_parts(workload, entry.without), report.attention_cycles
    each = [op.cycles for op in report.attention]
    alone = cycles_unsplit(left, report.hardware, schedule, report.batch, each)
    if alone is None:
        return
    rules = ", ".join(kept_by(rule) for rule in report.global_thresholds or (None,))
    warnings.warn(
        f"on {report.simulator} global keys ({rules}) cost time: attention takes {cycles:,} "
        f"cycles, {cycles / alone - 1:.1%} more than the {alone:,} it takes without them; give "
        'Schedule(global_threshold="best"), which `sievit simulate` and `sievit compare` take as '
        '--set global_threshold=best, or polarize the masks by "none" (--global-threshold none)',
        stacklevel=3,
    )


MOST_IMAGES = 2**20
"""Of a batch, a choice."""


def check_batch(batch: object) -> int:
    """``batch`` as an int in 1..`MOST_IMAGES`; raises ValueError for anything else."""
    return integer("batch", batch, 1, MOST_IMAGES)


EQUAL = ("lines", "macs")
"""What compared machines have as much of: MACs of the lines, on one and the same hardware, or
MACs in all, the codec's included (`sievit.accel.equal_macs`)."""


def compare(
    workload: Workload,
    hardware: Hardware = presets["vitcod"],
    simulators: tuple[str, ...] = ("systolic", "vitcod"),
    batch: int = 1,
    *,
    schedule: Schedule = DEFAULT,
    parameters: Mapping[str, Any] | None = None,
    equal: str = "lines",
    total_macs: int | None = None,
) -> tuple[Report, ...]:
    """The same workload on several machines of equal MACs, bandwidth and clock.

    parameters  simulator -> its own; those that are not named have their defaults
    equal       one of `EQUAL`. "lines": the MACs of the codec come on top of those of the lines
                where a machine uses them. "macs": none has more than ``total_macs`` in all, and
                each report's hardware says how they are cut
    total_macs  None: the MACs of the hardware's lines

    Raises ValueError for parameters of a name that is not among ``simulators``, for an unknown
    ``equal`` and for a total without "macs", else as `simulate`.
    """
    own = parameters or {}
    for name in own:
        if name not in simulators:
            raise ValueError(f"parameters are of {', '.join(simulators)}, got {name!r}")
    cuts = cuts_of(workload, hardware, simulators, batch, schedule, own, equal, total_macs)
    return tuple(
        simulate(workload, cuts[name], name, batch, schedule=schedule, parameters=own.get(name))
        for name in simulators
    )


def cuts_of(
    workload: Workload,
    hardware: Hardware,
    simulators: Iterable[str],
    batch: int,
    schedule: Schedule,
    parameters: Mapping[str, Any],
    equal: str,
    total_macs: int | None,
) -> dict[str, Hardware]:
    """The hardware of each simulator of a comparison, with the arguments of `compare`."""
    one_of("equal", equal, EQUAL)
    if equal == "lines":
        if total_macs is not None:
            raise ValueError(f"total_macs goes with equal='macs', got {total_macs!r} without it")
        return dict.fromkeys(simulators, hardware)
    check_batch(batch)
    total = hardware.macs if total_macs is None else total_macs
    return {
        name: with_equal_macs(
            workload,
            hardware,
            name,
            total,
            batch,
            schedule=schedule,
            parameters=parameters.get(name),
        )
        for name in simulators
    }
