"""`sievit compare --paper`: ViTCoD's published figures beside ours."""

from __future__ import annotations

from pathlib import Path

from ..terminal import OUT, progress_bars
from .options import hardware_named

DEFAULT_MODEL = "deit_tiny"
"""Of a mask given with --mask: the published masks are of it."""


def run_paper(
    model: str | None,
    mask: Path | None,
    hardware: str,
    *,
    seed: int = 0,
    measure: bool = True,
    json_out: Path | None = None,
    plots: Path | None = None,
    quiet: bool = False,
) -> None:
    """The study over the paper's six models with masks by chance, or over one model with
    the user's mask; tables to standard output, JSON and a picture where asked for."""
    from ..masks import AttentionMask
    from ..paper import BY_CHANCE, case_of_mask, cases_by_chance, compare_with_paper
    from ..paper_tables import paper_tables, plot_factors
    from ..result import versions, write_json

    if mask is None and model is not None:
        raise ValueError(
            f"--paper with --model {model} needs --mask FILE; without a mask it runs the paper's "
            "own six models"
        )
    with progress_bars(quiet) as progress:
        if mask is None:
            cases, masks = cases_by_chance(seed=seed), f"{BY_CHANCE}, seed {seed}"
        else:
            cases = (case_of_mask(model or DEFAULT_MODEL, AttentionMask.load(mask)),)
            masks = mask.name
        machine = hardware_named(hardware)
        study = compare_with_paper(cases, machine, masks, measure, progress)
    if json_out is not None:
        write_json(study.to_dict() | {"seed": seed, "versions": versions()}, json_out)
    if plots is not None:
        plot_factors(study, plots / "paper.png")
    if not quiet:
        OUT.print(paper_tables(study))
