"""The mask rules by name: one dict of functions (checked maps, arguments) -> mask.

A new rule is a file with such a function and a line here; `threshold`, the pipeline and the
command then know it.
"""

from __future__ import annotations

from collections.abc import Callable

from ...workload import AttentionMask
from ..controls import random_mask, window_mask
from .arguments import Layers, RuleArguments
from .information import information, quota
from .ratio import ratio

Rule = Callable[[Layers, RuleArguments], AttentionMask]


def random(layers: Layers, asked: RuleArguments) -> AttentionMask:
    """A control: random keys, uniform at a ``sparsity`` or as many a row as ``like``."""
    asked.only("random", ("sparsity", "like"))
    return random_mask(
        tuple(layer.shape for layer in layers),
        sparsity=None if asked.sparsity is None else asked.one_sparsity,
        like=asked.like,
        prefix_tokens=asked.prefix_tokens,
        seed=asked.seed,
    )


def window(layers: Layers, asked: RuleArguments) -> AttentionMask:
    """A control: the nearest keys on the token ``grid``, as many a row as ``like`` keeps, or
    as "information" keeps at ``sparsity`` or ``theta``. A square grid need not be named."""
    asked.only("window", ("like", "sparsity", "theta"), ("grid",))
    like = asked.like
    if like is None:
        prefix = asked.prefix_tokens
        plain = RuleArguments(asked.theta, asked.sparsity, prefix)
        like = information(layers, plain)
    return window_mask(like, asked.grid or _square(like, asked.prefix_tokens), asked.prefix_tokens)


def _square(like: AttentionMask, prefix: int) -> tuple[int, int]:
    tokens = like.shapes[0][2] - prefix
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(
            f"rule 'window' needs grid=(rows, columns) of the patch tokens: {tokens} are no square"
        )
    return side, side


RULES: dict[str, Rule] = {
    "information": information,
    "ratio": ratio,
    "quota": quota,
    "random": random,
    "window": window,
}


def rule_named(name: str) -> Rule:
    """ValueError, with the names there are, for another."""
    if name not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {name!r}")
    return RULES[name]
