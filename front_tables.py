"""An exploration as tables for a terminal: the front, what failed, what a field does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .accel.energy import PROFILES, area
from .accel.labels import axis_heading, axis_words, figure_shown, heading, shown
from .accel.points import OBJECTIVES, Effect, Exploration, Point, sensitivity, value_of

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
        table.add_column(axis_heading(joined), justify="right", no_wrap=True)
    for name in objectives:
        table.add_column(heading(name), justify="right", no_wrap=True)
    table.add_column("busiest in\nattention", no_wrap=True)
    for point in front[:MOST_ROWS]:
        labels = (shown(joined[0], value_of(point, joined[0])) for joined in axes.values())
        figures = (figure_shown(name, point.cost(name)) for name in objectives)
        table.add_row(*labels, *figures, str(point.figures["bottleneck"]))
    if len(front) > MOST_ROWS:
        table.caption = f"and {len(front) - MOST_ROWS} more: see the results file"
    return table


def sensitivity_table(found: Exploration, objectives: Sequence[str] = OBJECTIVES) -> Table:
    """What each value of an axis does, all else equal: median ratio, least to most."""
    table = _table("What a field does: ratio to its first value, all else equal (least - most)")
    table.add_column("field", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    for name in objectives:
        table.add_column(heading(name).replace("\n", " "), justify="right", no_wrap=True)
    by_figure = {name: sensitivity(found, name) for name in objectives}
    axes = found.axes()
    for axis, effects in by_figure[objectives[0]].items():
        for number, effect in enumerate(effects):
            cells = (_ratio(by_figure[name][axis][number]) for name in objectives)
            first = axis_words(axes[axis]) if number == 0 else ""
            table.add_row(first, shown(axes[axis][0], effect.value), *cells)
    return table


def _ratio(effect: Effect) -> str:
    if effect.least == effect.most:
        return f"{effect.median:.3f}"
    return f"{effect.median:.3f} ({effect.least:.2f} - {effect.most:.2f})"


def _notes(found: Exploration, refused: Mapping[str, str]) -> list[str]:
    points = f"{len(found.points)} points: {len(found.done)} simulated"
    if found.reused:
        points += f" ({found.reused} of them and of those that failed known from the results file)"
    lines = [f"{points}, {len(found.failed)} failed."]
    for text in list(refused.items())[:MOST_ROWS]:
        lines.append("Refused: {}: {}".format(*text))
    for text, group in _errors(found).items():
        where = _words(group[0]) + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        lines.append(f"Failed: {where}: {text}")
    if found.done:
        first = found.done[0]
        lines.append(f"Energy and area by profile {first.profile}.")
        if first.profile in PROFILES and first.hardware is not None:
            left_out = "; ".join(area(first.hardware, PROFILES[first.profile]).not_charged)
            lines.append(f"Area leaves out: {left_out}.")
    return lines


def _errors(found: Exploration) -> dict[str, list[Point]]:
    """Failed points by their error, the first ones."""
    groups: dict[str, list[Point]] = {}
    for point in found.failed:
        groups.setdefault(str(point.error), []).append(point)
    return dict(list(groups.items())[:MOST_ROWS])


def _words(point: Point) -> str:
    return ", ".join(f"{name} {value}" for name, value in point.labels.items()) or point.workload


def _table(title: str) -> Table:
    """No vertical lines, so that tables fit 80 columns."""
    return Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
