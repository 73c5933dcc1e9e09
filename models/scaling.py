"""Scaling a network by a factor s of its multiply-accumulates (CVPR 2021, arXiv
2103.06877, "Fast and Accurate Model Scaling").

A kind of scaling says how s is shared between depth, width, group width and resolution;
`scale` applies it to the description of a network and rounds as the authors do; `count`
gives flops, parameters and activations of a built network by the authors' rules. flops are
multiply-accumulates, one more for each bias added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from ..workload import Conv, Elementwise, Gemm, Workload
from .costs.trace import trace
from .families.efficientnet import CONFIGS as EFFICIENTNETS
from .families.efficientnet import EfficientNet, EfficientNetConfig
from .families.regnet import CONFIGS as REGNETS
from .families.regnet import RegNet, RegNetConfig, compatible
from .families.resnet import CONFIGS as RESNETS
from .families.resnet import ResNet

Config = RegNetConfig | EfficientNetConfig
C = TypeVar("C", bound=Config)

BASES: dict[str, Config] = {**EFFICIENTNETS, **REGNETS, **RESNETS}
"""The networks that can be scaled, by registry name."""

KINDS = ("d", "w", "r", "dw", "dr", "wr", "dwr", "wg", "dwgr", "fast")
"""Kinds with a name in the paper; weighted ones such as ``d1_w8_g8_r1`` are without end."""


@dataclass(frozen=True)
class Counts:
    """flops, parameters and activations: of a network, or the factors between two."""

    flops: float
    params: float
    activations: float


@dataclass(frozen=True)
class Factors:
    """What depth, width, group width and resolution are multiplied by."""

    depth: float
    width: float
    group_width: float
    resolution: float

    def __post_init__(self) -> None:
        if min(self.depth, self.width, self.group_width, self.resolution) <= 0:
            raise ValueError(f"scaling factors must be positive, got {self}")

    def predicted(self, grouped: bool = False) -> Counts:
        """Factors of the counts of a stack of equal convolutions (section 3, table 2).

        Plain convolutions cost width**2, ``grouped`` ones width * group width.
        """
        channels = self.width * (self.group_width if grouped else self.width)
        pixels = self.resolution**2
        return Counts(
            flops=self.depth * channels * pixels,
            params=self.depth * channels,
            activations=self.depth * self.width * pixels,
        )


def scaling_factors(kind: str, s: float) -> Factors:
    """How ``kind`` shares the factor ``s``: depth * width**2 * resolution**2 = s.

    ``kind`` names what is scaled, in equal parts of s (``"d"``, ``"wr"``, ``"dwgr"``), or
    gives each part a weight (``"d1_w8_g8_r1"``); ``"fast"`` is that last one, the paper's
    choice. The group width, g, comes on top and shares nothing away: with the weight of w
    it grows as the width does. ``"g"`` alone multiplies group widths by s.
    """
    if not s > 0:
        raise ValueError(f"the scaling factor must be positive, got {s}")
    weights = _weights(kind)
    total = weights["d"] + weights["w"] + weights["r"] or weights["g"] / 2
    return Factors(
        depth=s ** (weights["d"] / total),
        width=s ** (weights["w"] / total / 2),
        group_width=s ** (weights["g"] / total / 2),
        resolution=s ** (weights["r"] / total / 2),
    )


def fast_kind(alpha: float = 0.8) -> str:
    """The kind of fast compound scaling with width exponent ``alpha`` (section 4.3).

    alpha = 1 scales the width alone, 1/3 all three alike, 0 depth and resolution.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in 0..1, got {alpha}")
    rest = (1 - alpha) / 2
    return f"d{rest!r}_w{alpha!r}_g{alpha!r}_r{rest!r}"


