"""`sievit explore`: many machines and many variants of a model, and the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import explore_options as e
from . import options as o
from .inputs import (
    global_threshold_of,
    hardware_named,
    load_network,
    load_photos,
    mask_file,
    normalization_named,
    profile_named,
    simulators_named,
    weights_source,
)
from .lists import codecs, field_values, gigabytes, kilobytes, numbers, shares, words
from .settings import FROM_SETTINGS
from .terminal import OUT, check_targets, one_line_errors, progress_bars

if TYPE_CHECKING:
    from ..accel import DesignPoint, Exploration
    from ..progress import Progress
    from ..studies.variants import Codec, Variants
    from ..workload import AttentionMask


def explore(
    model: o.ModelArgument = o.DEFAULT_MODEL,
    mask: e.Masks = None,
    sparsity: e.Sparsities = None,
    weights: e.LearnedFrom = None,
    images: o.Images = None,
    limit: o.Limit = 512,
    learn_crops: o.LearnCrops = FROM_SETTINGS,
    seed: e.MaskSeed = FROM_SETTINGS,
    image_size: e.ImageSize = None,
    latent_heads: e.Codecs = "none",
    groups: e.CodecGroups = "1",
    global_threshold: o.GlobalKeys = None,
    lines: e.Lines = None,
    macs_per_line: e.MacsPerLine = None,
    qkv_buffer: e.QkvBuffer = None,
    q_buffer: e.QBuffer = None,
    k_buffer: e.KBuffer = None,
    v_buffer: e.VBuffer = None,
    output_buffer: e.OutputBuffer = None,
    index_buffer: e.IndexBuffer = None,
    banks: e.Banks = None,
    bandwidth: e.Bandwidth = None,
    policy: e.Policy = None,
    fields: e.Fields = None,
    configurations: e.Configurations = None,
    hardware: o.HardwareName = "vitcod",
    simulator: e.Simulator = "vitcod",
    batch: o.Batch = 1,
    profile: o.Profile = o.DEFAULT_PROFILE,
    attention: e.Attention = False,
    jobs: e.Jobs = None,
    results: e.Results = Path("out/explore.jsonl"),
    json_out: o.JsonFile = None,
    plots: o.PlotFolder = None,
    quiet: o.Quiet = False,
) -> None:
    """Try many machines, sparsities and codecs; show the Pareto front and what each does.

    The front is over latency, energy and area. A configuration that makes no machine, or
    does not fit, is reported and does not stop the rest.
    """
    with one_line_errors(quiet):
        (simulator,) = simulators_named([simulator])
        settings = {"simulator": simulator, "batch": batch, "profile": profile_named(profile)}
        settings |= {"base": hardware_named(hardware), "jobs": jobs}
        check_targets(results, json_out, folder=plots)
        given = {
            "lines": numbers("--lines", lines),
            "macs_per_line": numbers("--macs-per-line", macs_per_line),
            "q_buffer_bytes+k_buffer_bytes+v_buffer_bytes": kilobytes("--qkv-buffer", qkv_buffer),
            "q_buffer_bytes": kilobytes("--q-buffer", q_buffer),
            "k_buffer_bytes": kilobytes("--k-buffer", k_buffer),
            "v_buffer_bytes": kilobytes("--v-buffer", v_buffer),
            "output_buffer_bytes": kilobytes("--output-buffer", output_buffer),
            "index_buffer_bytes": kilobytes("--index-buffer", index_buffer),
            "q_banks+k_banks+v_banks": numbers("--banks", banks),
            "dram_bytes_per_s": gigabytes("--bandwidth", bandwidth),
            "assignment": words(policy),
        }
        machines = _machines(given, fields or [], configurations)
        learning = _Learning(weights, images, limit, learn_crops, seed)
        varied = _Varied(mask or [], shares("--sparsity", sparsity), codecs(latent_heads, groups))
        with progress_bars(quiet) as progress:
            made, about = _variants(
                model, varied, learning, image_size, global_threshold_of(global_threshold), progress
            )
            found = _explored(made, machines, results, progress, settings)
        _finish(found, made, about, attention, json_out, plots, quiet)


class _Learning(NamedTuple):
    """Where masks come from that no file gives."""

    weights: str | None
    images: Path | None
    limit: int
    crops: int
    seed: int


class _Varied(NamedTuple):
    """What is varied in the model."""

    masks: Sequence[Path]
    sparsities: tuple[float, ...]
    codecs: tuple[Codec, ...]


def _machines(
    given: dict[str, tuple[Any, ...]], fields: Sequence[str], configurations: Path | None
) -> tuple[dict[str, Any], ...]:
    """Every combination of what options give, and the configurations of a file."""
    from ..accel import grid
    from ..accel.explore.grid import load_configurations

    chosen = {name: values for name, values in given.items() if values}
    for text in fields:
        name, values = field_values(text)
        if name in chosen:
            raise ValueError(f"--set {name} is given twice, or by an option of its own as well")
        chosen[name] = values
    listed = () if configurations is None else load_configurations(configurations)
    return (*(grid(chosen) if chosen or not listed else ()), *listed)


def _variants(
    name: str,
    varied: _Varied,
    learning: _Learning,
    image_size: int | None,
    global_threshold: int | float | str | None,
    progress: Progress,
) -> tuple[Variants, str]:
    """The model with each mask and codec, and a sentence on the masks."""
    from ..models import create, prefix_tokens
    from ..pipeline.networks import model_workload
    from ..studies.variants import BY_CHANCE, masks_by_chance, variants

    if varied.masks and varied.sparsities:
        raise ValueError("give either --mask or --sparsity: a mask has its sparsity")
    dense = replace(model_workload(name, image_size=image_size), name=name)
    if varied.masks:
        masks = _read(varied.masks)
        about = f"{name}: masks {', '.join(masks)}"
        return variants(dense, masks, varied.codecs, global_threshold), about
    if not varied.sparsities:
        return variants(
            dense, {"dense": None}, varied.codecs, global_threshold
        ), f"{name}: dense attention"
    if learning.weights is None:
        prefix = prefix_tokens(create(name))
        masks = masks_by_chance(dense, varied.sparsities, prefix, learning.seed)
        about = f"{name}: {BY_CHANCE.format(seed=learning.seed)}"
    else:
        masks = _learned(name, varied.sparsities, learning, image_size, progress)
        about = f"{name}: masks learned from photos, once for all sparsities"
    return variants(dense, masks, varied.codecs, global_threshold, axis="sparsity"), about


def _read(paths: Sequence[Path]) -> dict[str, AttentionMask]:
    names = [path.name for path in paths]
    labels = names if len(set(names)) == len(names) else [str(path) for path in paths]
    return {label: mask_file(path).mask for label, path in zip(labels, paths, strict=True)}


def _learned(
    name: str,
    sparsities: tuple[float, ...],
    learning: _Learning,
    image_size: int | None,
    progress: Progress,
) -> dict[float, AttentionMask]:
    from ..pipeline.codesign import learn_masks
    from ..pipeline.settings import Settings

    photos = load_photos(learning.images, None, learning.limit)
    source = weights_source(name, learning.weights)
    network, _ = load_network(name, source)
    from ..models.running import image_size_of

    size = image_size_of(network, image_size)
    settings = Settings(
        image_size=size,
        normalization=normalization_named("auto", source),
        sparsity=sparsities[0],
        learn_crops=learning.crops,
        seed=learning.seed,
    )
    return learn_masks(network, photos, sparsities, settings, progress)


def _explored(
    made: Variants,
    machines: tuple[dict[str, Any], ...],
    results: Path,
    progress: Progress,
    settings: dict[str, Any],
) -> Exploration:
    from ..accel import explore as run

    def tell(point: DesignPoint, done: int, total: int) -> None:
        progress("exploring", done / total)

    progress("exploring", 0.0)
    return run(
        made.workloads,
        machines,
        results=results,
        labels=made.labels,
        progress=tell,
        **settings,
    )


def _finish(
    found: Exploration,
    made: Variants,
    about: str,
    attention: bool,
    json_out: Path | None,
    plots: Path | None,
    quiet: bool,
) -> None:
    """Tables, files and pictures; an error where nothing could be simulated."""
    from ..accel.explore.points import ATTENTION_OBJECTIVES, OBJECTIVES
    from .tables.fronts import exploration_tables

    objectives = found.given(ATTENTION_OBJECTIVES if attention else OBJECTIVES)
    written = []
    if json_out is not None:
        from ..files import write_json

        write_json(_as_json(found, made, about, objectives), json_out)
        written.append(json_out)
    if plots is not None and found.done:
        from ..accel.explore.plots import plot_front, plot_sensitivity

        written += [plots / "front.png", plots / "sensitivity.png"]
        plot_front(found, written[-2], objectives, about)
        plot_sensitivity(found, written[-1], objectives)
    if not quiet:
        OUT.print(exploration_tables(found, objectives, made.refused, about))
        if written:
            OUT.print(f"Written: {', '.join(map(str, written))}", highlight=False)
    if not found.done:
        reasons = [*made.refused.values(), *(str(point.error) for point in found.failed)]
        raise ValueError(f"nothing could be simulated; the first reason: {reasons[0]}")


def _as_json(
    found: Exploration, made: Variants, about: str, objectives: Sequence[str]
) -> dict[str, Any]:
    from ..accel.explore.points import sensitivity
    from ..provenance import versions

    effects = {name: sensitivity(found, name) for name in objectives}
    return {
        "about": about,
        "objectives": list(objectives),
        "refused": dict(made.refused),
        "front": [point.to_dict() for point in found.front(objectives)],
        "sensitivity": {
            name: {axis: [effect._asdict() for effect in made] for axis, made in axes.items()}
            for name, axes in effects.items()
        },
        "points": [point.to_dict() for point in found.points],
        "versions": versions(),
    }
