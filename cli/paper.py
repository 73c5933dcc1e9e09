"""`sievit compare --paper`: ViTCoD's published figures beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .inputs import hardware_named, mask_file
from .options import DEFAULT_MODEL
from .terminal import OUT, progress_bars

if TYPE_CHECKING:
    from ..studies.paper_rows import Case

PUBLISHED_MASKS = "deit_tiny", ((3, 197, 197),) * 12
"""The model that ViTCoD's released masks are of, and their (heads, queries, keys) a layer."""


def run_paper(
    model: str,
    mask: Path | None,
    image_size: int | None,
    hardware: str,
    seed: int,
    measure: bool,
    json_out: Path | None,
    plots: Path | None,
    quiet: bool,
) -> None:
    """The study over the paper's six models with synthetic masks, or over one model with
    the user's mask; tables to standard output, JSON and a picture where asked for."""
    from ..files import write_json
    from ..provenance import versions
    from ..studies.paper import compare_with_paper
    from .tables.paper import paper_tables, plot_factors

    machine = hardware_named(hardware)
    with progress_bars(quiet) as progress:
        cases, masks = _cases(model, mask, image_size, seed)
        study = compare_with_paper(cases, machine, masks, measure, progress)
    if json_out is not None:
        write_json(study.to_dict() | {"seed": seed, "versions": versions()}, json_out)
    if plots is not None:
        plot_factors(study, plots / "paper.png")
    if not quiet:
        OUT.print(paper_tables(study))


def _cases(
    model: str, mask: Path | None, image_size: int | None, seed: int
) -> tuple[tuple[Case, ...], str]:
    """What is studied, and where its masks are from."""
    from ..studies.paper import BY_CHANCE, case_of_mask, cases_by_chance

    if mask is None:
        if model != DEFAULT_MODEL:
            raise ValueError(
                f"--paper over {model} needs --mask FILE; without one it goes over the paper's "
                "own six models"
            )
        return cases_by_chance(seed=seed), f"{BY_CHANCE}, seed {seed}"
    saved = mask_file(mask)
    keep, image_size = saved.mask, image_size or saved.image_size
    if model == DEFAULT_MODEL and keep.shapes == PUBLISHED_MASKS[1]:
        model = PUBLISHED_MASKS[0]
    return (case_of_mask(model, keep, image_size),), f"{mask.name}, {keep.sparsity:.1%} pruned"
