"""The main job: a pretrained ViT in, masks, codecs, fidelity and simulated silicon out.

`codesign` walks the path of ViTCoD (HPCA 2023) in order: average the attention, learn
the mask, polarize it, fit the codec, recover, simulate. It alone, with `studies`, sees
models and machines together. Nothing is printed or written here; see `result` and `cli`.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from .accel import Hardware, presets, simulate
from .accel.kernels import measure_attention
from .ae import FittedCodecs, attach_codec, fit_codecs, fold, head_moments, train_codec
from .images import Photos, batches, center_crops, endless_crops, random_crops, sample_photos
from .masks import AttentionMask
from .models import prefix_tokens, trace
from .models.distill import Distilled
from .result import CodecSummary, CodesignResult
from .sparsify import (
    Fidelity,
    attach,
    average_attention,
    judge,
    polarize,
    random_mask,
    recover,
    threshold,
    token_features,
)
from .sparsify.fidelity import Saliency
from .workload import Workload

SIMULATORS = ("systolic", "vitcod_plain", "vitcod_no_reorder", "vitcod_no_codec", "vitcod")


@dataclass(frozen=True)
class Settings:
    """Everything that decides the figures of a run, besides model and photos.

    sparsity or theta  of the mask rule "information"; theta is used where sparsity is None
    min_kept           a key is global when more queries keep it (ViTCoD: 50)
    codec              compress Q and K over the heads; ``latent_heads`` None is half
    turn               make the free change of basis before the codec is fitted
    learn_crops        crops for the averaged attention and the codec's closed form
    judge_crops        crops that fidelity is judged on
    codec_steps, recovery_steps, recovery_seconds  training budgets; 0 leaves a part out,
                       seconds replace the recovery's steps (and are not reproducible)
    measure            time dense attention on this machine
    """

    image_size: int = 224
    sparsity: float | None = 0.9
    theta: float | None = None
    min_kept: int | float = 50
    codec: bool = True
    latent_heads: int | None = None
    groups: int = 1
    turn: bool = True
    learn_crops: int = 64
    judge_crops: int = 32
    codec_steps: int = 8
    recovery_steps: int = 40
    recovery_seconds: float | None = None
    batch_size: int = 8
    seed: int = 0
    measure: bool = True

    def __post_init__(self) -> None:
        least = {"image_size": 1, "learn_crops": 1, "judge_crops": 1, "batch_size": 1}
        least |= {"codec_steps": 0, "recovery_steps": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
        if self.sparsity is not None and not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if self.theta is not None and not 0.0 < self.theta <= 1.0:
            raise ValueError(f"theta must be in (0, 1], got {self.theta}")
        if (self.sparsity is None) == (self.theta is None):
            raise ValueError(
                f"give either sparsity or theta, got sparsity={self.sparsity}, theta={self.theta}"
            )
        if self.recovery_seconds is not None and self.recovery_seconds <= 0:
            raise ValueError(f"recovery_seconds must be above 0, got {self.recovery_seconds}")


Progress = Callable[[str, float], None]
"""Called with (stage, share of the stage done)."""


@dataclass
class _Clock:
    """Wall seconds by stage, and where progress is told."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[float], None]]:
        begin = time.perf_counter()
        self.progress(name, 0.0)
        yield lambda share: self.progress(name, share)
        self.progress(name, 1.0)
        self.seconds[name] = time.perf_counter() - begin


