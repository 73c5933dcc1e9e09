"""`sievit simulate`: networks on simulated machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import OUT, one_line_errors
from .options import (
    DEFAULT_MODEL,
    HardwareName,
    MinKept,
    Model,
    Quiet,
    codec_shape,
    count_or_share,
    hardware_named,
)


def simulate(
    model: Model = DEFAULT_MODEL,
    mask: Annotated[
        Path | None, typer.Option(help="Mask file (.npz of ours, ViTCoD's .npy); none is dense.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Default: the model's own; give the mask's.")
    ] = None,
    latent_heads: Annotated[
        int | None, typer.Option(help="Codec with this many latent heads; default none.")
    ] = None,
    groups: Annotated[int, typer.Option(help="Blocks of a block-diagonal codec.")] = 1,
    min_kept: MinKept = "50",
    simulator: Annotated[
        list[str] | None, typer.Option(help="Machine to simulate; may be repeated.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 1,
    hardware: HardwareName = "vitcod",
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the whole report there.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Simulate a network, dense or with a saved mask, on the accelerator."""
    with one_line_errors(quiet):
        from ..machine_tables import simulation_table
        from ..masks import AttentionMask
        from ..pipeline import simulate_model

        reports = simulate_model(
            model,
            None if mask is None else AttentionMask.load(mask),
            None if latent_heads is None else codec_shape(model, latent_heads, groups),
            image_size=image_size,
            min_kept=count_or_share(min_kept),
            hardware=hardware_named(hardware),
            simulators=tuple(simulator or ("systolic", "vitcod")),
            batch=batch,
        )
        if json_out is not None:
            from ..result import write_json

            write_json({name: r.to_dict() for name, r in reports.items()}, json_out)
        if not quiet:
            OUT.print(simulation_table(reports))
