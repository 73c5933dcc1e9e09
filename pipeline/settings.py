"""Everything that decides the figures of a co-design run, besides model and photos."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from ..accel.kernels.plan import TILES
from ..images import IMAGENET, Normalization
from ..models.training.recipe import Recipe
from ..moved import old_arguments
from ..sparsify.rules import rule_named
from ..workload import GLOBAL_THRESHOLD, GlobalThreshold
from ..workload.masks import check_global_threshold

BUDGETS = ("cycles", "tile_entries")
"""Fields of `MaskSettings`: what a mask may cost."""
AMOUNTS = ("sparsity", "theta", *BUDGETS)
"""Fields of `MaskSettings` of which one says how much a mask keeps."""

ALL = "all"
"""Global are the keys that every query keeps."""

FEW_PHOTOS = 100
"""Below this many, photos are too few to judge a model by."""


@old_arguments("min_kept")
@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """How a mask is made of averaged attention, and polarized; checks itself.

    rule               one of `sievit.sparsify.RULES`
    sparsity           share of entries to prune, in [0, 1)
    theta              attention mass that a row keeps, in (0, 1]; "information" and "window"
                       alone take it
    granularity        (queries, keys) of a block that is kept or pruned as one
    grid               token grid of "window"; None is a square
    global_threshold   a key is global when more than this share of the queries keeps it; an
                       int is a count of queries (ViTCoD: 50 of 197), see `GlobalThreshold`
    cycles             a budget: the most attention within so many simulated cycles, whose
                       keys are global when every query keeps them: `global_threshold` is
                       then "all"
    tile_entries       a budget: the most attention within so many entries that a GPU kernel
                       computes which gathers keys for ``tile`` queries at once, neighbours
                       in the token grid where that is square

    Exactly one of sparsity, theta, cycles and tile_entries is given. A budget has a rule of
    its own (`sievit.sparsify.budgeted_masks`), so goes with no other, no granularity and no
    grid.
    """

    rule: str = "information"
    sparsity: float | None = 0.9
    theta: float | None = None
    cycles: float | None = None
    tile_entries: float | None = None
    tile: int = 32
    granularity: tuple[int, int] = (1, 1)
    grid: tuple[int, int] | None = None
    global_threshold: GlobalThreshold = GLOBAL_THRESHOLD

    def __post_init__(self) -> None:
        rule_named(self.rule)
        check_global_threshold(self.global_threshold)
        if len(self.granularity) != 2 or min(self.granularity) < 1:
            raise ValueError(
                f"granularity is (queries, keys), each at least 1, got {self.granularity}"
            )
        if self.sparsity is not None and not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if self.theta is not None and not 0.0 < self.theta <= 1.0:
            raise ValueError(f"theta must be in (0, 1], got {self.theta}")
        amounts = {name: getattr(self, name) for name in AMOUNTS}
        given = [f"{name}={value}" for name, value in amounts.items() if value is not None]
        if len(given) != 1:
            got = ", ".join(given) or "none of them"
            raise ValueError(f"give exactly one of {', '.join(AMOUNTS)}, got {got}")
        self._check_budget()
        if self.grid is not None and self.rule != "window":
            raise ValueError(f"grid={self.grid} goes with the rule 'window', got {self.rule!r}")

    def _check_budget(self) -> None:
        if self.tile not in TILES:
            raise ValueError(f"tile must be one of {', '.join(map(str, TILES))}, got {self.tile}")
        for name in BUDGETS:
            budget = getattr(self, name)
            if budget is None:
                continue
            if budget <= 0:
                raise ValueError(f"{name} must be above 0, got {budget}")
            for other in ("rule", "granularity", "grid"):
                value = getattr(self, other)
                if value != getattr(MaskSettings, other):
                    raise ValueError(f"a budget ({name}) takes no {other}, got {value!r}")
        if self.cycles is not None:
            if self.global_threshold not in (ALL, MaskSettings.global_threshold):
                raise ValueError(
                    f"a budget of cycles makes masks whose global_threshold is {ALL!r}, got "
                    f"{self.global_threshold!r}"
                )
            object.__setattr__(self, "global_threshold", ALL)

    @property
    def has_budget(self) -> bool:
        """Whether the mask is chosen by what its entries cost."""
        return any(getattr(self, name) is not None for name in BUDGETS)

    def with_amount(self, **given: float | None) -> Self:
        """These settings with another of `AMOUNTS` in place of the one they have."""
        changes: dict[str, Any] = {**dict.fromkeys(AMOUNTS), **given}
        return replace(self, **changes)


@old_arguments("turn")
@dataclass(frozen=True, kw_only=True)
class CodecSettings:
    """Shape and start of the codecs over heads; checks itself.

    latent_heads       heads after compression; None is half, rounded up (ViTCoD)
    groups             blocks of a block-diagonal codec
    rotation           make the free change of basis before the codec is fitted
    """

    latent_heads: int | None = None
    groups: int = 1
    rotation: bool = True

    def __post_init__(self) -> None:
        _at_least("groups", self.groups, 1)
        if self.latent_heads is not None:
            _at_least("latent_heads", self.latent_heads, 1)


@old_arguments("min_kept", "turn")
@dataclass(frozen=True, kw_only=True)
class Settings(MaskSettings, CodecSettings):
    """Settings of `sievit.pipeline.codesign.codesign`, with those of `MaskSettings` and
    `CodecSettings`; checks itself.

    image_size         side of the crops, pixels
    normalization      of the pixels, as the model was trained with
    codec              compress Q and K over the heads
    learn_crops        crops for the averaged attention and the codec's closed form
    judge_crops        crops that fidelity is judged on
    codec_steps        training steps of the codec; 0 keeps the closed form
    recovery_steps     training steps of the recovery; 0 for none
    recovery_seconds   replaces the steps; how many fit then depends on the computer
    recovery_rate      learning rate; None is `rate_for` the number of photos
    batch_size         crops in a batch, for training, judging and measuring
    int8               judge the recovered model in the machine's integers too
    measure            time dense attention on this computer
    """

    image_size: int = 224
    normalization: Normalization = IMAGENET
    codec: bool = True
    learn_crops: int = 64
    judge_crops: int = 32
    codec_steps: int = 8
    recovery_steps: int = 24
    recovery_seconds: float | None = None
    recovery_rate: float | None = None
    batch_size: int = 8
    seed: int = 0
    int8: bool = True
    measure: bool = True

    def __post_init__(self) -> None:
        MaskSettings.__post_init__(self)
        CodecSettings.__post_init__(self)
        for name in ("image_size", "learn_crops", "judge_crops", "batch_size"):
            _at_least(name, getattr(self, name), 1)
        for name in ("codec_steps", "recovery_steps", "seed"):
            _at_least(name, getattr(self, name), 0)
        if self.recovery_seconds is not None and self.recovery_seconds <= 0:
            raise ValueError(f"recovery_seconds must be above 0, got {self.recovery_seconds}")
        if self.recovery_rate is not None and self.recovery_rate <= 0:
            raise ValueError(f"recovery_rate must be above 0, got {self.recovery_rate}")


def rate_for(photos: int) -> float:
    """A learning rate for a recovery on so many photos; on many, the recipe's own.

    A handful is soon learned by heart. Learned from four of the sample photos and judged on
    a fifth, twice, by final tokens alone (`TokenLoss` of training), 24 steps at
    1e-5 gain .030 and .070 patch cosine, at 2e-5 .051 and .100; but on the three photos that
    judge a co-design run 2e-5 loses .008 and 1e-5 gains: the lower rate was kept with that in
    view.
    """
    return Recipe.learning_rate if photos >= FEW_PHOTOS else 1e-5


def _at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
