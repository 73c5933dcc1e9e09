"""Pictures of an exploration: the front among all points, what each field does. PNG, whole or
not at all; matplotlib is imported when a picture is drawn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...figure import blank, save
from .labels import axis_words, heading, scale, shown
from .points import OBJECTIVES, DesignPoint, Exploration, sensitivity, value_of

GRAY, BLUE = "#a0aec0", "#2b6cb0"
PLACES = ((-12, 4), (6, 4), (6, -12), (-12, -12))
"""Of the numbers beside points: points that lie close get numbers on other sides."""

SERIES = ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5")


def plot_front(
    found: Exploration,
    path: str | os.PathLike[str],
    objectives: Sequence[str] = OBJECTIVES,
    title: str = "",
) -> None:
    """Every point by its first objective and each other one; the front is coloured, the best
    point in each objective is numbered and named below."""
    if len(objectives) < 2:
        raise ValueError(f"a front is drawn over two objectives or more, got {list(objectives)}")
    figure, axes = _figure(1, len(objectives) - 1, (5.2 * (len(objectives) - 1), 4.8))
    first, front = objectives[0], found.front(objectives)
    best = {name: min(front, key=lambda point: point.cost(name)) for name in objectives}
    for panel, name in zip(axes.flat, objectives[1:], strict=True):
        for points, style in ((found.done, {"color": GRAY, "s": 12}), (front, {"color": BLUE, "s": 30, "zorder": 3})):  # fmt: skip # noqa: E501
            label = f"{len(points)} on the front" if points is front else f"{len(points)} points"
            panel.scatter(
                *(_values(points, which) for which in (first, name)), label=label, **style
            )
        for number, point in enumerate(_distinct(best), 1):
            panel.annotate(
                str(number),
                [point.cost(which) * scale(which) for which in (first, name)],
                xytext=PLACES[number % len(PLACES)],
                textcoords="offset points",
                weight="bold",
                zorder=4,
            )
        panel.margins(0.1)
        panel.set_xlabel(heading(first).replace("\n", " "))
        panel.set_ylabel(heading(name).replace("\n", " "))
        panel.legend(frameon=False, fontsize=8)
    _name(figure, title, _best_words(found, best))
    save(figure, path)


def plot_sensitivity(
    found: Exploration, path: str | os.PathLike[str], objectives: Sequence[str] = OBJECTIVES
) -> None:
    """A panel an axis: the ratio of each objective to its figure at the axis's first value,
    all other axes equal; median, and least to most as bars."""
    by_figure = {name: sensitivity(found, name) for name in objectives}
    names = list(by_figure[objectives[0]])
    if not names:
        raise ValueError("nothing was varied with all else equal: there is no effect to draw")
    joined = found.axes()
    across = min(len(names), 3)
    down = -(-len(names) // across)
    figure, axes = _figure(down, across, (3.9 * across + 0.6, 3.1 * down + 0.9))
    for panel, axis in zip(axes.flat, names, strict=False):
        for shift, (name, effects) in enumerate(by_figure.items()):
            _effect(
                panel, effects[axis], shift - (len(objectives) - 1) / 2, name, SERIES[shift % 4]
            )
        values = [shown(joined[axis][0], effect.value) for effect in by_figure[objectives[0]][axis]]
        panel.set_xticks(range(len(values)), values)
        panel.axhline(1.0, color=GRAY, lw=0.8, zorder=0)
        panel.set_xlabel(axis_words(joined[axis]))
    for panel in axes.flat[len(names) :]:
        panel.set_visible(False)
    for row in axes:
        row[0].set_ylabel("ratio to the first value")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=4, frameon=False, fontsize=9)  # fmt: skip
    figure.suptitle("What each field does, all else equal (bars: least to most)", fontsize=11)
    save(figure, path)


def _effect(panel: Any, effects: Sequence[Any], shift: float, name: str, colour: str) -> None:
    places = np.arange(len(effects)) + 0.12 * shift
    middle = np.array([effect.median for effect in effects])
    low = middle - [effect.least for effect in effects]
    high = np.array([effect.most for effect in effects]) - middle
    panel.errorbar(places, middle, [low, high], color=colour, marker="o", ms=4, lw=1.2,
                   capsize=2, label=heading(name).replace("\n", " "))  # fmt: skip


def _best_words(found: Exploration, best: dict[str, DesignPoint]) -> str:
    """One line for each numbered point: what it is best in, and its values."""
    axes, lines = found.axes(), []
    for number, point in enumerate(_distinct(best), 1):
        names = [heading(name).replace("\n", " ") for name in best if best[name] is point]
        values = (
            f"{axis_words(joined)} {shown(joined[0], value_of(point, joined[0]))}"
            for joined in axes.values()
        )
        lines.append(f"{number} least {' and '.join(names)}: {', '.join(values) or 'the only one'}")
    return "\n".join(lines)


def _distinct(best: dict[str, DesignPoint]) -> list[DesignPoint]:
    """Each point once, in the order of the objectives."""
    return list({id(point): point for point in best.values()}.values())


def _values(points: Sequence[DesignPoint], name: str) -> list[float]:
    return [point.cost(name) * scale(name) for point in points]


def _name(figure: Any, title: str, below: str) -> None:
    figure.suptitle(title, fontsize=10, wrap=True)
    figure.supxlabel(below, fontsize=8, x=0.02, ha="left", wrap=True)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, np.ndarray]:
    figure = blank(*size)
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes
