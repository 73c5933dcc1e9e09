"""Where the rooms of a level are drawn, in points.

Rows are stacked from the ground; a floor with more rooms than fit on the page has several.
The arrows into one room run together: on every row between the room and whoever imports it
they pass through one gap, so that a room has one trunk of arrows and not a line from each
of its users. Rooms and gaps are put in order along each row by the barycentre heuristic,
which moves each towards the mean place of its neighbours and keeps the order with the
fewest crossings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from .rooms import Arrow, Level

PADDING = 7.0
"""From a room's label to its walls."""
SPACE = 10.0
"""Between two rooms of a row."""
GAP_WIDTH = 7.0
SWEEPS, STRAIGHTENING = 24, 120
"""Passes over the rows to put them in order, and to place what is in order."""
STRETCH = 1.6
"""A level that is narrower than the page is drawn at most that much wider."""


@dataclass(frozen=True, order=True)
class Spot:
    """A place on a row: a room, or the gap through which the arrows to a room pass."""

    row: int
    room: str
    is_gap: bool = False


@dataclass(frozen=True)
class Segment:
    """A piece of the trunk of ``lower.room``, one row high, and the arrows in it."""

    upper: Spot
    lower: Spot
    arrows: list[Arrow] = field(default_factory=list, compare=False)

    @property
    def imports(self) -> int:
        return sum(len(arrow.imports) for arrow in self.arrows)

    @property
    def deferred(self) -> bool:
        return all(arrow.deferred for arrow in self.arrows)


@dataclass(frozen=True)
class Layout:
    """The rows of a level from the ground up, each spot's middle and width along them."""

    rows: list[list[Spot]]
    floors: list[int]  # of each row
    middle: dict[Spot, float]
    width: dict[Spot, float]
    segments: list[Segment]
    sideways: list[Arrow]  # those between rooms of a circle


def lay_out(level: Level, label_width: Callable[[str], float], page: float) -> Layout:
    """Place the rooms of ``level`` on rows between 0 and ``page``."""
    widths = {name: label_width(name) + 2 * PADDING for name in level.names}
    shelves = shelve(level, widths, page)
    row_of = {name: row for row, (_, names) in enumerate(shelves) for name in names}
    sideways = [a for a in level.arrows if level.floors[a.source] == level.floors[a.target]]
    segments = trunks([a for a in level.arrows if a not in sideways], row_of)
    spots = {Spot(row, name) for name, row in row_of.items()}
    spots |= {spot for segment in segments for spot in (segment.upper, segment.lower)}
    start = [sorted(spot for spot in spots if spot.row == row) for row in range(len(shelves))]
    rows = order(start, segments, level.circles)
    width = {spot: GAP_WIDTH if spot.is_gap else widths[spot.room] for spot in spots}
    middle = place(rows, segments, width, page)
    return Layout(rows, [floor for floor, _ in shelves], middle, width, segments, sideways)


def shelve(level: Level, widths: dict[str, float], page: float) -> list[tuple[int, list[str]]]:
    """The rows as (floor, rooms): a floor is split until its rooms leave a quarter of the
    page free, rooms whose nearest user is far above on the lower rows."""
    nearest = dict.fromkeys(level.names, -1)
    for source, target in level.pairs:
        if nearest[target] < 0 or level.floors[source] < nearest[target]:
            nearest[target] = level.floors[source]
    shelves = []
    for floor in range(level.height):
        names = [name for name in level.names if level.floors[name] == floor]
        names.sort(key=lambda name: -nearest[name] if nearest[name] >= 0 else 1)
        count = 1 + int(sum(widths[name] + SPACE for name in names) / (0.8 * page))
        cuts = [round(i * len(names) / count) for i in range(count + 1)]
        shelves += [(floor, names[a:b]) for a, b in pairwise(cuts)]
    return shelves


def trunks(arrows: Iterable[Arrow], row_of: dict[str, int]) -> list[Segment]:
    """The arrows cut at the rows that they pass, pieces of one trunk gathered."""
    found: dict[Segment, Segment] = {}
    for arrow in arrows:
        top, bottom = row_of[arrow.source], row_of[arrow.target]
        gaps = [Spot(row, arrow.target, True) for row in range(top - 1, bottom, -1)]
        spots = [Spot(top, arrow.source), *gaps, Spot(bottom, arrow.target)]
        for segment in (Segment(*pair) for pair in pairwise(spots)):
            found.setdefault(segment, segment).arrows.append(arrow)
    return sorted(found.values(), key=lambda s: (s.upper, s.lower))


Neighbours = dict[Spot, list[Spot]]


