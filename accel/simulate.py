"""One way in: a workload on a machine, by the name of its simulator."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ..workload import Workload
from ..workload.masks import kept_by
from .hardware import Hardware, presets
from .report.report import Report
from .schedule import DEFAULT, Schedule
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
    entry = simulator_named(simulator)
    check_batch(batch)
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


def check_batch(batch: int) -> None:
    """Raises ValueError for anything but an integer >= 1."""
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be an integer >= 1, got {batch!r}")


def compare(
    workload: Workload,
    hardware: Hardware = presets["vitcod"],
    simulators: tuple[str, ...] = ("systolic", "vitcod"),
    batch: int = 1,
    *,
    schedule: Schedule = DEFAULT,
    parameters: Mapping[str, Any] | None = None,
) -> tuple[Report, ...]:
    """The same workload on several machines of equal MACs, bandwidth and clock.

    parameters  simulator -> its own; those that are not named have their defaults. Raises
                ValueError for a name that is not among ``simulators``, else as `simulate`.
    """
    own = parameters or {}
    for name in own:
        if name not in simulators:
            raise ValueError(f"parameters are of {', '.join(simulators)}, got {name!r}")
    return tuple(
        simulate(workload, hardware, name, batch, schedule=schedule, parameters=own.get(name))
        for name in simulators
    )
