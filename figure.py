"""Figures to draw on, without a window, and written whole or not at all.

matplotlib is imported when a figure is made.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def blank(width: float, height: float, dpi: float = 130) -> Figure:
    """An empty figure of that many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write ``figure`` in the format that ``path`` ends in, PNG where it ends in none."""
    with written_whole(path) as temporary:
        figure.savefig(temporary, format=temporary.suffix[1:] or "png")
