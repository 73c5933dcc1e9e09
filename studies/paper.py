"""ViTCoD's headline figures beside ours: each with what it is against, and why they differ.

A case is a model with masks of one sparsity. Speed-ups are means over the cases, as the
paper's are over six models; the released script's value stands beside ours where the script
has one (it refuses masks on which it divides by zero, and models whose keys and values
differ in width). Nothing here is fitted to the published figures. The rows themselves are
made in `paper_rows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..accel import Hardware, Report, Schedule, presets
from ..accel.report.roofline import Measured
from ..accel.simulate import simulate_silently
from ..ae import latent_heads_for
from ..models import create, prefix_tokens, trace
from ..models.running import image_size_of
from ..progress import Progress, silent
from ..sparsify import synthetic_maps, threshold
from ..workload import PUBLISHED_GLOBAL_THRESHOLD, Attention, AttentionMask, HeadCodec, Workload
from .ladder import Ladder, climb
from .paper_rows import Case, Row, Run, rows
from .processors import timed_here
from .published import MODELS, SPARSITIES

SIMULATORS = ("vitcod", "vitcod_no_codec", "vitcod_no_reorder", "sanger", "spatten")

GLOBAL_SHARE = PUBLISHED_GLOBAL_THRESHOLD / 197
"""The published 50 of 197 queries as a share, for layers with other token counts."""

OWN_SIMULATORS = ("vitcod", "vitcod_no_codec", "sanger", "spatten")
OWN = replace(Schedule.published(), global_threshold=GLOBAL_SHARE)

LADDER_MODEL, LADDER_SPARSITY = "deit_tiny", 0.95
BY_CHANCE = "synthetic (sievit.sparsify.synthetic), of no trained model"


@dataclass(frozen=True)
class PaperStudy:
    """Everything that `compare_with_paper` found.

    masks    where the masks are from
    rows     in the order of the published figures; one figure may have several
    ladder   from the released script's attention cycles to the machine's; None, with the
             reason in ``ladder_note``, where the script refuses the masks
    cases    cycles of attention and network by simulator, a model and sparsity each
    movement DRAM bytes of attention by ViTCoD's own schedule, a model and sparsity each:
             without codec, on Sanger, with codec. A review has them in this order
    """

    hardware: str
    masks: str
    rows: tuple[Row, ...]
    ladder: Ladder | None
    ladder_note: str
    cases: tuple[dict[str, Any], ...]
    movement: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "hardware": self.hardware,
            "masks": self.masks,
            "figures": [row.to_dict() for row in self.rows],
            "ladder": None if self.ladder is None else self.ladder.to_dict(),
            "ladder_note": self.ladder_note,
            "cases": list(self.cases),
            "movement": list(self.movement),
        }


def cases_by_chance(
    models: Sequence[str] = MODELS, sparsities: Sequence[float] = SPARSITIES, seed: int = 0
) -> tuple[Case, ...]:
    """Each of ``models`` with masks of `synthetic_maps` at each of ``sparsities``."""
    cases = []
    for name in models:
        model = create(name)
        workload, prefix = trace(model), prefix_tokens(model)
        shapes = tuple((op.heads, op.queries, op.keys) for op in workload.attention)
        maps = synthetic_maps(shapes, prefix, seed)
        for sparsity in sparsities:
            mask = threshold(maps, sparsity=sparsity, prefix_tokens=prefix)
            cases.append(_case(name, workload, mask, sparsity))
    return tuple(cases)


def case_of_mask(model: str, mask: AttentionMask, image_size: int | None = None) -> Case:
    """One model with the user's own mask. Raises ValueError where it does not fit."""
    made = create(model)
    size = image_size_of(made, image_size)
    return _case(model, trace(made, size), mask, mask.sparsity)


def _case(name: str, workload: Workload, mask: AttentionMask, sparsity: float) -> Case:
    codecs = [_codec(op, name.startswith("levit")) for op in workload.attention]
    workload = replace(workload.with_attention(mask, codecs), name=name)
    return Case(name, sparsity, workload)


