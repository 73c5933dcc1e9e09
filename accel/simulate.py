"""One way in: a workload on a machine, by the name of its simulator."""

from __future__ import annotations

from ..workload import Workload
from .hardware import Hardware, presets
from .report.report import Report
from .simulators.registry import SIMULATORS


def simulate(
    workload: Workload,
    hardware: Hardware = presets["vitcod"],
    simulator: str = "vitcod",
    batch: int = 1,
) -> Report:
    """Run ``workload`` on ``hardware``.

    simulator  a name of `sievit.accel.simulators.SIMULATORS`
    batch      images that go through together; weights are then loaded once

    Raises ValueError for an unknown name, a batch below 1 and a workload that the machine
    cannot run (a buffer too small for one pass), naming what is short.
    """
    if simulator not in SIMULATORS:
        raise ValueError(f"simulator must be one of {', '.join(SIMULATORS)}, got {simulator!r}")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be an integer >= 1, got {batch!r}")
    return SIMULATORS[simulator](workload, hardware, batch)


def compare(
    workload: Workload,
    hardware: Hardware = presets["vitcod"],
    simulators: tuple[str, ...] = ("systolic", "vitcod"),
    batch: int = 1,
) -> tuple[Report, ...]:
    """The same workload on several machines of equal MACs, bandwidth and clock."""
    return tuple(simulate(workload, hardware, name, batch) for name in simulators)
