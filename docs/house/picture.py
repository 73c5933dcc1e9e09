"""A level as a picture: rooms as boxes on their floors, trunks of arrows between them.

Arrows lead down, to what is imported; the trunk into a room has a colour of its own, so
that it can be followed. Only within a circle an arrow does not lead down: it and its rooms
have the colour of warning. The colours are a grey and Okabe and Ito's, which can be told
apart with any common colour blindness. Lengths are points.
"""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon, Rectangle
from matplotlib.path import Path as Curve
from matplotlib.textpath import TextPath

from .layout import Layout, Segment, Spot, lay_out
from .rooms import Arrow, Level, Room

PAGE = 640.0
"""The width of the floors; with the margins that of a page of a README."""
LEFT, RIGHT = 40.0, 16.0
ROOF, GROUND, LEGEND = 62.0, 6.0, 26.0
BOX, STOREY = 25.0, 64.0
"""The height of a room, and from one row to the next."""
HEAD = 5.0
NAME, SMALL = 8.5, 6.5
INK, PALE, BAND, PAPER = "#1f2328", "#59636e", "#f1f4f7", "#ffffff"
FOLDER, FILE, WARNING = "#cfe3f2", "#ffffff", "#D55E00"
TONES = ("#0072B2", "#009E73", "#CC79A7", "#6b7680", "#56B4E9")
FONT = "DejaVu Sans"  # comes with matplotlib


def draw(level: Level, path: Path, package: str) -> None:
    """Write the picture of ``level`` to ``path``, whose suffix names the format. The same
    level gives the same bytes."""
    widths = {room.name: label_width(room) for room in level.rooms}
    layout = lay_out(level, widths.__getitem__, PAGE)
    height = LEGEND + GROUND + STOREY * len(layout.rows) + ROOF
    figure = Figure(figsize=((LEFT + PAGE + RIGHT) / 72, height / 72), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-LEFT, PAGE + RIGHT), ylim=(0, height))
    axes.axis("off")
    draw_house(axes, level, layout, package)
    colours = tones(layout)
    for segment in layout.segments:
        draw_segment(axes, layout, segment, colours[segment.lower.room])
    for arrow in layout.sideways:
        draw_sideways(axes, layout, arrow)
    draw_rooms(axes, level, layout)
    draw_legend(axes)
    settings = {"svg.hashsalt": package, "font.family": FONT, "svg.fonttype": "path"}
    with matplotlib.rc_context(settings):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata, dpi=144)


def tones(layout: Layout) -> dict[str, str]:
    """A colour for the trunk of each room: one that no trunk beside it has, if possible."""
    beside: dict[str, list[str]] = {}
    for row in layout.rows:
        for near in range(1, 4):
            for one, other in zip(row, row[near:], strict=False):
                beside.setdefault(one.room, []).append(other.room)
                beside.setdefault(other.room, []).append(one.room)
    chosen: dict[str, str] = {}
    for spot in (spot for row in layout.rows for spot in row if not spot.is_gap):
        taken = [chosen.get(name) for name in beside.get(spot.room, ())]
        chosen[spot.room] = min(TONES, key=taken.count)
    return chosen


def size_label(room: Room) -> str:
    lines = f"{room.lines:,} lines".replace(",", "\u2009")
    return f"{room.files} files, {lines}" if room.is_folder else lines


def label_width(room: Room) -> float:
    name = text_width(room.name, NAME, "bold" if room.is_folder else "normal")
    return max(name, text_width(size_label(room), SMALL))


def text_width(text: str, size: float, weight: str = "normal") -> float:
    font = FontProperties(family=FONT, weight=weight)
    return TextPath((0, 0), text, size=size, prop=font).get_extents().width


def floor_line(row: int) -> float:
    """The height of the middle of the rooms on a row."""
    return LEGEND + GROUND + STOREY * row + STOREY / 3


def draw_house(axes: Axes, level: Level, layout: Layout, package: str) -> None:
    """The floors as bands with their numbers, and the roof with the name and the counts."""
    for floor in range(level.height):
        rows = [row for row, its in enumerate(layout.floors) if its == floor]
        bottom, top = LEGEND + GROUND + STOREY * rows[0], STOREY * len(rows)
        colour = BAND if floor % 2 == 0 else PAPER
        axes.add_patch(Rectangle((-8, bottom), PAGE + 16, top, color=colour, lw=0, zorder=0))
        write(axes, -24, floor_line(rows[0]), str(floor), NAME, PALE)
    eaves = LEGEND + GROUND + STOREY * len(layout.rows)
    corners = [(-8, eaves), (PAGE / 2, eaves + ROOF - 8), (PAGE + 8, eaves)]
    axes.add_patch(Polygon(corners, facecolor="#e4e9ee", lw=0, zorder=0))
    name = f"{package}/{level.inside}" if level.inside else package
    write(axes, PAGE / 2, eaves + 27, name, 12, INK, weight="bold")
    write(axes, PAGE / 2, eaves + 11, counts(level), NAME, INK)


def counts(level: Level) -> str:
    nouns = {
        "room": len(level.rooms),
        "floor": level.height,
        "arrow": len(level.arrows),
        "circle": len(level.circles),
    }
    said = [f"{n or 'no'} {noun}{'s' if n != 1 else ''}" for noun, n in nouns.items()]
    return ", ".join(said)


def write(axes: Axes, x: float, y: float, text: str, size: float, colour: str, **how) -> None:
    how = {"ha": "center", "va": "center_baseline", "zorder": 6, "family": FONT} | how
    axes.text(x, y, text, size=size, color=colour, **how)