def _weights(kind: str) -> dict[str, float]:
    parts = {"fast": ["d1", "w8", "g8", "r1"]}.get(kind)
    if parts is None:
        plain = bool(kind) and set(kind) <= set("dwgr")
        parts = [f"{letter}1" for letter in kind] if plain else kind.split("_")
    weights = dict.fromkeys("dwgr", 0.0)
    try:
        given = {part[:1]: float(part[1:]) for part in parts}
    except ValueError:
        given = {}
    sound = len(given) == len(parts) and set(given) <= set(weights)
    if not sound or min(given.values()) < 0 or sum(given.values()) <= 0:
        raise ValueError(
            f"kind must be one of {', '.join(KINDS)}, or weights such as d1_w8_g8_r1, got {kind!r}"
        )
    return weights | given


def scale(config: C, kind: str, s: float) -> C:
    """``config`` scaled by ``s`` as ``kind`` says, rounded as the authors round.

    Depths to whole blocks, at least one; widths to multiples of 8; group widths above 2 to
    4 or a multiple of 8, then width and group width to ones that fit each other; the image
    size to a multiple of 4. Halves go to the even neighbour. A RegNet's stem and last
    convolution keep their widths, an EfficientNet's are scaled; its depthwise
    convolutions stay depthwise. The factor reached differs from ``s`` by the rounding:
    `count` tells it.
    """
    factors = scaling_factors(kind, s)
    common = {
        "depths": tuple(max(1, round(d * factors.depth)) for d in config.depths),
        "image_size": round(config.image_size * factors.resolution / 4) * 4,
    }
    widths = [_eights(w * factors.width) for w in config.widths]
    if isinstance(config, EfficientNetConfig):
        ends = {"stem_width": config.stem_width, "head_width": config.head_width}
        ends = {name: _eights(width * factors.width) for name, width in ends.items()}
        return replace(config, widths=tuple(widths), **ends, **common)
    groups = [_group_width(g * factors.group_width) for g in config.group_widths]
    fitted = [compatible(*stage) for stage in zip(widths, config.bottlenecks, groups, strict=True)]
    widths, groups = zip(*fitted, strict=True)
    return replace(config, widths=widths, group_widths=groups, **common)


def _eights(width: float) -> int:
    return max(1, round(width / 8)) * 8


def _group_width(width: float) -> int:
    whole = max(1, round(width))
    if whole <= 2:
        return whole
    return 4 if whole <= 5 else round(whole / 8) * 8


def build(config: Config, num_classes: int = 1000) -> nn.Module:
    """The network that ``config`` describes, with random weights."""
    if isinstance(config, EfficientNetConfig):
        return EfficientNet(config, num_classes)
    return (ResNet if config.pooled_stem else RegNet)(config, num_classes)


def count(config: Config) -> Counts:
    """`counts` of the network that ``config`` describes, traced as it is built."""
    with torch.device("meta"):
        model = build(config)
    return counts(trace(model, config.image_size))


def counts(workload: Workload) -> Counts:
    """flops, parameters and activations for one image, by the authors' counter.

    Activations are the outputs of convolutions, linear layers and max pools.
    """
    pools = [op for op in workload.ops if isinstance(op, Elementwise) and op.kind == "max_pool"]
    biased = [op for op in workload.ops if isinstance(op, Gemm | Conv) and op.bias]
    return Counts(
        flops=workload.macs + sum(op.elements_written for op in biased),
        params=workload.params,
        activations=workload.activations + sum(op.outputs for op in pools),
    )


@dataclass(frozen=True)
class LineFit:
    """A least-squares line y = slope * x + intercept, and Pearson's r."""

    slope: float
    intercept: float
    r: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> LineFit:
    """How well ``x`` (activations, say) predicts ``y`` (run times): section 3, figure 3.

    Raises ValueError for fewer than two points or where one of the two does not vary.
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if xs.shape != ys.shape or xs.ndim != 1 or xs.size < 2:
        raise ValueError(f"a line needs two or more points, got {xs.shape} and {ys.shape}")
    dx, dy = xs - xs.mean(), ys - ys.mean()
    if not dx.any() or not dy.any():
        raise ValueError("a line needs values that vary in both x and y")
    slope = float(dx @ dy / (dx @ dx))
    r = float(dx @ dy / np.sqrt((dx @ dx) * (dy @ dy)))
    return LineFit(slope, float(ys.mean() - slope * xs.mean()), r)
