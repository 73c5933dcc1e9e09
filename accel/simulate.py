"""One way in: a workload on a machine, by the name of its simulator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checks import integer
from ..workload import Workload
from .hardware import Hardware, presets
from .report.report import Report
from .schedule import DEFAULT, Schedule
from .simulators.registry import simulator_named


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

    Raises ValueError for an unknown name, a batch below 1, parameters of another simulator
    and a workload that the machine cannot run (a buffer too small for one pass), naming what
    is short.
    """
    entry, batch = simulator_named(simulator), check_batch(batch)
    if not isinstance(workload, Workload):
        raise ValueError(f"workload must be a Workload, got {workload!r}")
    if not isinstance(hardware, Hardware):
        raise ValueError(f"hardware must be a Hardware, got {hardware!r}")
    return entry(workload, hardware, batch, schedule, parameters)


MOST_IMAGES = 2**20
"""Of a batch, a choice."""


def check_batch(batch: object) -> int:
    """``batch`` as an int in 1..`MOST_IMAGES`; raises ValueError for anything else."""
    return integer("batch", batch, 1, MOST_IMAGES)


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
