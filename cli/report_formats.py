"""The formats in which `simulate` and `compare` print what they found.

A format is a plain function `Found` -> text, or something that rich can draw. A new one is a
function and a line of `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from .terminal import OUT

if TYPE_CHECKING:
    from rich.console import RenderableType


class Found(NamedTuple):
    """Every figure, ready for JSON, and what draws the tables of them."""

    figures: Mapping[str, Any]
    tables: Callable[[], RenderableType]


def table(found: Found) -> RenderableType:
    """Tables for a terminal of 80 columns."""
    return found.tables()


def as_json(found: Found) -> str:
    """What --json writes."""
    from ..files import json_text

    return json_text(found.figures)


FORMATS: dict[str, Callable[[Found], RenderableType]] = {"table": table, "json": as_json}


def format_named(name: str) -> Callable[[Found], RenderableType]:
    """The format of ``name``. Raises ValueError, naming those there are, for another."""
    if name not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def show(made: RenderableType) -> None:
    """Print text as it is, so that a program can read it, and draw anything else."""
    if isinstance(made, str):
        typer.echo(made)
    else:
        OUT.print(made)
