"""What the registry knows of a machine: all that is said of it anywhere, in one entry.

A new machine is a file beside this one that ends in its `Simulator`, and a line in
`registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from ...workload import Attention, Op, Workload, polarize_head
from ..hardware import Hardware, schedule_of
from ..report.report import OpCost, Report
from ..schedule import DEFAULT, Schedule

PARTS = ("masks", "codec", "reorder")
"""Of a workload's attention, what a simulator may leave out."""


@dataclass(frozen=True)
class NoParameters:
    """Of a simulator without parameters of its own."""


@dataclass(frozen=True)
class Simulator:
    """A machine by name.

    name         as `simulate` and the command take it
    costs        (workload, hardware, schedule, batch, parameters) -> cost of each operation
    words        what it does, in a few words, for tables
    without      names of `PARTS` that are taken from the workload before it runs
    parameters   its own, at their defaults: a frozen dataclass that checks itself
    stepped      attention goes through the compiled engine of `sievit.accel.vitcod`: it has
                 stalls, heads and a time line

    Raises ValueError for an unknown part and for parameters that are no dataclass.
    """

    name: str
    costs: Callable[[Workload, Hardware, Schedule, int, Any], Iterable[OpCost]]
    words: str
    without: tuple[str, ...] = ()
    parameters: Any = NoParameters()
    stepped: bool = False

    def __post_init__(self) -> None:
        for part in self.without:
            if part not in PARTS:
                raise ValueError(f"{self.name}: without is of {', '.join(PARTS)}, got {part!r}")
        if isinstance(self.parameters, type) or not is_dataclass(self.parameters):
            raise ValueError(f"{self.name}: parameters are a dataclass, got {self.parameters!r}")

    def __call__(
        self,
        workload: Workload,
        hardware: Hardware,
        batch: int = 1,
        schedule: Schedule = DEFAULT,
        parameters: Any = None,
    ) -> Report:
        """Run ``workload``. parameters: None for the simulator's own defaults.

        Raises ValueError for parameters of another simulator, and what the simulator raises.
        """
        schedule, used = self.scheduled(schedule_of(hardware, schedule)), self.checked(parameters)
        left = without_parts(workload, self.without)
        made = tuple(self.costs(left, hardware, schedule, batch, used))
        return self.report(workload, hardware, batch, schedule, parameters, made)

    def scheduled(self, schedule: Schedule) -> Schedule:
        """``schedule``, which makes no key global where the simulator leaves that out."""
        if "reorder" not in self.without or schedule.global_threshold is None:
            return schedule
        return replace(schedule, global_threshold="none")

    @property
    def splits(self) -> bool:
        """Whether global keys go to an engine of their own, stepped cycle by cycle."""
        return self.stepped and not {"masks", "reorder"} & set(self.without)

    def report(
        self,
        workload: Workload,
        hardware: Hardware,
        batch: int,
        schedule: Schedule,
        parameters: Any,
        costs: tuple[OpCost, ...],
    ) -> Report:
        """The report of ``costs``."""
        unknown = tuple(cost.name for cost in costs if cost.kind == "unknown")
        return Report(
            self.name, workload.name, hardware, batch, costs, unknown, schedule, parameters
        )

    def checked(self, parameters: Any) -> Any:
        """``parameters``, or the defaults for None; raises ValueError for another class's."""
        if parameters is None:
            return self.parameters
        if type(parameters) is not type(self.parameters):
            known = ", ".join(item.name for item in fields(self.parameters)) or "none"
            raise ValueError(
                f"parameters of {self.name!r} are a {type(self.parameters).__name__} "
                f"({known}), got {parameters!r}"
            )
        return parameters


def without_parts(workload: Workload, parts: Iterable[str]) -> Workload:
    """``workload`` with ``parts`` (of `PARTS`) of its attention taken away."""
    parts = frozenset(parts)

    def change(op: Op) -> Op:
        if not isinstance(op, Attention):
            return op
        kept = None if "masks" in parts else op.masks
        if kept is not None and "reorder" in parts:
            made = {id(m): polarize_head(m.dense(), "none") for m in kept}
            kept = tuple(made[id(m)] for m in kept)
        return replace(op, masks=kept, codec=None if "codec" in parts else op.codec)

    return replace(workload, ops=tuple(change(op) for op in workload.ops)) if parts else workload