def draw_rooms(axes: Axes, level: Level, layout: Layout) -> None:
    """The boxes with their names and sizes."""
    warned = {name for circle in level.circles for name in circle}
    room_of = {room.name: room for room in level.rooms}
    for spot in (spot for row in layout.rows for spot in row if not spot.is_gap):
        room, x, y = room_of[spot.room], layout.middle[spot], floor_line(spot.row)
        edge = WARNING if room.name in warned else PALE
        draw_box(axes, x, y, layout.width[spot], BOX, room.is_folder, edge)
        weight = "bold" if room.is_folder else "normal"
        write(axes, x, y + 4.5, room.name, NAME, INK, weight=weight)
        write(axes, x, y - 6.5, size_label(room), SMALL, PALE)


def draw_box(
    axes: Axes, x: float, y: float, width: float, height: float, is_folder: bool, edge: str
) -> None:
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=3"
    colour = FOLDER if is_folder else FILE
    line = {"facecolor": colour, "edgecolor": edge, "linewidth": 1.8 if edge == WARNING else 0.8}
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, zorder=5, **line))


def draw_segment(axes: Axes, layout: Layout, segment: Segment, colour: str) -> None:
    """One piece of a trunk, with an arrowhead where it reaches its room."""
    x, y = leaving(layout, segment), floor_line(segment.upper.row) - BOX / 2
    end = (layout.middle[segment.lower], floor_line(segment.lower.row) + BOX / 2)
    points = [(x, y + BOX), (x, y)] if segment.upper.is_gap else [(x, y)]
    if not segment.lower.is_gap:
        end = (end[0], end[1] + HEAD)
        draw_head(axes, *end, colour)
    bend = (y - end[1]) / 2
    points += [(x, y - bend), (end[0], end[1] + bend), end]
    codes = [Curve.MOVETO, *[Curve.LINETO] * (len(points) - 4), *[Curve.CURVE4] * 3]
    draw_line(axes, Curve(points, codes), segment.imports, segment.deferred, colour)


def leaving(layout: Layout, segment: Segment) -> float:
    """Where along the lower wall of its upper spot a segment starts: the segments that
    leave a room share the wall in the order of where they lead."""
    upper: Spot = segment.upper
    if upper.is_gap:
        return layout.middle[upper]
    ends = sorted(layout.middle[s.lower] for s in layout.segments if s.upper == upper)
    share = (ends.index(layout.middle[segment.lower]) + 0.5) / len(ends) - 0.5
    return layout.middle[upper] + share * 0.8 * layout.width[upper]


def draw_line(axes: Axes, curve: Curve, imports: int, deferred: bool, colour: str) -> None:
    width = 0.5 + 0.45 * sqrt(imports)
    dashes = (0, (3.2 / width, 1.8 / width)) if deferred else "solid"
    line = {"linewidth": width, "linestyle": dashes, "edgecolor": colour, "facecolor": "none"}
    axes.add_patch(PathPatch(curve, alpha=0.75, capstyle="butt", zorder=3, **line))


def draw_head(axes: Axes, x: float, y: float, colour: str, down: bool = True) -> None:
    """An arrowhead whose base has its middle at (x, y)."""
    tip = y - HEAD if down else y + HEAD
    corners = [(x - HEAD / 2, y), (x, tip), (x + HEAD / 2, y)]
    axes.add_patch(Polygon(corners, facecolor=colour, lw=0, zorder=4))


def draw_sideways(axes: Axes, layout: Layout, arrow: Arrow) -> None:
    """An arrow within a circle: over the rooms to the right, under them to the left."""
    spots = {spot.room: spot for spot in layout.width if not spot.is_gap}
    start, end = spots[arrow.source], spots[arrow.target]
    right = 1 if layout.middle[start] < layout.middle[end] else -1
    x = layout.middle[start] + right * 0.3 * layout.width[start]
    to = layout.middle[end] - right * 0.3 * layout.width[end]
    y, height = (floor_line(spot.row) + right * BOX / 2 for spot in (start, end))
    height += right * HEAD
    rise = right * 12
    points = [(x, y), (x, y + rise), (to, height + rise), (to, height)]
    curve = Curve(points, [Curve.MOVETO, *[Curve.CURVE4] * 3])
    draw_line(axes, curve, len(arrow.imports) + 2, arrow.deferred, WARNING)
    draw_head(axes, to, height, WARNING, down=right > 0)


def draw_legend(axes: Axes) -> None:
    """What the boxes and the lines mean."""
    y = 13.0
    x = 0.0
    for name, is_folder, edge in (
        ("folder", True, PALE),
        ("file", False, PALE),
        ("in a circle", False, WARNING),
    ):
        draw_box(axes, x + 9, y, 18, 10, is_folder, edge)
        x = explain(axes, x + 24, y, name)
    for name, imports, deferred, colour in (
        ("import", 1, False, TONES[0]),
        ("many imports", 40, False, TONES[0]),
        ("only inside functions or for types", 3, True, TONES[0]),
        ("import in a circle", 3, False, WARNING),
    ):
        curve = Curve([(x, y), (x + 22, y)])
        draw_line(axes, curve, imports, deferred, colour)
        x = explain(axes, x + 28, y, name)


def explain(axes: Axes, x: float, y: float, text: str) -> float:
    """Write an entry of the legend; returns where the next one starts."""
    write(axes, x, y, text, SMALL + 0.5, PALE, ha="left")
    return x + text_width(text, SMALL + 0.5) + 16
