"""`sievit simulate` and `sievit compare`: networks on simulated machines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..moved import old_names
from . import options as o
from .inputs import (
    codec_shape,
    configuration_of,
    global_threshold_of,
    profile_named,
    saved_mask,
    simulators_named,
)
from .paper import run_paper
from .report_formats import Found, format_named, show
from .settings import FROM_SETTINGS
from .terminal import OUT, check_targets, one_line_errors

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..accel import EnergyProfile, Report, Timeline
    from ..accel.explore.grid import Configuration
    from ..workload import Workload

BASELINE = "systolic"
COMPARED = (
    BASELINE,
    "sanger",
    "spatten",
    "vitcod_plain",
    "vitcod_no_codec",
    "vitcod_no_reorder",
    "vitcod",
)


def simulate(
    model: o.Model = o.DEFAULT_MODEL,
    mask: o.MaskFile = None,
    image_size: o.OwnImageSize = None,
    latent_heads: o.SimulatedLatentHeads = None,
    groups: o.Groups = FROM_SETTINGS,
    global_threshold: o.GlobalKeys = None,
    simulator: o.Simulators = None,
    batch: o.Batch = 1,
    hardware: o.HardwareName = "vitcod",
    profile: o.Profile = o.DEFAULT_PROFILE,
    heads: o.Heads = False,
    fields: o.SetFields = None,
    output: o.Format = "table",
    json_out: o.JsonFile = None,
    trace: o.TraceFile = None,
    plots: o.PlotFolder = None,
    quiet: o.Quiet = False,
) -> None:
    """Simulate a network, dense or with a saved mask, on the accelerator, in every detail."""
    with one_line_errors(quiet):
        from rich.console import Group
        from rich.text import Text

        from ..pipeline.networks import model_workload
        from .tables.machines import machine_tables, simulation_table

        names = simulators_named(simulator or ["vitcod"])
        costs = profile_named(profile)
        machine = configuration_of(hardware, fields, names)
        shown = format_named(output)
        check_targets(json_out, trace, folder=plots)
        saved = saved_mask(mask)
        workload = model_workload(
            model,
            saved.mask,
            (saved.codecs or None)
            if latent_heads is None
            else codec_shape(model, latent_heads, groups),
            image_size=image_size or saved.image_size,
            global_threshold=global_threshold_of(global_threshold),
        )
        timed = trace is not None or plots is not None
        reports, timelines = _run(workload, machine, names, batch, timed)
        figures = _figures(reports, costs)
        written = _write(reports, timelines, figures, json_out, trace, plots)

        def tables() -> RenderableType:
            parts = [simulation_table(reports)]
            parts += (machine_tables(r, *_costs(r, costs), heads) for r in reports.values())
            return Group(*(x for part in parts for x in (Text(), part)), Text())

        if not quiet:
            show(shown(Found(figures, tables)))
            _say_written(written, output)


def compare(
    model: o.ModelArgument = o.DEFAULT_MODEL,
    mask: o.MaskFile = None,
    sparsity: o.SyntheticSparsity = FROM_SETTINGS,
    seed: o.SyntheticSeed = FROM_SETTINGS,
    image_size: o.OwnImageSize = None,
    latent_heads: o.ComparedLatentHeads = None,
    groups: o.Groups = FROM_SETTINGS,
    global_threshold: o.GlobalKeys = None,
    simulator: o.Simulators = None,
    against: o.Against = None,
    equal: o.Equal = "lines",
    total_macs: o.TotalMacs = None,
    batch: o.Batch = 1,
    hardware: o.HardwareName = "vitcod",
    profile: o.Profile = o.DEFAULT_PROFILE,
    fields: o.SetFields = None,
    output: o.Format = "table",
    json_out: o.JsonFile = None,
    trace: o.TraceFile = None,
    plots: o.PlotFolder = None,
    paper: o.Paper = False,
    measure: o.Measure = True,
    quiet: o.Quiet = False,
) -> None:
    """Set machines of equal MACs, bandwidth and clock side by side on one sparse network.

    Equal are the MACs of the lines, those of the codec come on top; or all MACs (--equal macs).
    """
    with one_line_errors(quiet):
        if paper:
            if fields or output != "table" or equal != "lines" or total_macs is not None:
                raise ValueError("--set, --format, --equal and --total-macs do not go with --paper")
            check_targets(json_out, folder=plots)
            run_paper(model, mask, image_size, hardware, seed, measure, json_out, plots, quiet)
            return
        from ..pipeline.networks import sparse_workload

        names = simulators_named(simulator or list(COMPARED))
        if against is not None:
            if against not in names:
                raise ValueError(f"--against must be one of {', '.join(names)}, got {against!r}")
            names = (against, *(name for name in names if name != against))
        costs = profile_named(profile)
        machine = configuration_of(hardware, fields, names)
        shown = format_named(output)
        check_targets(json_out, trace, folder=plots)
        saved = saved_mask(mask)
        workload, about = sparse_workload(
            model,
            saved.mask or sparsity,
            latent_heads=latent_heads,
            groups=groups,
            codecs=saved.codecs if latent_heads is None else None,
            image_size=image_size or saved.image_size,
            global_threshold=global_threshold_of(global_threshold),
            seed=seed,
        )
        timed = trace is not None or plots is not None
        asked = (equal, total_macs)
        reports, timelines = _run(workload, machine, names, batch, timed, asked)
        figures = _comparison(reports, costs, about)
        written = _write(reports, timelines, figures, json_out, trace, plots)
        if not quiet:
            show(shown(Found(figures, lambda: _comparison_tables(reports, costs, about))))
            _say_written(written, output)


def _run(
    workload: Workload,
    machine: Configuration,
    names: Iterable[str],
    batch: int,
    timed: bool,
    equal: tuple[str, int | None] = ("lines", None),
) -> tuple[dict[str, Report], dict[str, Timeline]]:
    """Reports by machine, and their time lines where they are wanted."""
    from ..accel import record
    from ..accel import simulate as run
    from ..accel.simulate import cuts_of

    hardware, schedule, own = machine
    used = {name: {"schedule": schedule, "parameters": own.get(name)} for name in names}
    cuts = cuts_of(workload, hardware, names, batch, schedule, own, *equal)
    if not timed:
        return {name: run(workload, cuts[name], name, batch, **used[name]) for name in names}, {}
    timelines = {name: record(workload, cuts[name], name, batch, **used[name]) for name in names}
    return {name: timeline.report for name, timeline in timelines.items()}, timelines


def _costs(report: Report, profile: EnergyProfile) -> tuple[Any, Any]:
    from ..accel import area, energy

    return energy(report, profile), area(report.hardware, profile)


def _figures(reports: Mapping[str, Report], profile: EnergyProfile) -> dict[str, Any]:
    """Every figure of each machine, ready for JSON."""
    made = {}
    for name, report in reports.items():
        spent, space = _costs(report, profile)
        made[name] = report.to_dict() | {"energy": spent.to_dict(), "area": space.to_dict()}
    return made


def _comparison(
    reports: Mapping[str, Report], profile: EnergyProfile, about: str
) -> dict[str, Any]:
    from dataclasses import asdict

    from ..accel import speedups
    from ..accel.report.silicon import codec_note, equal_words, machines_words

    made = speedups(reports, next(iter(reports)))
    return {
        "about": about,
        "equal": equal_words(reports),
        "macs": machines_words(reports),
        "codec": " ".join(codec_note(reports)) or None,
        "speedups": [asdict(s) for s in made],
        "machines": _figures(reports, profile),
    }


def _comparison_tables(
    reports: Mapping[str, Report], profile: EnergyProfile, about: str
) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from .tables.machines import comparison_tables

    spent = {name: _costs(report, profile)[0] for name, report in reports.items()}
    return Group(Text(), Text(about), Text(), comparison_tables(reports, spent), Text())


def _write(
    reports: Mapping[str, Report],
    timelines: Mapping[str, Timeline],
    figures: Mapping[str, Any],
    json_out: Path | None,
    trace: Path | None,
    plots: Path | None,
) -> list[Path]:
    """The files that were asked for; returns their paths."""
    written = []
    if json_out is not None:
        from ..files import write_json

        write_json(figures, json_out)
        written.append(json_out)
    if trace is not None:
        from ..accel import write_trace

        write_trace(timelines.values(), trace)
        written.append(trace)
    if plots is not None:
        from ..accel.simulators.registry import SIMULATORS
        from ..pipeline.pictures import draw_machines

        timed = {name: made for name, made in timelines.items() if SIMULATORS[name].stepped}
        written += draw_machines(reports, timed, plots)
    return written


def _say_written(paths: list[Path], output: str) -> None:
    if paths and output == "table":  # another format is for programs to read
        OUT.print(f"Written: {', '.join(map(str, paths))}", highlight=False)


__getattr__ = old_names(__name__)
