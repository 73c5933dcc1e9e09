"""The main job: a pretrained ViT in, masks, codecs, fidelity and simulated silicon out.

`codesign` walks the path of ViTCoD (HPCA 2023) in order: average the attention, learn
the mask, polarize it, fit the codec, recover, simulate. With `studies` it is the only
place that sees models and machines together. Nothing is printed or written here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..accel import Hardware, presets
from ..ae import CodecErrors, FittedCodecs
from ..images import Images, Photos, photo_sets
from ..progress import Progress, silent
from ..sparsify import HardwareMask, polarize
from ..sparsify.budgeted_masks import kept_mass
from ..sparsify.fidelity import Saliency
from ..workload import AttentionMask
from .result import CodecSummary, CodesignResult
from .settings import Settings
from .stages import Run


def codesign(
    model: nn.Module,
    images: Images = None,
    hardware: Hardware = presets["vitcod"],
    settings: Settings = Settings(),
    *,
    sparsity: float | None = None,
    name: str | None = None,
    saliency: Saliency | None = None,
    progress: Progress = silent,
) -> CodesignResult:
    """Sparsify ``model``'s attention and show what that keeps and what it costs.

    model      any vision transformer whose attention `sievit.models.find_attention` finds
               and whose tokens `sievit.models.features` gives; it is not changed
    images     photos (every fourth is held out to judge on), or (to learn from, to judge
               on); None takes scikit-image's eight
    hardware   the simulated machine
    sparsity   shorthand for ``settings.sparsity``
    saliency   a decoder (patch tokens, image size) -> map, for saliency overlap

    The same model, photos, settings and thread count give the same result, wall times
    apart. Raises ValueError for settings that cannot be met.
    """
    if sparsity is not None:
        settings = settings.with_amount(sparsity=sparsity)
    torch.manual_seed(settings.seed)
    run = Run(model, photo_sets(images), settings, saliency, progress, hardware)
    mask = run.learn_mask()
    codecs, plain = run.fit_codecs() if settings.codec else (None, None)
    run.judge_masks(mask)
    if plain and settings.rotation:
        run.judge_unrotated(plain)
    student, codec_log, recovery_log = run.train(mask, codecs)
    if settings.int8:
        run.judge_integers()
    polarized = polarize(mask)
    shapes = codecs.shapes if codecs else [None] * len(polarized)
    dense = run.traced(name)
    sparse = dense.with_polarized(polarized, shapes)
    return CodesignResult(
        settings=settings,
        learned_from=run.learn.names,
        judged_on=run.judged.names,
        mask=mask,
        kept_mass=kept_mass(run.sparse.maps, mask),
        codecs=codecs.codecs if codecs else None,
        codec_summary=_summary(codecs, plain, run.codec_errors),
        fidelity=run.fidelity,
        codec_log=codec_log,
        recovery_log=recovery_log,
        student=student,
        workload=sparse,
        reports=run.simulate(sparse),
        measured=run.measure(dense) if settings.measure else (),
        stage_seconds=run.seconds,
    )


def learn_mask(
    model: nn.Module,
    images: Images,
    settings: Settings = Settings(),
    progress: Progress = silent,
    hardware: Hardware = presets["vitcod"],
) -> AttentionMask:
    """The mask alone, learned as `codesign` does; all photos are learned from."""
    return _learning(model, images, settings, progress, hardware).learn_mask()


def learn_mask_within(
    model: nn.Module,
    images: Images,
    cycles: float | None = None,
    settings: Settings = Settings(),
    hardware: Hardware = presets["vitcod"],
    progress: Progress = silent,
    *,
    tile_entries: float | None = None,
    tile: int = 32,
) -> HardwareMask:
    """The mask that keeps most attention within a budget: that of ``settings``, or one of

    cycles        of simulated attention on ``hardware``. The mask's global keys are kept by
                  every query: its ``global_threshold`` is "all"
    tile_entries  that a GPU kernel computes which gathers keys for ``tile`` queries at once,
                  neighbours in the token grid where that is square
    """
    given = [budget for budget in (cycles, tile_entries) if budget is not None]
    if len(given) > 1 or not (given or settings.has_budget):
        raise ValueError(
            f"give either cycles or tile_entries, got cycles={cycles}, tile_entries={tile_entries}"
        )
    if given:
        amount = settings.with_amount(cycles=cycles, tile_entries=tile_entries)
        settings = replace(amount, tile=tile)
    run = _learning(model, images, settings, progress, hardware)
    mask, found = run.learn_mask(), run.sparse.found
    assert found is not None  # a budget was given
    return replace(found, mask=mask)


def learn_masks(
    model: nn.Module,
    images: Images,
    sparsities: Sequence[float],
    settings: Settings = Settings(),
    progress: Progress = silent,
) -> dict[float, AttentionMask]:
    """As `learn_mask`, at several sparsities: the attention is averaged once for all."""
    run = _learning(model, images, settings, progress, presets["vitcod"])
    run.average()
    wanted = {s: settings.with_amount(sparsity=s) for s in sparsities}
    return {s: run.sparse.make_mask(at, settings.seed) for s, at in wanted.items()}


def _learning(
    model: nn.Module, images: Images, settings: Settings, progress: Progress, hardware: Hardware
) -> Run:
    """A run that learns from all photos."""
    photos = images if isinstance(images, Photos) else photo_sets(images)[0]
    return Run(model, (photos, photos), settings, None, progress, hardware)


def _summary(
    codecs: FittedCodecs | None, plain: FittedCodecs | None, errors: tuple[CodecErrors, ...]
) -> CodecSummary | None:
    if codecs is None or plain is None:
        return None
    return CodecSummary(
        shapes=codecs.shapes,
        explained=codecs.explained,
        explained_without_rotation=plain.explained,
        parameters=sum(p.numel() for p in codecs.codecs.parameters()),
        errors=errors,
    )
