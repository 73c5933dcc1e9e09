"""A case of the paper's study on every simulator, and a published figure beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..accel import Report
from ..workload import Workload
from .published import Published

OWN_SCHEDULE = "ViTCoD's own schedule"
"""How rows name `Schedule.published`."""


@dataclass(frozen=True)
class Case:
    """A model with masks and codecs, at the sparsity that was asked for."""

    model: str
    sparsity: float
    workload: Workload


@dataclass(frozen=True)
class Run:
    """A case on every simulator; ``released`` None, and why, where the script refuses it.

    reports  by the default schedule, by simulator
    own      by ViTCoD's own schedule (`Schedule.published`), by simulator
    """

    case: Case
    reports: Mapping[str, Report]
    own: Mapping[str, Report]
    released: Report | None
    refusal: str


@dataclass(frozen=True)
class Row:
    """A published figure beside ours.

    released   the released script's value for the same cases; None where it has none
    basis      "simulated", "modelled", "measured here", "measured log" or "profile"
    against    what ours is measured against, its batch included
    over       models and sparsities of the mean; "" where they do not matter
    why        one sentence: why ours and the published figure differ
    """

    figure: Published
    released: float | None
    ours: float
    basis: str
    against: str
    over: str
    why: str

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        plain = asdict(self)
        return plain.pop("figure") | plain


def over(runs: Sequence[Run]) -> str:
    """How a mean is named: over which models, at which sparsities."""
    models = list(dict.fromkeys(run.case.model for run in runs))
    shares = sorted({run.case.sparsity for run in runs})
    over = models[0] if len(models) == 1 else f"mean of {len(models)} models"
    at = " ".join(f"{share * 100:.3g}%" for share in shares)
    return f"{over}, {at}"
