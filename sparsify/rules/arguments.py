"""What a mask rule is given, checked: averaged maps, and one set of arguments for all rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from ...workload import AttentionMask

Maps = Sequence[np.ndarray]
Layers = Sequence[np.ndarray]
"""Maps that `checked_maps` gave: float [heads, queries, keys] a layer."""

COMMON = ("prefix_tokens", "seed")


@dataclass(frozen=True, eq=False)
class RuleArguments:
    """Arguments of every rule of `sievit.sparsify.rules`, as in `threshold`; a rule says with
    `only` which it takes."""

    theta: float | Sequence[float] | None = None
    sparsity: float | Sequence[Sequence[float]] | None = None
    prefix_tokens: int = 1
    released: bool = False
    granularity: tuple[int, int] = (1, 1)
    like: AttentionMask | None = None
    grid: tuple[int, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "granularity", checked_block(self.granularity))

    def only(self, rule: str, one_of: tuple[str, ...], others: tuple[str, ...] = ()) -> None:
        """ValueError unless exactly one of ``one_of`` is given and nothing but ``others``."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in COMMON}
        given["granularity"] = given["granularity"] != (1, 1)
        names = [name for name, value in given.items() if value is not None and value is not False]
        if sum(name in one_of for name in names) != 1:
            wanted = " or ".join(one_of)
            raise ValueError(f"rule {rule!r} takes {wanted}, got {', '.join(names) or 'neither'}")
        stray = [name for name in names if name not in one_of + others]
        if stray:
            raise ValueError(f"rule {rule!r} takes no {', '.join(stray)}")

    @property
    def one_sparsity(self) -> float:
        """``sparsity``, where it must be one number."""
        return in_range(self.sparsity)


def checked_maps(maps: Maps, prefix_tokens: int) -> tuple[np.ndarray, ...]:
    """The maps as arrays; ValueError where they are no attention of so many prefix tokens."""
    layers = tuple(np.asarray(layer) for layer in maps)
    if not layers:
        raise ValueError("maps needs at least one layer, got none")
    for index, layer in enumerate(layers):
        if layer.ndim != 3 or not np.issubdtype(layer.dtype, np.floating):
            raise ValueError(
                f"maps[{index}] is float [heads, queries, keys], "
                f"got {layer.dtype} {list(layer.shape)}"
            )
        bad = ~np.isfinite(layer) | (layer < 0)
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"maps[{index}] holds {layer[place]} at (head, query, key) = {place}; "
                "attention is finite and not negative"
            )
        if not 0 <= prefix_tokens <= min(layer.shape[1:]):
            raise ValueError(
                f"prefix_tokens must be in 0..{min(layer.shape[1:])}, got {prefix_tokens}"
            )
    return layers


def in_range(sparsity: object) -> float:
    if not isinstance(sparsity, (int, float, np.number)) or not 0.0 <= float(sparsity) < 1.0:
        raise ValueError(f"sparsity must be one number in [0, 1), got {sparsity!r}")
    return float(sparsity)


def checked_block(granularity: tuple[int, int]) -> tuple[int, int]:
    if len(granularity) != 2 or any(not isinstance(n, int) or n < 1 for n in granularity):
        raise ValueError(
            f"granularity is (queries, keys) of a block, both at least 1, got {granularity!r}"
        )
    rows, columns = granularity
    return rows, columns


def force_prefix(keep: np.ndarray, prefix_tokens: int) -> np.ndarray:
    keep[..., :prefix_tokens, :] = True
    keep[..., :, :prefix_tokens] = True
    return keep
