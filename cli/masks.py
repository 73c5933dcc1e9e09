"""`sievit masks`: masks alone, by sparsity, by attention mass or by what they cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from . import options as o
from .inputs import (
    hardware_named,
    load_network,
    load_photos,
    normalization_named,
    weights_source,
)
from .settings import FROM_SETTINGS, check_hardware, pipeline_settings, values_of
from .terminal import OUT, check_writable, one_line_errors, progress_bars

if TYPE_CHECKING:
    from ..sparsify import HardwareMask


def masks(
    ctx: typer.Context,
    out: o.WrittenMask,
    model: o.Model = o.DEFAULT_MODEL,
    weights: o.Weights = None,
    images: o.Images = None,
    limit: o.Limit = 512,
    image_size: o.ImageSize = FROM_SETTINGS,
    normalization: o.PixelNormalization = "auto",
    rule: o.RuleName = FROM_SETTINGS,
    sparsity: o.Sparsity = FROM_SETTINGS,
    theta: o.Theta = FROM_SETTINGS,
    cycles: o.Cycles = FROM_SETTINGS,
    tile_entries: o.TileEntries = FROM_SETTINGS,
    tile: o.Tile = FROM_SETTINGS,
    granularity: o.Granularity = FROM_SETTINGS,
    grid: o.Grid = FROM_SETTINGS,
    hardware: o.BudgetHardware = "vitcod",
    learn_crops: o.LearnCrops = FROM_SETTINGS,
    seed: o.Seed = FROM_SETTINGS,
    quiet: o.Quiet = False,
) -> None:
    """Learn fixed attention masks from photos and save them."""
    with one_line_errors(quiet):
        from ..pipeline.codesign import learn_mask, learn_mask_within
        from .tables.codesign import mask_table

        if out.suffix != ".npz":
            raise ValueError(f"the mask file must end in .npz, got {str(out)!r}")
        source, made = weights_source(model, weights), pipeline_settings()
        values = values_of(ctx, made)
        check_hardware(ctx)
        values["normalization"] = normalization_named(normalization, source)
        settings, machine = made(**values), hardware_named(hardware)
        check_writable(out.parent)
        photos = load_photos(images, None, limit)
        network, _ = load_network(model, source)
        with progress_bars(quiet) as progress:
            if settings.has_budget:
                found = learn_mask_within(
                    network, photos, settings=settings, hardware=machine, progress=progress
                )
                mask, said = found.mask, _said(found, None if tile_entries is None else tile)
            else:
                mask, said = learn_mask(network, photos, settings, progress), None
        mask.save(out)
        if not quiet:
            OUT.print(mask_table(mask))
            if said:
                OUT.print(said, highlight=False)


def _said(found: HardwareMask, tile: int | None) -> str:
    """What the mask costs and keeps, and what to do with it."""
    kept = f"{found.mass:.1%} of the attention mass kept."
    if tile is None:
        return (
            f"{found.cost:,.0f} simulated cycles of attention, {kept} Its global keys are those "
            "that all queries keep, which the file says."
        )
    import numpy as np

    from ..sparsify.budgeted_masks import tile_area
    from ..workload import AttentionMask

    dense = tile_area(tile)(AttentionMask(tuple(np.ones_like(k) for k in found.mask.keep)))
    return f"{found.cost:,.0f} of {dense:,.0f} entries in tiles of {tile} queries, {kept}"
