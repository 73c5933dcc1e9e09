"""Pictures of masks and of what they leave: written as PNG, whole or not at all.

matplotlib is imported when a picture is drawn. Each function takes plain data, writes
``path`` and returns nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from ..figure import blank, save
from ..workload import AttentionMask, PolarizedMask
from .fidelity import Fidelity

BLUE, ORANGE, GRAY, GREEN = "#2b6cb0", "#dd6b20", "#a0aec0", "#2f855a"


def plot_head(head: PolarizedMask, title: str, path: str | os.PathLike[str]) -> None:
    """One head's mask as learned, and reordered with its dense block marked."""
    figure, (left, right) = _figure(1, 2, size=(8.4, 4.4))
    left.imshow(~head.dense(), cmap="gray", interpolation="nearest")
    left.set_title(f"{title}, as learned")
    picture = np.where(head.reordered(), 0.0, 1.0)
    right.imshow(picture, cmap="gray", interpolation="nearest", vmin=0, vmax=1)
    right.axvspan(-0.5, head.num_global - 0.5, color=ORANGE, alpha=0.35, lw=0)
    sparse_share = head.sparser_kept / max(1, head.queries * (head.keys - head.num_global))
    right.set_title(
        f"polarized: {head.num_global} global keys (orange),\nrest {sparse_share:.1%} full"
    )
    for axes in (left, right):
        axes.set_xlabel("key")
        axes.set_ylabel("query")
    save(figure, path)


def plot_sparsity(mask: AttentionMask, polarized, path: str | os.PathLike[str]) -> None:
    """Sparsity and number of global keys of every head, layers down, heads across."""
    figure, (left, right) = _figure(1, 2, size=(8.4, 4.8))
    _heat(left, mask.sparsity_by_head(), "sparsity", "{:.0%}", vmax=1.0)
    counts = tuple(np.array([float(h.num_global) for h in layer]) for layer in polarized)
    _heat(right, counts, "global keys", "{:.0f}", vmax=max(1.0, *(c.max() for c in counts)))
    save(figure, path)


def plot_fidelity(
    rows: Mapping[str, Fidelity], path: str | os.PathLike[str], title: str = ""
) -> None:
    """Patch and CLS cosine to the dense model, one bar a variant; controls in gray."""
    names = list(rows)
    figure, (axes,) = _figure(1, 1, size=(7.2, 0.9 + 0.55 * len(names)))
    places = np.arange(len(names))[::-1]
    series: Sequence[tuple[str, str, float]] = (("patch_cosine", "patch tokens", 0.18),)
    if all(row.cls_cosine is not None for row in rows.values()):
        series = (("cls_cosine", "CLS token", -0.18), *series)
    for field, label, offset in series:
        values = [getattr(rows[name], field) for name in names]
        strong, weak = (BLUE, GRAY) if field == "patch_cosine" else ("#90cdf4", "#cbd5e0")
        colours = [weak if name.startswith("random") else strong for name in names]
        bars = axes.barh(places + offset, values, height=0.34, color=colours, label=label)
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.set_yticks(places, names)
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("mean cosine to the dense model\n(upper bar: patch tokens, lower: CLS token)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _heat(axes, rows: Sequence[np.ndarray], label: str, text: str, vmax: float) -> None:
    width = max(len(row) for row in rows)
    grid = np.full((len(rows), width), np.nan)
    for index, row in enumerate(rows):
        grid[index, : len(row)] = row
    image = axes.imshow(grid, cmap="viridis", vmin=0.0, vmax=vmax, aspect="auto")
    if width <= 8:
        for (layer, head), value in np.ndenumerate(grid):
            if not np.isnan(value):
                colour = "white" if value < 0.6 * vmax else "black"
                place = {"ha": "center", "va": "center", "fontsize": 7}
                axes.text(head, layer, text.format(value), color=colour, **place)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(width))
    axes.set_yticks(range(len(rows)))
    axes.set_title(label)
    axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)


def _figure(rows: int, columns: int, size: tuple[float, float]):
    figure = blank(*size)
    return figure, np.atleast_1d(figure.subplots(rows, columns))
