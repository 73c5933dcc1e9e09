"""InternImage's stacking rules, search space and scaling rule (CVPR 2023, arXiv 2211.05778,
section 3.2 and appendix).

The rules leave four numbers free: the first stage's channels C1, the channels of a group
C', the depth L1 of stages 1, 2 and 4, and the depth L3 of stage 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from .internimage import BlockStyle, InternImage

BUDGET_PARAMS = 30e6
"""Parameters that every variant of the published search has, about."""


@dataclass(frozen=True)
class Variant:
    """Stage i has C1 * 2**(i-1) channels in groups of C'; L1 = L2 = L4 <= L3."""

    channels: int
    group_channels: int
    outer_depth: int
    third_depth: int

    def __post_init__(self) -> None:
        if min(self.channels, self.group_channels, self.outer_depth) < 1:
            raise ValueError(f"channels and depths must be positive, got {self}")
        if self.channels % self.group_channels:
            raise ValueError(f"C1 = {self.channels} is not divisible by C' = {self.group_channels}")
        if self.third_depth < self.outer_depth:
            raise ValueError(f"L3 = {self.third_depth} must not be below L1 = {self.outer_depth}")

    @property
    def depths(self) -> tuple[int, int, int, int]:
        return (self.outer_depth, self.outer_depth, self.third_depth, self.outer_depth)

    @property
    def depth(self) -> int:
        """Blocks in all, the D of the scaling rule."""
        return 3 * self.outer_depth + self.third_depth

    @property
    def groups(self) -> tuple[int, ...]:
        """Groups of the operator, by stage."""
        return tuple(self.channels * 2**stage // self.group_channels for stage in range(4))

    def build(self, style: BlockStyle | None = None, num_classes: int = 1000) -> InternImage:
        """The network; pre-norm blocks without layer scale by default, as InternImage-T."""
        return InternImage(
            self.channels,
            self.depths,
            style or BlockStyle(),
            group_channels=self.group_channels,
            num_classes=num_classes,
        )

    @property
    def params(self) -> int:
        """Parameters of the default network, counted on the built one."""
        return _params(self)


@cache
def _params(variant: Variant) -> int:
    with torch.device("meta"):
        model: nn.Module = variant.build()
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Missing:
    """A combination of the search space that gives no variant, and why."""

    channels: int
    group_channels: int
    outer_depth: int
    reason: str


@dataclass(frozen=True)
class SearchSpace:
    """The variants of a search, and the combinations that gave none."""

    variants: tuple[Variant, ...]
    missing: tuple[Missing, ...]


def search_space(
    budget_params: float = BUDGET_PARAMS,
    channels: Sequence[int] = (48, 64, 80),
    group_channels: Sequence[int] = (16, 32),
    outer_depths: Sequence[int] = (1, 2, 3, 4, 5),
    tolerance: float = 0.1,
) -> SearchSpace:
    """All combinations, L3 chosen so that the parameters come nearest to the budget.

    The published space is the default: 30 combinations. A combination whose C' does not
    divide C1, or whose nearest parameter count is off by more than ``tolerance`` of the
    budget, is `Missing`.
    """
    variants, missing = [], []
    for group in group_channels:
        for first in channels:
            for outer in outer_depths:
                try:
                    variants.append(_at_budget(first, group, outer, budget_params, tolerance))
                except ValueError as reason:
                    missing.append(Missing(first, group, outer, str(reason)))
    return SearchSpace(tuple(variants), tuple(missing))


def _at_budget(channels: int, group: int, outer: int, budget: float, tolerance: float) -> Variant:
    least = Variant(channels, group, outer, outer)
    block = replace(least, third_depth=outer + 1).params - least.params
    more = max(0, round((budget - least.params) / block))
    variant = replace(least, third_depth=outer + more)
    if abs(variant.params - budget) > tolerance * budget:
        raise ValueError(
            f"with L1 = {outer} the nearest to {budget / 1e6:.1f}M parameters is L3 = "
            f"{variant.third_depth} with {variant.params / 1e6:.1f}M"
        )
    return variant


@dataclass(frozen=True)
class CompoundRule:
    """Depth times alpha**phi, width times beta**phi; parameters about double with phi.

    ``doubling`` = alpha * beta**1.99 is near 2 for the pairs of the paper's table 8, the
    best of which is the default.
    """

    alpha: float = 1.09
    beta: float = 1.36

    def __post_init__(self) -> None:
        if self.alpha < 1 or self.beta < 1:
            raise ValueError(f"alpha and beta must be at least 1, got {self.alpha}, {self.beta}")

    @property
    def doubling(self) -> float:
        return self.alpha * self.beta**1.99

    def depth(self, base: Variant, phi: float) -> float:
        """D' = alpha**phi * D, not rounded."""
        return self.alpha**phi * base.depth

    def width(self, base: Variant, phi: float) -> float:
        """C1' = beta**phi * C1, not rounded."""
        return self.beta**phi * base.channels

    def phi_of_width(self, base: Variant, channels: int) -> float:
        """The phi at which the rule gives ``channels``."""
        return math.log(channels / base.channels) / math.log(self.beta)


def scaled(base: Variant, phi: float, rule: CompoundRule | None = None) -> Variant:
    """``base`` scaled by the rule: C1 to the nearest multiple of C', D to whole blocks.

    L1 keeps its share of the depth and L3 takes the rest: the paper does not say how depth
    is shared out, and its named models beyond T follow no rule exactly (they are a table in
    `sievit.models.families.internimage`).
    """
    rule = rule or CompoundRule()
    depth = rule.depth(base, phi)
    outer = max(1, round(base.outer_depth * depth / base.depth))
    groups = max(1, round(rule.width(base, phi) / base.group_channels))
    return Variant(
        channels=groups * base.group_channels,
        group_channels=base.group_channels,
        outer_depth=outer,
        third_depth=max(outer, round(depth) - 3 * outer),
    )


TINY = Variant(channels=64, group_channels=16, outer_depth=4, third_depth=18)
"""InternImage-T, the best of the published search."""
