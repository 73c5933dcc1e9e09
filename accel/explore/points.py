"""What an exploration found: points, the front among them, and what a field does to them.

Latency is in seconds of the whole batch, energy in picojoules under a named profile, area
in square millimetres.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..hardware import Hardware, as_dict
from ..schedule import DEFAULT, Schedule
from .pareto import pareto_front

OBJECTIVES = ("seconds", "energy_pj", "area_mm2")
"""What a front trades off by default: the whole network's latency and energy, and area."""

ATTENTION_OBJECTIVES = ("attention_seconds", "attention_energy_pj", "area_mm2")
"""Likewise for attention alone."""


@dataclass(frozen=True)
class DesignPoint:
    """One workload on one machine: its ``figures``, or the ``error`` that it ended in.

    labels    what distinguishes it: the workload's labels, the fields of hardware, schedule
              and simulator changed
    hardware  None where the changes make no machine
    figures   cycles, seconds, energy_pj, dram_bytes, each also for attention alone
              ("attention_cycles", ...); macs; utilization and bottleneck of attention;
              area_mm2, sram_bytes. None where the simulator or the profile has no figure
    """

    workload: str
    labels: Mapping[str, Any]
    hardware: Hardware | None
    simulator: str
    batch: int
    profile: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    schedule: Schedule = DEFAULT
    parameters: Any = None

    def cost(self, name: str) -> float:
        """A figure that is a number. Raises ValueError, naming those there are."""
        value = self.figures.get(name)
        if isinstance(value, (int, float)):
            return value
        known = [key for key, value in self.figures.items() if isinstance(value, (int, float))]
        raise ValueError(
            f"{self.workload} has no figure {name!r} under simulator {self.simulator!r} and "
            f"profile {self.profile!r}; it has {', '.join(known) or 'none'}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        made = asdict(self)
        if self.hardware is not None:
            made["hardware"] = as_dict(self.hardware, self.schedule)
        return made


@dataclass(frozen=True)
class Exploration:
    """All points, workload after workload, machines in the order in which they were given.

    reused  points whose result was in the file already
    """

    points: tuple[DesignPoint, ...]
    reused: int = 0

    @property
    def done(self) -> tuple[DesignPoint, ...]:
        """The points that have figures."""
        return tuple(point for point in self.points if point.error is None)

    @property
    def failed(self) -> tuple[DesignPoint, ...]:
        """The points that ended in an error."""
        return tuple(point for point in self.points if point.error is not None)

    def front(self, objectives: Iterable[str] = OBJECTIVES) -> tuple[DesignPoint, ...]:
        """The points that no other beats in all ``objectives`` (names of figures, less is
        better), the best in the first objective first. Raises ValueError for a figure that
        a point does not have."""
        names, done = tuple(objectives), self.done
        if not done:
            return ()
        costs = np.array([[point.cost(name) for name in names] for point in done])
        chosen = np.flatnonzero(pareto_front(costs))
        order = chosen[np.lexsort(costs[chosen].T[::-1])]
        return tuple(done[index] for index in order)

    def given(self, objectives: Iterable[str]) -> tuple[str, ...]:
        """Those of ``objectives`` that all points have a figure for."""
        names = tuple(objectives)
        return tuple(n for n in names if all(p.figures.get(n) is not None for p in self.done))

    def axes(self) -> dict[str, tuple[str, ...]]:
        """What was varied: name of an axis -> the labels that changed together along it."""
        done = self.done
        names = dict.fromkeys(name for point in done for name in point.labels)
        together: dict[tuple[int, ...], list[str]] = {}
        for name in names:
            values: dict[Any, int] = {}
            changes = tuple(values.setdefault(value_of(point, name), len(values)) for point in done)
            if len(values) > 1 and name != "name":
                together.setdefault(changes, []).append(name)
        return {_shared_name(joined): tuple(joined) for joined in together.values()}


class Effect(NamedTuple):
    """What a value of an axis does to a figure: the ratio to the axis's first value, all
    other axes equal. ``pairs`` is how many such comparisons there are."""

    value: Any
    least: float
    median: float
    most: float
    pairs: int


def sensitivity(found: Exploration, figure: str) -> dict[str, tuple[Effect, ...]]:
    """Axis -> the effect of each of its values on ``figure``, smallest value first.

    Points are compared only with points that agree on every other axis. A value without
    such a partner is left out, and so is an axis without any.
    """
    axes = found.axes()
    place = {name: [_first(point, joined) for point in found.done] for name, joined in axes.items()}
    out = {}
    for name in axes:
        others = [place[other] for other in axes if other != name]
        groups: dict[tuple, dict[Any, float]] = {}
        for index, point in enumerate(found.done):
            group = groups.setdefault(tuple(values[index] for values in others), {})
            group[place[name][index]] = point.cost(figure)
        effects = _effects(groups.values(), sorted(set(place[name]), key=_order))
        if len(effects) > 1:
            out[name] = effects
    return out


def _effects(groups: Iterable[Mapping[Any, float]], values: list[Any]) -> tuple[Effect, ...]:
    made = []
    for value in values:
        pairs = [g[value] / g[values[0]] for g in groups if value in g and values[0] in g]
        if pairs:
            made.append(Effect(value, min(pairs), float(np.median(pairs)), max(pairs), len(pairs)))
    return tuple(made)


def value_of(point: DesignPoint, name: str) -> Any:
    """A label's value; for a point that does not have it, that of its machine, schedule or
    simulator ("spatten.lsb_share")."""
    if name in point.labels:
        return point.labels[name]
    simulator, _, own = name.rpartition(".")
    if own and simulator == point.simulator:
        return getattr(point.parameters, own, None)
    return getattr(point.hardware, name, getattr(point.schedule, name, None))


def _first(point: DesignPoint, joined: tuple[str, ...]) -> Any:
    return value_of(point, joined[0])


def _order(value: Any) -> tuple[int, Any]:
    """None, then numbers, then words."""
    if value is None:
        return (0, 0)
    return (1, value) if isinstance(value, (int, float)) else (2, str(value))


def _shared_name(joined: list[str]) -> str:
    """Of fields that change together: "q, k, v_buffer_bytes" for three buffers."""
    heads, tails = zip(*(name.partition("_")[::2] for name in joined), strict=True)
    if len(joined) > 1 and len(set(tails)) == 1 and tails[0]:
        return f"{', '.join(heads)}_{tails[0]}"
    return " + ".join(joined)