def order(
    rows: list[list[Spot]], segments: list[Segment], circles: list[tuple[str, ...]]
) -> list[list[Spot]]:
    """The rows reordered by sweeps up and down: the order with the fewest crossings."""
    above, below = neighbours(segments)
    best, fewest = rows, crossings(rows, above)
    for sweep in range(SWEEPS):
        upwards = sweep % 2 == 0
        rows = [list(row) for row in rows]
        for index in range(len(rows)) if upwards else reversed(range(len(rows))):
            by_mean(rows, index, below if upwards else above, circles)
        if (count := crossings(rows, above)) < fewest:
            best, fewest = rows, count
    return best


def neighbours(segments: list[Segment]) -> tuple[Neighbours, Neighbours]:
    """The spots one row above and one row below each spot that it is joined with."""
    above: Neighbours = {}
    below: Neighbours = {}
    for segment in segments:
        above.setdefault(segment.lower, []).append(segment.upper)
        below.setdefault(segment.upper, []).append(segment.lower)
    return above, below


def by_mean(
    rows: list[list[Spot]], index: int, joined: Neighbours, circles: list[tuple[str, ...]]
) -> None:
    """Sort one row by the mean place of each spot's neighbours; circles stay together."""
    place = {spot: (i + 0.5) / len(row) for row in rows for i, spot in enumerate(row)}
    key = {}
    for spot in rows[index]:
        near = [place[other] for other in joined.get(spot, ())] or [place[spot]]
        key[spot] = sum(near) / len(near)
    for circle in circles:
        members = [spot for spot in rows[index] if spot.room in circle and not spot.is_gap]
        mean = sum(key[spot] for spot in members) / max(len(members), 1)
        key |= dict.fromkeys(members, mean)
    rows[index].sort(key=lambda spot: key[spot])


def crossings(rows: list[list[Spot]], above: Neighbours) -> int:
    """How many pairs of segments cross."""
    place = {spot: i for row in rows for i, spot in enumerate(row)}
    count = 0
    for row in rows:
        seen: list[int] = []
        for spot in row:
            tops = [place[upper] for upper in above.get(spot, ())]
            count += sum(before > top for top in tops for before in seen)
            seen += tops
    return count


def place(
    rows: list[list[Spot]], segments: list[Segment], width: dict[Spot, float], page: float
) -> dict[Spot, float]:
    """The middle of each spot, in order and clear of the next: a room near its neighbours, a
    gap straight above the room that its trunk leads to."""
    above, below = neighbours(segments)
    middle = {}
    for row in rows:
        wanted = [page * (i + 0.5) / len(row) for i in range(len(row))]
        middle |= dict(zip(row, spread(row, wanted, width, page), strict=True))
    for sweep in range(STRAIGHTENING):
        for row in rows if sweep % 2 else reversed(rows):
            wanted = []
            for spot in row:
                near = below.get(spot, []) + ([] if spot.is_gap else users(spot, above))
                wanted.append(mean([middle[other] for other in near] or [page / 2]))
            middle |= dict(zip(row, spread(row, wanted, width, page), strict=True))
    return stretch(middle, width, page)


def users(spot: Spot, above: Neighbours) -> list[Spot]:
    """The rooms whose arrows end in ``spot``, directly or down its trunk."""
    found = []
    for upper in above.get(spot, ()):
        found += users(upper, above) if upper.is_gap else [upper]
    return found


def stretch(middle: dict[Spot, float], width: dict[Spot, float], page: float) -> dict[Spot, float]:
    """The same places centred and moved apart, as far as the page and STRETCH allow."""
    left = min(at - width[spot] / 2 for spot, at in middle.items())
    right = max(at + width[spot] / 2 for spot, at in middle.items())
    off = {spot: at - (left + right) / 2 for spot, at in middle.items()}
    room = [(page - width[spot]) / (2 * abs(by)) for spot, by in off.items() if by]
    factor = min([STRETCH, *room])
    return {spot: page / 2 + factor * by for spot, by in off.items()}


def spread(
    row: list[Spot], wanted: list[float], width: dict[Spot, float], page: float
) -> list[float]:
    """The middles nearest to those wanted (least squares) that keep the order, the space
    between spots and the margins of the page."""
    shift = [width[row[0]] / 2]
    for left, right in pairwise(row):
        space = GAP_WIDTH / 2 if left.is_gap or right.is_gap else SPACE
        shift.append(shift[-1] + (width[left] + width[right]) / 2 + space)
    last = page - shift[-1] - width[row[-1]] / 2
    if last < 0:
        raise ValueError(f"a row of {len(row)} needs {page - last:.0f} points, not {page:.0f}")
    rising = isotonic([at - by for at, by in zip(wanted, shift, strict=True)])
    return [min(max(at, 0), last) + by for at, by in zip(rising, shift, strict=True)]


def isotonic(values: list[float]) -> list[float]:
    """The rising numbers nearest to ``values``: neighbours out of order are pooled."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and mean(pools[-2]) > mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [mean(pool) for pool in pools for _ in pool]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