def codesign(
    model: nn.Module,
    images: Photos | tuple[Photos, Photos] | None = None,
    hardware: Hardware = presets["vitcod"],
    settings: Settings = Settings(),
    *,
    sparsity: float | None = None,
    name: str = "model",
    saliency: Saliency | None = None,
    progress: Progress = lambda stage, share: None,
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
        settings = replace(settings, sparsity=sparsity, theta=None)
    learn, judged = _photo_sets(images)
    clock = _Clock(progress)
    generator = np.random.default_rng(settings.seed)
    torch.manual_seed(settings.seed)
    size, batch = settings.image_size, settings.batch_size
    learn_crops = random_crops(learn, size, settings.learn_crops, generator)
    judge_crops = _judge_crops(judged, settings, generator)

    with clock.stage("averaging attention") as tell:
        maps = average_attention(
            model,
            batches(learn_crops, batch),
            progress=lambda done: tell(done / len(learn_crops)),
        )
    with clock.stage("learning the mask"):
        mask = threshold(
            maps,
            sparsity=settings.sparsity,
            theta=settings.theta,
            prefix_tokens=prefix_tokens(model),
        )
        polarized = polarize(mask, settings.min_kept)
    codecs, plain_variance = None, None
    if settings.codec:
        with clock.stage("fitting the codec") as tell:
            codecs, plain_variance = _fitted_codecs(model, learn_crops, settings, tell)

    judging = _Judging(model, judge_crops, settings, saliency)
    with clock.stage("judging masks") as tell:
        rows = judging.masks(mask, tell)
    student = copy.deepcopy(model)
    logs = _train(student, model, mask, codecs, learn, settings, judging, rows, clock)

    with clock.stage("simulating") as tell:
        workload = trace(model, size)
        workload = replace(workload, name=name)
        shapes = codecs.shapes if codecs else [None] * len(polarized)
        sparse = workload.with_polarized(polarized, shapes)
        reports = _simulated(sparse, hardware, tell)
    measured = ()
    if settings.measure:
        with clock.stage("measuring this machine"):
            measured = _measured(workload, batch)
    return CodesignResult(
        name=name,
        settings=settings,
        learned_from=learn.names,
        judged_on=judged.names,
        mask=mask,
        polarized=polarized,
        kept_mass=_kept_mass(maps, mask),
        codecs=codecs.codecs if codecs else None,
        codec_summary=_summary(codecs, plain_variance),
        fidelity=rows,
        codec_log=logs[0],
        recovery_log=logs[1],
        student=student,
        workload=sparse,
        reports=reports,
        measured=measured,
        stage_seconds=clock.seconds,
    )


def _photo_sets(images: Photos | tuple[Photos, Photos] | None) -> tuple[Photos, Photos]:
    if images is None:
        return sample_photos()
    return images.split() if isinstance(images, Photos) else images


def _judge_crops(photos: Photos, settings: Settings, generator: np.random.Generator) -> np.ndarray:
    """Central crops of as many photos as asked for; random crops where photos are fewer."""
    count, size = settings.judge_crops, settings.image_size
    central = center_crops(photos.take(list(range(min(count, len(photos))))), size)
    if len(central) == count:
        return central
    return np.concatenate(
        [central, random_crops(photos, size, count - len(central), generator)]
    )


def _fitted_codecs(
    model: nn.Module, crops: np.ndarray, settings: Settings, tell: Callable[[float], None]
) -> tuple[FittedCodecs, FittedCodecs]:
    """Codecs as the settings want them, and plain ones to compare the variance with."""
    moments = head_moments(model, batches(crops, settings.batch_size))
    latent, groups = settings.latent_heads, settings.groups
    plain = fit_codecs(moments, latent, groups, turn=False)
    if not settings.turn:
        return plain, plain
    layers = len(moments)
    return fit_codecs(moments, latent, groups, progress=lambda n: tell(n / layers)), plain


@dataclass
class _Judging:
    """Fidelity of changed models against ``model``, on fixed crops."""

    model: nn.Module
    crops: np.ndarray
    settings: Settings
    saliency: Saliency | None
    dense: Tensor | None = None

    def of(self, changed: nn.Module) -> Fidelity:
        batch, size = self.settings.batch_size, self.settings.image_size
        if self.dense is None:
            self.dense = token_features(self.model, batches(self.crops, batch))
        return judge(changed, self.dense, batches(self.crops, batch), self.saliency, size)

    def masks(self, mask: AttentionMask, tell: Callable[[float], None]) -> dict[str, Fidelity]:
        """The learned mask beside both random controls of equal sparsity."""
        prefix, seed = prefix_tokens(self.model), self.settings.seed
        shapes = mask.shapes
        variants = {
            "random mask, rows as learned": random_mask(
                shapes, like=mask, prefix_tokens=prefix, seed=seed
            ),
            "random mask, uniform": random_mask(
                shapes, sparsity=mask.sparsity, prefix_tokens=prefix, seed=seed
            ),
            "learned mask": mask,
        }
        rows = {}
        for index, (name, variant) in enumerate(variants.items()):
            with attach(self.model, variant, image_size=self.settings.image_size):
                rows[name] = self.of(self.model)
            tell((index + 1) / len(variants))
        return rows


def _train(
    student: nn.Module,
    teacher: nn.Module,
    mask: AttentionMask,
    codecs: FittedCodecs | None,
    learn: Photos,
    settings: Settings,
    judging: _Judging,
    rows: dict[str, Fidelity],
    clock: _Clock,
) -> tuple[Distilled | None, Distilled | None]:
    """Put mask and codecs into ``student``, train both in turn, judge each step."""
    size = settings.image_size
    stream = endless_crops(learn, size, settings.batch_size, settings.seed + 1)
    codec_log, recovery_log = None, None
    if codecs is not None:
        with clock.stage("judging the codec"):
            _fold_where_possible(student, codecs, size)
            with attach_codec(student, codecs.codecs, size):
                rows["codec alone"] = judging.of(student)
    attach(student, mask, image_size=size)
    if codecs is not None:
        if settings.codec_steps:
            with clock.stage("training the codec") as tell:
                codec_log = train_codec(
                    student,
                    teacher,
                    codecs.codecs,
                    stream,
                    steps=settings.codec_steps,
                    progress=lambda share, loss: tell(share),
                )
        attach_codec(student, codecs.codecs, size)
        with clock.stage("judging mask and codec"):
            rows["learned mask + codec"] = judging.of(student)
    if settings.recovery_steps or settings.recovery_seconds:
        seconds = settings.recovery_seconds
        with clock.stage("recovering") as tell:
            recovery_log = recover(
                student,
                teacher,
                stream,
                steps=None if seconds else settings.recovery_steps,
                seconds=seconds,
                progress=lambda share, loss: tell(share),
            )
        with clock.stage("judging the recovered model"):
            rows["recovered, mask + codec" if codecs else "recovered, mask"] = judging.of(student)
    return codec_log, recovery_log


def _fold_where_possible(student: nn.Module, codecs: FittedCodecs, size: int) -> None:
    try:
        fold(student, codecs.codecs, size)
    except ValueError as error:
        warnings.warn(f"the turn stays inside the codec: {error}", stacklevel=2)


def _summary(codecs: FittedCodecs | None, plain: FittedCodecs | None) -> CodecSummary | None:
    if codecs is None:
        return None
    return CodecSummary(
        shapes=codecs.shapes,
        explained=codecs.explained,
        explained_without_turn=plain.explained,
        parameters=sum(p.numel() for p in codecs.codecs.parameters()),
    )


def _simulated(workload: Workload, hardware: Hardware, tell: Callable[[float], None]) -> dict:
    reports = {}
    for index, simulator in enumerate(SIMULATORS):
        reports[simulator] = simulate(workload, hardware, simulator=simulator)
        tell((index + 1) / len(SIMULATORS))
    return reports


def _measured(workload: Workload, batch: int) -> tuple:
    """Dense attention here, one image at a time and in batches, on CPU and GPU."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return tuple(
        row
        for device in devices
        for size in sorted({1, batch})
        for row in measure_attention(workload, batch=size, device=device)
    )


def _kept_mass(maps: tuple[np.ndarray, ...], mask: AttentionMask) -> float:
    """Share of the averaged attention that the mask keeps, mean over heads and queries."""
    kept = [np.where(k, m, 0).sum(-1).mean(1) for m, k in zip(maps, mask.keep, strict=True)]
    return float(np.concatenate(kept).mean())
