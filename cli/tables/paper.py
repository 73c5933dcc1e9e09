"""The published figures beside ours, and the ladder, for a terminal and as a picture.

Returns renderables, prints nothing; the picture is a PNG, written whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import groupby

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ...figure import blank, save
from ...studies.ladder import Ladder
from ...studies.paper import PaperStudy
from ...studies.paper_rows import Row
from ...studies.published import Published
from .layout import titled

MARKS = {"paper": "", "notes": "*", "unconfirmed": "?"}
LEGEND = (
    "Published: as the paper prints it; * as notes on the paper have it; ? unconfirmed. "
    "Script: what the released script's cycles would make of the same comparison, - where it "
    "has none. Modelled: a roofline, each kernel at the chip's peaks. (For the Xavier NX the "
    "paper has 160.6x in another place.)"
)


def paper_tables(study: PaperStudy) -> RenderableType:
    """Every figure with its rows and reasons, then the ladder."""
    parts: list[RenderableType] = [
        Text(),
        Text(f"ViTCoD's published figures and ours on '{study.hardware}'", style="bold"),
        Text(f"Masks: {study.masks}"),
        Text(),
        figures_table(study.rows),
        Text(),
        Text(LEGEND),
        Text(),
    ]
    parts += [movement_table(study), Text()]
    if study.ladder is None:
        parts.append(Text(f"No ladder. {study.ladder_note}"))
    else:
        parts.append(ladder_table(study.ladder, study.ladder_note))
    return Group(*parts)


WIDTHS = (11, 9, 10)
"""Of the columns of figures: published, script, ours."""


def figures_table(rows: tuple[Row, ...]) -> RenderableType:
    """A heading a figure, under it a row a comparison, and the reason below its rows."""
    parts: list[RenderableType] = [
        _line("figure, and what ours is against", "published", "script", "ours", "underline")
    ]
    for _, group in groupby(rows, key=lambda row: row.figure):
        members = list(group)
        figure, first = members[0].figure, members[0].over
        shared = all(row.over == first for row in members)
        text = f"{figure.text} ({first})" if shared and first else figure.text
        parts += [Text(), _line(text, _published(figure), "", "", "bold")]
        for why, same in groupby(members, key=lambda row: row.why):
            for row in same:
                against = f"{row.against}; {row.over}" if row.over and not shared else row.against
                cells = (_value(row.released, figure.unit), _value(row.ours, figure.unit))
                parts.append(_line(against, "", *cells, indent=2))
            parts.append(Padding(Text(why, style="dim italic"), (0, 0, 0, 4)))
    return Group(*parts)


def _line(
    text: str, published: str, script: str, ours: str, style: str = "", indent: int = 0
) -> RenderableType:
    """One line of the figures: tables of a line each, so that reasons have the whole width."""
    table = Table.grid(expand=True)
    table.add_column(ratio=1)
    for width in WIDTHS:
        table.add_column(width=width, justify="right", no_wrap=True)
    cells = (Text(cell, style=style) for cell in (published, script, ours))
    table.add_row(Padding(Text(text, style=style), (0, 0, 0, indent)), *cells)
    return table


def _published(figure: Published) -> str:
    return _value(figure.value, figure.unit) + MARKS[figure.read]


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "share":
        return f"{value:.1%}"
    if unit == "x":
        return f"{value:#.3g}x" if value < 100 else f"{value:.0f}x"
    return f"{value:.3g} {unit}"


def movement_table(study: PaperStudy) -> Table:
    """Bytes of attention by ViTCoD's own schedule, and whether the published order holds."""
    table = titled("DRAM kB of attention by ViTCoD's own schedule")
    table.add_column("model", no_wrap=True)
    headings = ("sparsity", "no codec", "Sanger", "codec")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("no codec > Sanger > codec", no_wrap=True)
    for case in study.movement:
        sizes = [case["dram_bytes"][name] for name in ("vitcod_no_codec", "sanger", "vitcod")]
        holds = sizes[0] > sizes[1] > sizes[2]
        cells = (f"{size / 1e3:,.0f}" for size in sizes)
        table.add_row(
            case["model"], f"{case['sparsity']:.1%}", *cells, "holds" if holds else "does not hold"
        )
    return table


def ladder_table(ladder: Ladder, note: str) -> Table:
    """Rung by rung: what is changed, the cycles, the difference."""
    title = f"From the released script's attention cycles to ours: {note}"
    table = titled(title)
    table.add_column("cause", overflow="fold")
    table.add_column("by", no_wrap=True)
    for heading in ("cycles", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rung, step in zip(ladder.rungs, ladder.differences, strict=True):
        table.add_row(rung.cause, rung.model, f"{rung.cycles:,}", f"{step:+,}")
    return table


COLOURS = {
    "published": "#1a202c",
    "script": "#a0aec0",
    "simulated": "#2b6cb0",
    "modelled": "#63b3ed",
    "measured here": "#dd6b20",
    "measured log": "#ecc94b",
    "profile": "#48bb78",
}


def plot_factors(study: PaperStudy, path: str | os.PathLike[str]) -> None:
    """Published factors and ours as bars on a logarithmic axis; means over sparsities are
    left to the table."""
    from matplotlib.patches import Patch

    bars = list(_bars(study.rows))
    figure = blank(9, 1.2 + 0.2 * len(bars), dpi=120)
    axes = figure.subplots()
    for place, (_, value, kind) in enumerate(bars):
        if value is not None:
            axes.barh(place, value, color=COLOURS[kind], height=0.8)
            axes.text(
                value * 1.04,
                place,
                f"{value:#.3g}x" if value < 100 else f"{value:.0f}x",
                va="center",
                fontsize=7,
            )
    named = [(place, name) for place, (name, _, _) in enumerate(bars) if name]
    axes.set_yticks([place for place, _ in named], [name for _, name in named], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(right=2.2 * max(value for _, value, _ in bars if value is not None))
    axes.axvline(1, color="#718096", linewidth=0.8)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlabel("times faster (energy: times less)")
    figure.suptitle(f"ViTCoD's published factors and ours\nmasks: {study.masks}", fontsize=9)
    kinds = dict.fromkeys(kind for _, value, kind in bars if value is not None)
    legend = [Patch(color=COLOURS[kind], label=kind) for kind in kinds]
    axes.legend(handles=legend, loc="lower right", fontsize=8)
    save(figure, path)


def _bars(rows: tuple[Row, ...]) -> Iterator[tuple[str, float | None, str]]:
    """(label, factor, kind), a gap after each figure: the published one, the script's
    largest and ours."""
    factors = [r for r in rows if r.figure.unit == "x" and not r.figure.key.endswith("_mean")]
    for _, group in groupby(factors, key=lambda row: row.figure):
        members = list(group)
        yield members[0].figure.text, members[0].figure.value, "published"
        for row in members:
            if row.released is not None:
                yield "", row.released, "script"
            yield "", row.ours, row.basis
        yield "", None, "published"
