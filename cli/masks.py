"""`sievit masks`: masks alone, by sparsity, by attention mass or by what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    DEFAULT_MODEL,
    Granularity,
    HardwareName,
    Images,
    ImageSize,
    LearnCrops,
    Limit,
    Model,
    PixelNormalization,
    Quiet,
    RuleName,
    Seed,
    Sparsity,
    Theta,
    Weights,
    block_shape,
    hardware_named,
    load_network,
    load_photos,
    normalization_named,
    weights_source,
)
from .terminal import OUT, check_writable, one_line_errors, progress_bars

if TYPE_CHECKING:
    from ..sparsify import HardwareMask


def masks(
    out: Annotated[Path, typer.Argument(help="Mask file to write, .npz.")],
    model: Model = DEFAULT_MODEL,
    weights: Weights = None,
    images: Images = None,
    limit: Limit = 512,
    image_size: ImageSize = 224,
    normalization: PixelNormalization = "auto",
    rule: RuleName = None,
    sparsity: Sparsity = None,
    theta: Theta = None,
    granularity: Granularity = "1x1",
    cycles: Annotated[
        float | None,
        typer.Option(help="Most attention within so many simulated cycles; instead of sparsity."),
    ] = None,
    tile_entries: Annotated[
        float | None,
        typer.Option(
            help="Most attention within so many entries that a GPU kernel computes which gathers "
            "keys for tiles of queries; instead of sparsity."
        ),
    ] = None,
    tile: Annotated[int, typer.Option(help="Queries of such a tile: 16, 32 or 64.")] = 32,
    hardware: HardwareName = "vitcod",
    learn_crops: LearnCrops = 64,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Learn fixed attention masks from photos and save them."""
    with one_line_errors(quiet):
        from ..pipeline.codesign import learn_mask, learn_mask_within
        from ..pipeline.settings import Settings
        from .tables import mask_table

        _check(
            out,
            tile,
            granularity,
            rule,
            sparsity=sparsity,
            theta=theta,
            cycles=cycles,
            tile_entries=tile_entries,
        )
        source = weights_source(model, weights)
        settings = Settings(
            image_size=image_size,
            normalization=normalization_named(normalization, source),
            rule=rule or Settings.rule,
            sparsity=Settings.sparsity if sparsity is None and theta is None else sparsity,
            theta=theta,
            granularity=block_shape(granularity),
            learn_crops=learn_crops,
            seed=seed,
        )
        machine = hardware_named(hardware)
        check_writable(out.parent)
        photos = load_photos(images, None, limit)
        network, _ = load_network(model, source)
        with progress_bars(quiet) as progress:
            if cycles is None and tile_entries is None:
                mask, said = learn_mask(network, photos, settings, progress), None
            else:
                found = learn_mask_within(
                    network,
                    photos,
                    cycles,
                    settings,
                    machine,
                    progress,
                    tile_entries=tile_entries,
                    tile=tile,
                )
                mask, said = found.mask, _said(found, None if tile_entries is None else tile)
        mask.save(out)
        if not quiet:
            OUT.print(mask_table(mask))
            if said:
                OUT.print(said, highlight=False)


def _check(out: Path, tile: int, granularity: str, rule: str | None, **given: float | None) -> None:
    """Of the rules ``given`` one at most, and what goes with it."""
    from ..accel.kernels.plan import TILES

    options = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
    named = {name: f"{name} {value:g}" for name, value in options.items() if value is not None}
    if len(named) > 1:
        raise ValueError(f"give one of {', '.join(options)}; got {' and '.join(named.values())}")
    budgeted = not {"--cycles", "--tile-entries"}.isdisjoint(named)
    if rule is not None and budgeted:
        raise ValueError(f"--rule {rule} does not go with a budget, which has a rule of its own")
    if granularity != "1x1" and budgeted:
        raise ValueError(f"--granularity {granularity} goes with --sparsity or --theta")
    if tile not in TILES:
        raise ValueError(f"--tile must be one of {', '.join(map(str, TILES))}, got {tile}")
    if out.suffix != ".npz":
        raise ValueError(f"the mask file must end in .npz, got {str(out)!r}")


def _said(found: HardwareMask, tile: int | None) -> str:
    """What the mask costs and keeps, and what to do with it."""
    kept = f"{found.mass:.1%} of the attention mass kept."
    if tile is None:
        return (
            f"{found.cost:,.0f} simulated cycles of attention, {kept} Simulate it with "
            "--global-threshold all, under which keys that all queries keep are global."
        )
    import numpy as np

    from ..sparsify.budgeted_masks import tile_area
    from ..workload import AttentionMask

    dense = tile_area(tile)(AttentionMask(tuple(np.ones_like(k) for k in found.mask.keep)))
    return f"{found.cost:,.0f} of {dense:,.0f} entries in tiles of {tile} queries, {kept}"
