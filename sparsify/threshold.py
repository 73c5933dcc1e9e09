"""Averaged attention maps -> a fixed mask, by one of the `rules` (ViTCoD, HPCA 2023,
section IV-B, "prune").

A map is a float array [heads, queries, keys], non-negative, its rows softmax averages
that sum to one. Every rule answers, for a whole model, which entries stay.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..moved import old_names
from ..workload import AttentionMask
from .rules import rule_named
from .rules.arguments import Maps, RuleArguments, checked_maps


def threshold(
    maps: Maps,
    rule: str = "information",
    *,
    theta: float | Sequence[float] | None = None,
    sparsity: float | Sequence[Sequence[float]] | None = None,
    prefix_tokens: int = 1,
    released: bool = False,
    granularity: tuple[int, int] = (1, 1),
    like: AttentionMask | None = None,
    grid: tuple[int, int] | None = None,
    seed: int = 0,
) -> AttentionMask:
    """Learn a fixed mask from averaged attention maps.

    maps           float [heads, queries, keys] a layer; a torch tensor is taken as it is
    rule           "information": a row's entries, largest first, until their sum reaches
                   ``theta``; with ``sparsity`` instead, the one theta whose mask comes
                   nearest to it. "ratio": the same share of every row. "quota": as
                   "information", with ``sparsity[layer][head]`` or one for each head.
                   "random", "window": controls that ignore the maps' values.
                   `sievit.sparsify.rules.RULES` holds them
    theta          in (0, 1]; one number or one a layer
    sparsity       in [0, 1): pruned over all entries, forced ones included
    prefix_tokens  rows and columns of the first tokens (CLS, distillation, registers)
                   that are kept whole; 0 for models without
    released       keep one entry a row more, as ViTCoD's published script does
    granularity    (queries, keys) of a block that is kept or pruned as one by
                   "information"; see
                   `sievit.sparsify.rules.information.mass_before`
    like           the mask whose row counts "random" and "window" take over; "window" takes
                   a sparsity or theta of "information" too
    grid, seed     token grid (rows, columns) of "window", square by default; seed of "random"

    Raises ValueError, naming the value, for maps with NaN or negative entries and for
    arguments outside their range or that the rule does not take.
    """
    layers, made = checked_maps(maps, prefix_tokens), rule_named(rule)
    return made(
        layers,
        RuleArguments(theta, sparsity, prefix_tokens, released, granularity, like, grid, seed),
    )


__getattr__ = old_names(__name__)
