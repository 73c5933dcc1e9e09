"""`sievit zoo`: the registered models, what each costs, and where its run time goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonFile, Quiet
from .terminal import OUT, one_line_errors, progress_bars

if TYPE_CHECKING:
    from ..models import Complexity

Size = tuple[int, int] | None
Counting = tuple[int, int | None]  # bytes of an element, of a cache


def zoo(
    patterns: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names or shell wildcards; '*' is every model. Without any, the names are listed."
        ),
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="Pixels, 224 or 192x256. Default: each model's own.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show every layer of every model.")
    ] = False,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Also count the bytes accessed with a cache of this size: bytes, or 320kB, 2MB."
        ),
    ] = None,
    element_bytes: Annotated[int, typer.Option(min=1, help="Bytes of every element.")] = 4,
    profile: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Measure a model's run time by operation.")
    ] = None,
    runtime_study: Annotated[
        bool,
        typer.Option(
            "--runtime-study",
            help="Scale, time and simulate networks (those named, or a default set), to see which "
            "count predicts run time.",
        ),
    ] = False,
    seconds: Annotated[
        float,
        typer.Option(min=0, help="The study starts no further network after this many seconds."),
    ] = 150.0,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch, when measuring.")] = 4,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads, when measuring. Default: PyTorch's.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Batches measured.")] = 5,
    json_out: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture into this file.")] = None,
    quiet: Quiet = False,
) -> None:
    """List the registered models; count what they cost; measure where run time goes."""
    with one_line_errors(quiet):
        size, counting = _size(image_size), (element_bytes, _bytes(cache))
        measured = {"batch": batch, "threads": threads, "repeats": repeats}
        if profile is not None and (patterns or runtime_study):
            raise ValueError("--profile takes one model and neither names nor --runtime-study")
        if runtime_study:
            result = _runtime_study(patterns, {**measured, "seconds": seconds}, plot, quiet)
        elif profile is not None:
            result = _profile(profile, size, counting, measured, layers, plot, quiet)
        elif not patterns:
            _list(json_out, plot, quiet)
            return
        else:
            result = _costs(patterns, size, counting, layers, plot, quiet)
        if json_out is not None:
            from ..files import write_json
            from ..provenance import versions

            write_json({**result, "versions": versions()}, json_out)


def _list(json_out: Path | None, plot: Path | None, quiet: bool) -> None:
    from ..models import names

    if json_out is not None or plot is not None:
        raise ValueError("--json and --plot need models to count: give names, or '*' for all")
    if not quiet:
        OUT.print("\n".join(names()), highlight=False)


def _costs(
    patterns: list[str],
    size: Size,
    counting: Counting,
    layers: bool,
    plot: Path | None,
    quiet: bool,
) -> dict[str, Any]:
    from ..models.costs.plots import plot_costs, plot_layers
    from .tables.zoo import cost_table, costs_table

    found = _matching(patterns)
    costs, sizes = [], []
    with progress_bars(quiet or len(found) == 1) as progress:
        for done, name in enumerate(found):
            progress("counting", done / len(found))
            cost, sides = _count(name, size, *counting)
            costs.append(cost)
            sizes.append(sides)
        progress("counting", 1.0)
    if plot is not None:
        plot_layers(costs[0], plot) if len(costs) == 1 else plot_costs(costs, plot)
    if not quiet and len(costs) > 1 and not layers:
        OUT.print(costs_table(costs, sizes))
    elif not quiet:
        for cost, sides in zip(costs, sizes, strict=True):
            OUT.print(cost_table(cost, sides, layers))
    return {"models": [_plain(c, s, layers) for c, s in zip(costs, sizes, strict=True)]}


def _plain(cost: Complexity, sides: tuple[int, int], layers: bool) -> dict[str, Any]:
    plain = cost.to_dict()
    if not layers:
        del plain["layers"]
    return {"name": plain.pop("name"), "image_size": list(sides), **plain}


def _profile(
    name: str,
    size: Size,
    counting: Counting,
    measured: dict[str, Any],
    layers: bool,
    plot: Path | None,
    quiet: bool,
) -> dict[str, Any]:
    from ..models import complexity, create_for, trace
    from ..models.costs.dcn_traffic import sampling_traffic
    from ..models.costs.plots import plot_layers
    from ..models.costs.run_profile import profile_run
    from ..models.running import image_size_of
    from ..pipeline.networks import with_compiled_core
    from .tables.zoo import intensity_table, profile_table, traffic_table

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else PyTorch's profiler writes lines
    model = create_for(name, size)
    workload = trace(model, size or image_size_of(model))
    cost = complexity(workload, None, *counting)
    traffic = sampling_traffic(workload)
    with progress_bars(quiet) as progress:
        run = profile_run(
            with_compiled_core(model),
            size,
            **measured,
            progress=lambda share: progress("measuring", share),
        )
    if plot is not None:
        plot_layers(cost, plot)
    if not quiet:
        OUT.print(profile_table(run))
        OUT.print(intensity_table(cost, layers))
        if traffic:
            OUT.print(traffic_table(traffic))
    return {
        "profile": run.to_dict(),
        "cost": cost.to_dict(),
        "sampling": [row.to_dict() for row in traffic],
    }


def _runtime_study(
    patterns: list[str] | None, measured: dict[str, Any], plot: Path | None, quiet: bool
) -> dict[str, Any]:
    from ..studies import runtime as studies
    from .tables.zoo import runtime_table

    bases = _matching(patterns) if patterns else studies.DEFAULT_BASES
    with progress_bars(quiet) as progress:
        study = studies.runtime_study(
            bases, **measured, progress=lambda share: progress("timing and simulating", share)
        )
    if plot is not None:
        studies.plot_runtime(study, plot)
    if not quiet:
        OUT.print(runtime_table(study))
    return study.to_dict()


def _count(
    name: str, size: Size, element_bytes: int, cache_bytes: int | None
) -> tuple[Complexity, tuple[int, int]]:
    import torch

    from ..models import complexity, create_for
    from ..models.running import image_size_of

    with torch.device("meta"):
        model = create_for(name, size)
    sides = size or (image_size_of(model), image_size_of(model))
    return complexity(model, sides, element_bytes, cache_bytes), sides


def _matching(patterns: list[str]) -> list[str]:
    from ..models import names
    from ..models.registry import unknown_name

    found: list[str] = []
    for pattern in patterns:
        matches = names(pattern)
        if not matches:
            raise ValueError(unknown_name(pattern))
        found += [name for name in matches if name not in found]
    return found


def _size(text: str | None) -> Size:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdigit() and int(side) for side in sides):
        raise ValueError(f"--image-size is pixels, as 224 or 192x256, got {text!r}")
    return int(sides[0]), int(sides[-1])


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    number = text.lower().removesuffix("b")
    unit = {"k": 1e3, "m": 1e6, "g": 1e9}.get(number[-1:], 1)
    try:
        size = float(number[:-1] if unit > 1 else number) * unit
        whole = int(size)
    except (ValueError, OverflowError):
        whole = size = 0
    if whole < 1 or whole != size:
        raise ValueError(f"--cache is a number of bytes, as 65536, 320kB or 2MB, got {text!r}")
    return whole
