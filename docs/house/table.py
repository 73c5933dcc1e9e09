"""The counts of a house as text: one row for the whole and one for every folder in it."""

from __future__ import annotations

from pathlib import PurePosixPath

from .imports import Checkout
from .rooms import Level, file_circles, read_level

COLUMNS = ("level", "rooms", "floors", "arrows", "deferred", "circles", "files", "longest file")


def table(checkout: Checkout) -> str:
    """The counts of every level, then the largest folder, the longest file and the circles.

    ``arrows`` counts every pair of rooms, ``deferred`` those of them whose imports all stand
    inside functions or under TYPE_CHECKING; ``files`` those directly in the folder.
    """
    rows = [COLUMNS, *(row(checkout, folder) for folder in folders(checkout))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [aligned(cells, widths) for cells in rows]
    return "\n".join([*lines, "", *summary(checkout)]) + "\n"


def folders(checkout: Checkout) -> list[str]:
    """Every folder with Python files other than its door; "" is the whole house."""
    rooms = [name for name in checkout.lines if not name.endswith("__init__.py")]
    return sorted({folder_of(name) for name in rooms} | {""})


def folder_of(name: str) -> str:
    return PurePosixPath(name).parent.as_posix().removeprefix(".")


def files_of(checkout: Checkout, folder: str) -> list[str]:
    """The files directly in a folder, its door among them."""
    return [name for name in checkout.lines if folder_of(name) == folder]


def row(checkout: Checkout, folder: str) -> tuple[str, ...]:
    level = read_level(checkout, folder)
    deferred = sum(arrow.deferred for arrow in level.arrows)
    counts = (len(level.rooms), level.height, len(level.arrows), deferred, len(level.circles))
    files = files_of(checkout, folder)
    longest = max(files, key=checkout.lines.__getitem__)
    name = f"{longest.rpartition('/')[2]} {checkout.lines[longest]}"
    return (f"{folder}/" if folder else "house", *map(str, counts), str(len(files)), name)


def aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    first, *numbers, last = cells
    middle = [text.rjust(width) for text, width in zip(numbers, widths[1:-1], strict=True)]
    return "  ".join([first.ljust(widths[0]), *middle, last])


def summary(checkout: Checkout) -> list[str]:
    sizes = {folder: len(files_of(checkout, folder)) for folder in folders(checkout)}
    largest = max(sizes, key=sizes.__getitem__)
    longest = max(checkout.lines, key=checkout.lines.__getitem__)
    return [
        f"{len(checkout.lines)} files, {sum(checkout.lines.values())} lines",
        f"largest folder: {largest or 'the root'}, {sizes[largest]} files",
        f"longest file: {longest}, {checkout.lines[longest]} lines",
        f"circles among rooms: {listed(level_circles(checkout))}",
        f"circles among files: {listed(file_circles(checkout))}",
    ]


def level_circles(checkout: Checkout) -> list[tuple[str, ...]]:
    levels: list[Level] = [read_level(checkout, folder) for folder in folders(checkout)]
    return [
        tuple(f"{level.inside}/{name}".removeprefix("/") for name in circle)
        for level in levels
        for circle in level.circles
    ]


def listed(circles: list[tuple[str, ...]]) -> str:
    return "; ".join(" - ".join(circle) for circle in circles) or "none"
