"""How all tables of the command look: a bold title to the left, no vertical lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def titled(title: str, **layout: Any) -> Table:
    """An empty table; ``layout`` is what rich's `Table` takes beyond these."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        **layout,
    )


def worded_table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    """Columns of words, then columns of figures."""
    table = titled(title, collapse_padding=True)
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
