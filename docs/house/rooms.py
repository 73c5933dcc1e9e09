"""One level of a house: its rooms, the arrows between them, the circles and the floors.

The rooms of a level are the folders and the single files that lie directly in one folder;
its ``__init__.py`` is the door and no room. An arrow goes from a room to a room that it
imports, whatever the number of imports. Rooms that import each other, directly or through
others, form a circle and share a floor. A room stands one floor above the highest room
that it imports, so the number of floors is the longest path once circles are drawn
together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from .imports import Checkout, Import


@dataclass(frozen=True)
class Room:
    """A folder (its name ends in a slash) or a file, with the size of what is in it."""

    name: str
    files: int
    lines: int

    @property
    def is_folder(self) -> bool:
        return self.name.endswith("/")


@dataclass(frozen=True)
class Arrow:
    """All the imports from one room to another."""

    source: str
    target: str
    imports: tuple[Import, ...]

    @property
    def deferred(self) -> bool:
        """Whether every import waits for a function's call or for a type checker."""
        return all(one.kind != "plain" for one in self.imports)


@dataclass(frozen=True)
class Level:
    """The rooms of the folder ``inside`` ("" is the whole house) and their arrows."""

    inside: str
    rooms: tuple[Room, ...]
    arrows: tuple[Arrow, ...]

    @cached_property
    def circles(self) -> list[tuple[str, ...]]:
        return circles(self.names, self.pairs)

    @cached_property
    def floors(self) -> dict[str, int]:
        return floors(self.names, self.pairs)

    @property
    def names(self) -> list[str]:
        return [room.name for room in self.rooms]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [(arrow.source, arrow.target) for arrow in self.arrows]

    @property
    def height(self) -> int:
        """The number of floors."""
        return 1 + max(self.floors.values(), default=-1)


def read_level(checkout: Checkout, inside: str = "") -> Level:
    """The level of the folder ``inside``, such as ``accel``."""
    sizes: dict[str, list[int]] = {}
    for name, lines in checkout.lines.items():
        if room := room_of(name, inside):
            sizes.setdefault(room, []).append(lines)
    if not sizes:
        raise ValueError(f"{inside!r} is no folder with Python files in this checkout")
    rooms = tuple(Room(name, len(lines), sum(lines)) for name, lines in sorted(sizes.items()))
    return Level(inside, rooms, arrows(checkout.imports, inside))


def room_of(name: str, inside: str) -> str | None:
    """The room that a file lies in; None for the door and for files outside."""
    prefix = f"{inside}/" if inside else ""
    first, slash, _ = name.removeprefix(prefix).partition("/")
    if not name.startswith(prefix) or first == "__init__.py":
        return None
    return first + slash if slash else first.removesuffix(".py")


def arrows(imports: Iterable[Import], inside: str) -> tuple[Arrow, ...]:
    """The imports between rooms of one level, gathered by pair of rooms."""
    found: dict[tuple[str, str], list[Import]] = {}
    for one in imports:
        source, target = room_of(one.source, inside), room_of(one.target, inside)
        if source and target and source != target:
            found.setdefault((source, target), []).append(one)
    return tuple(Arrow(*pair, tuple(gathered)) for pair, gathered in sorted(found.items()))


def file_circles(checkout: Checkout) -> list[tuple[str, ...]]:
    """The circles among the files, of imports of every kind."""
    return circles(checkout.lines, [(one.source, one.target) for one in checkout.imports])


def circles(nodes: Iterable[str], pairs: list[tuple[str, str]]) -> list[tuple[str, ...]]:
    """The groups of two or more nodes that reach each other, each in order of name."""
    reach = reachable(nodes, pairs)
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in reach}
    return sorted(group for group in groups if len(group) > 1)


def reachable(nodes: Iterable[str], pairs: list[tuple[str, str]]) -> dict[str, set[str]]:
    """For each node all that one or more arrows lead to."""
    following: dict[str, set[str]] = {node: set() for node in nodes}
    for source, target in pairs:
        following[source].add(target)
    reach = {}
    for node in following:
        seen, waiting = set(), list(following[node])
        while waiting:
            if (here := waiting.pop()) not in seen:
                seen.add(here)
                waiting += following[here]
        reach[node] = seen
    return reach


def floors(nodes: Iterable[str], pairs: list[tuple[str, str]]) -> dict[str, int]:
    """The floor of each node, 0 on the ground: the most arrows on a way down from it, where
    a circle counts as one node."""
    group = {node: (node,) for node in nodes}
    group |= {node: circle for circle in circles(nodes, pairs) for node in circle}
    below: dict[tuple[str, ...], set[tuple[str, ...]]] = {g: set() for g in group.values()}
    for source, target in pairs:
        if group[source] != group[target]:
            below[group[source]].add(group[target])
    height: dict[tuple[str, ...], int] = {}

    def measure(node: tuple[str, ...]) -> int:
        if node not in height:
            height[node] = 1 + max(map(measure, below[node]), default=-1)
        return height[node]

    return {node: measure(members) for node, members in group.items()}