def _codec(op: Attention, levit: bool) -> HeadCodec | None:
    """The paper's: half the heads, rounded up; of LeViT's 6 heads 4, and none where it
    subsamples."""
    if op.queries != op.keys or op.heads == 1:
        return None
    return HeadCodec(op.heads, 4 if levit and op.heads == 6 else latent_heads_for(op.heads))


def compare_with_paper(
    cases: Sequence[Case],
    hardware: Hardware = presets["vitcod"],
    masks: str = BY_CHANCE,
    measure: bool = True,
    progress: Progress = silent,
) -> PaperStudy:
    """The published figures beside those of ``cases`` on ``hardware``.

    masks    says where the masks of the cases are from
    measure  also time eager attention and the network on this computer's CPU, batch 1; all
             else repeats exactly
    """
    runs = tuple(_simulated(cases, hardware, progress))
    timed = _timed(cases, progress) if measure else {}
    found = rows(runs, hardware, timed)
    ladder, note = _ladder(cases, hardware)
    cycles, moved = tuple(map(_cycles, runs)), tuple(map(_movement, runs))
    return PaperStudy(hardware.name, masks, found, ladder, note, cycles, moved)


def _simulated(cases: Sequence[Case], hardware: Hardware, progress: Progress) -> Iterator[Run]:
    dense: dict[str, Report] = {}  # masks make no difference to it
    for index, case in enumerate(cases):
        progress("simulating the paper's models", index / len(cases))
        reports = {name: simulate_silently(case.workload, hardware, name) for name in SIMULATORS}
        if case.model not in dense:
            dense[case.model] = simulate_silently(case.workload, hardware, "vitcod_dense")
        reports["vitcod_dense"] = dense[case.model]
        own = {
            name: simulate_silently(case.workload, hardware, name, schedule=OWN)
            for name in OWN_SIMULATORS
        }
        released, refusal = None, ""
        try:
            released = simulate_silently(case.workload, hardware, "released")
        except ValueError as error:
            refusal = str(error)
        yield Run(case, reports, own, released, refusal)
    progress("simulating the paper's models", 1.0)


def _timed(cases: Sequence[Case], progress: Progress) -> Mapping[str, Measured]:
    """Eager attention and network of each model here, batch 1."""
    first = {case.model: case for case in reversed(cases)}
    timed = {}
    for index, (name, case) in enumerate(first.items()):
        progress("timing this computer", index / len(first))
        model = create(name)
        size = image_size_of(model)
        (timed[name],) = timed_here(case.workload, model, image_size=size, kernels=("eager",))
    progress("timing this computer", 1.0)
    return timed


def _cycles(run: Run) -> dict[str, Any]:
    reports = dict(run.reports) | ({"released": run.released} if run.released else {})
    return {
        "model": run.case.model,
        "sparsity": run.case.sparsity,
        "attention_cycles": {name: r.attention_cycles for name, r in reports.items()},
        "network_cycles": {name: r.cycles for name, r in reports.items()},
        "released_refuses": run.refusal,
    }


def _movement(run: Run) -> dict[str, Any]:
    moved = {name: run.own[name].dram_bytes() for name in ("vitcod_no_codec", "sanger", "vitcod")}
    return {"model": run.case.model, "sparsity": run.case.sparsity, "dram_bytes": moved}


def _ladder(cases: Sequence[Case], hardware: Hardware) -> tuple[Ladder | None, str]:
    """Of the user's own mask, else a synthetic one of DeiT-Tiny at 95 %."""
    if len(cases) == 1:
        case, note = cases[0], f"{cases[0].model}, the mask of this study"
    else:
        (case,) = cases_by_chance((LADDER_MODEL,), (LADDER_SPARSITY,))
        note = (
            f"{LADDER_MODEL}, {LADDER_SPARSITY:.0%} pruned, synthetic masks; on the published "
            "masks the script prints 9,492 (give them with --mask)"
        )
    try:
        return climb(case.workload, hardware), note
    except ValueError as error:
        return None, f"{note}: {error}"
