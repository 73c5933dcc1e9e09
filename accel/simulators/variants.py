"""ViTCoD's machine (`sievit.accel.vitcod`), and the variants that leave a part of the idea out."""

from __future__ import annotations

from collections.abc import Iterator

from ...workload import Workload
from ..hardware import Hardware
from ..report.report import OpCost
from ..schedule import Schedule
from ..vitcod.simulate import operations
from .simulator import NoParameters, Simulator


def stepped_costs(
    workload: Workload, hardware: Hardware, schedule: Schedule, batch: int, _own: NoParameters
) -> Iterator[OpCost]:
    """Every operation; attention stepped cycle by cycle."""
    return (cost for cost, _ in operations(workload, hardware, schedule, batch))


VITCOD = Simulator(
    "vitcod", stepped_costs, "the mask, its global keys in front, the codec", stepped=True
)
NO_CODEC = Simulator(
    "vitcod_no_codec",
    stepped_costs,
    "the mask, its global keys in front",
    without=("codec",),
    stepped=True,
)
NO_REORDER = Simulator(
    "vitcod_no_reorder",
    stepped_costs,
    "the mask and the codec; no key is global",
    without=("reorder",),
    stepped=True,
)
PLAIN = Simulator(
    "vitcod_plain", stepped_costs, "the mask alone", without=("codec", "reorder"), stepped=True
)
DENSE = Simulator(
    "vitcod_dense",
    stepped_costs,
    "the same engine, nothing pruned or compressed",
    without=("masks", "codec"),
    stepped=True,
)
