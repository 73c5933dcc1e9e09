"""An exploration as tables for a terminal: the front, what failed, what a field does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...accel.explore.labels import axis_heading, axis_words, figure_shown, heading, shown
from ...accel.explore.points import (
    OBJECTIVES,
    DesignPoint,
    Effect,
    Exploration,
    sensitivity,
    value_of,
)
from ...accel.report.energy import PROFILES, area
from .layout import titled

MOST_ROWS = 24
"""Of a front and of errors: the rest is counted, and is in the files."""


def exploration_tables(
    found: Exploration, objectives: Sequence[str], refused: Mapping[str, str], about: str
) -> RenderableType:
    """The front, what each axis does, what failed, and what the figures leave out."""
    parts: list[RenderableType] = [Text(), Text(about), Text()]
    if found.done:
        parts += [front_table(found, objectives), Text()]
        parts += [sensitivity_table(found, objectives), Text()] if found.axes() else []
    parts += [Text(line) for line in _notes(found, refused)]
    return Group(*parts, Text())


def front_table(found: Exploration, objectives: Sequence[str] = OBJECTIVES) -> Table:
    """The Pareto front over ``objectives``: a column an axis, then the figures."""
    front, axes = found.front(objectives), found.axes()
    table = _table(
        f"Front: {len(front)} of {len(found.done)} points, which none beats in "
        f"{', '.join(heading(name).replace(chr(10), ' ') for name in objectives)} at once"
    )
    for joined in axes.values():
        table.add_column(axis_heading(joined), justify="right", overflow="fold")
    for name in objectives:
        table.add_column(heading(name).split("\n")[-1], justify="right", overflow="fold")
    table.add_column("busiest in\nattention", overflow="fold")
    for point in front[:MOST_ROWS]:
        labels = (shown(joined[0], value_of(point, joined[0])) for joined in axes.values())
        figures = (figure_shown(name, point.cost(name)) for name in objectives)
        table.add_row(*labels, *figures, str(point.figures["bottleneck"]))
    if len(front) > MOST_ROWS:
        table.caption = f"and {len(front) - MOST_ROWS} more: see the results file"
    return table


def sensitivity_table(found: Exploration, objectives: Sequence[str] = OBJECTIVES) -> Table:
    """What each value of an axis does, all else equal: median ratio, least to most."""
    table = _table("What a field does, all else equal: median ratio to its first value, least-most")
    table.add_column("field", overflow="fold")
    table.add_column("value", justify="right", overflow="fold")
    for name in objectives:
        table.add_column(heading(name), justify="right", overflow="fold")
    by_figure = {name: sensitivity(found, name) for name in objectives}
    axes = found.axes()
    for axis, effects in by_figure[objectives[0]].items():
        for number, effect in enumerate(effects):
            cells = (_ratio(by_figure[name][axis][number]) for name in objectives)
            first = axis_words(axes[axis]) if number == 0 else ""
            table.add_row(first, shown(axes[axis][0], effect.value), *cells)
    return table


def _ratio(effect: Effect) -> str:
    median, least, most = (f"{x:.2f}" for x in (effect.median, effect.least, effect.most))
    return median if least == most else f"{median}  {least}-{most}"


def _notes(found: Exploration, refused: Mapping[str, str]) -> list[str]:
    points = f"{len(found.points)} points: {len(found.done)} simulated"
    if found.reused:
        points += f" ({found.reused} of them and of those that failed known from the results file)"
    lines = [f"{points}, {len(found.failed)} failed."]
    for text in list(refused.items())[:MOST_ROWS]:
        lines.append("Refused: {}: {}".format(*text))
    for text, group in _errors(found).items():
        lines.append(f"Failed: {_words(group)}: {text}")
    if found.done:
        first = found.done[0]
        lines.append(f"Energy and area by profile {first.profile}.")
        lines += _codec_macs(found)
        if first.profile in PROFILES and first.hardware is not None:
            left_out = "; ".join(area(first.hardware, PROFILES[first.profile]).not_charged)
            lines.append(f"Area leaves out: {left_out}.")
    return lines


def _codec_macs(found: Exploration) -> list[str]:
    """The MACs that stand beside those of the lines."""
    machines = [point.hardware for point in found.done if point.hardware is not None]
    counts = sorted({machine.codec_macs for machine in machines})
    if not any(counts):
        return []
    words = " or ".join(map(str, counts))
    return [
        f"Beside the MACs of its lines each machine has {words} of the codec; the area has them "
        "with and without a codec in the workload."
    ]


def _errors(found: Exploration) -> dict[str, list[DesignPoint]]:
    """Failed points by their error, the first ones."""
    groups: dict[str, list[DesignPoint]] = {}
    for point in found.failed:
        groups.setdefault(str(point.error), []).append(point)
    return dict(list(groups.items())[:MOST_ROWS])


def _words(group: Sequence[DesignPoint]) -> str:
    """What the points of a group share, and how many they are."""
    first, *others = group
    shared = [
        f"{axis_words([name])} {shown(name, value)}"
        for name, value in first.labels.items()
        if all(name in point.labels and point.labels[name] == value for point in others)
    ]
    words = ", ".join(shared) or first.workload
    return f"{words} ({len(group)} points)" if others else words


def _table(title: str) -> Table:
    """Little room between columns, so that many fit 80 characters."""
    return titled(title, padding=(0, 1, 0, 0))
