"""Pictures of costs: networks side by side, or the layers of one. PNG, whole or not at all.

matplotlib is imported when a picture is drawn. Each function writes ``path`` and returns
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ...figure import blank, save
from .complexity import Complexity, LayerComplexity

BLUE, ORANGE, GRAY = "#2b6cb0", "#dd6b20", "#a0aec0"


def plot_costs(costs: Sequence[Complexity], path: str | os.PathLike[str]) -> None:
    """MACs, parameters, activations and bytes of several networks, on logarithmic axes."""
    figure = blank(11, 1.6 + 0.19 * len(costs), dpi=120)
    panels = figure.subplots(1, 4, sharey=True)
    totals = [cost.total for cost in costs]
    dots = (
        ("MACs", {"all": [c.macs for c in costs], "without attention products": [
            c.macs_without_attention for c in costs]}),
        ("parameters", {"": [c.params for c in costs]}),
        ("activations", {"": [c.activations for c in costs]}),
        ("bytes accessed", {"no cache": [t.bytes_no_cache for t in totals],
                            "unlimited cache": [t.bytes_unlimited_cache for t in totals]}),
    )  # fmt: skip
    for panel, (label, series) in zip(panels, dots, strict=True):
        for (name, values), colour in zip(series.items(), (BLUE, ORANGE), strict=False):
            panel.plot(values, range(len(costs)), "o", ms=4, color=colour, label=name)
        panel.set_xscale("log")
        panel.set_xlabel(label)
        panel.grid(axis="y", color="#e2e8f0", lw=0.6)
        panel.margins(y=0.5 / len(costs))
        panel.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            panel.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    panels[0].set_yticks(range(len(costs)), [cost.name for cost in costs])
    panels[0].invert_yaxis()
    save(figure, path)


def plot_layers(cost: Complexity, path: str | os.PathLike[str]) -> None:
    """MACs, bytes and arithmetic intensity of one network, layer by layer in order."""
    layers = [layer for layer in cost.layers if layer.bytes_unlimited_cache]
    figure = blank(9, 6, dpi=120)
    panels = figure.subplots(3, 1, sharex=True)
    places = range(len(layers))
    panels[0].bar(places, [layer.macs / 1e6 for layer in layers], 1.0, color=_colours(layers))
    panels[1].bar(places, [_moved(layer) / 1e6 for layer in layers], 1.0, color=_colours(layers))
    panels[2].bar(places, [layer.intensity for layer in layers], 1.0, color=_colours(layers))
    cache = "unlimited cache" if cost.cache_bytes is None else f"cache of {cost.cache_bytes:,} B"
    labels = ("MACs (1e6)", f"megabytes,\n{cache}", "MACs a byte")
    for panel, label in zip(panels, labels, strict=True):
        panel.set_ylabel(label)
        panel.spines[["top", "right"]].set_visible(False)
    panels[2].set_xlabel("operation, in order")
    handles = [panels[0].bar([0], [0], color=colour) for colour in (BLUE, ORANGE, GRAY)]
    names = ["convolution, linear", "attention", "no products"]
    panels[0].legend(handles, names, frameon=False, fontsize=8, ncols=3)
    panels[0].set_title(f"{cost.name}: {cost.macs / 1e9:.2f}e9 MACs, one image", fontsize=10)
    save(figure, path)


def _colours(layers: Sequence[LayerComplexity]) -> list[str]:
    return [ORANGE if x.attention_macs else BLUE if x.macs else GRAY for x in layers]


def _moved(layer: LayerComplexity) -> int:
    cached = layer.bytes_with_cache
    return layer.bytes_unlimited_cache if cached is None else cached
