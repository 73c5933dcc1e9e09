"""From a checkpoint and a folder of photos to a sparse model: the training in full.

ViTCoD's two steps (codec first, then the mask on the model as trained with it), both at
once, or the mask alone; with labels or, without any, by distilling the dense model. Each
stage keeps checkpoints in its own folder and resumes there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..accel import Hardware, presets
from ..ae import Reconstruction
from ..images import IMAGENET, Normalization, Photos, batches, endless_crops, random_crops
from ..models.features import as_logits
from ..models.training.loop import Checkpointing, Trained
from ..models.training.objectives import TokenLoss
from ..models.training.processes import rank, world_size
from ..models.training.recipe import Recipe
from ..moved import old_arguments
from ..progress import Progress, silent
from ..sparsify import GradualMask, attach, finetune
from ..workload import PUBLISHED_GLOBAL_THRESHOLD, AttentionMask
from .settings import AMOUNTS, CodecSettings, MaskSettings
from .sparse_model import SparseModel, class_labels
from .sparsifier import Sparsifier
from .training_log import TrainingLog

MODES = ("two-step", "joint", "mask")


NEWER = tuple(f.name for f in fields(MaskSettings) if f.name != "sparsity") + ("rotation",)
"""Settings that checkpoints of earlier versions do not name; they had today's defaults, but
for `PUBLISHED_GLOBAL_THRESHOLD`."""


@old_arguments("min_kept", "turn")
@dataclass(frozen=True, kw_only=True)
class TrainSettings(MaskSettings, CodecSettings):
    """Settings of `train_sparse`, with those of `MaskSettings` and `CodecSettings`; checks
    itself.

    mode              "two-step": the codec is trained with the blocks, then the mask is
                      learned from that model and both are trained on (ViTCoD section VI-A);
                      "joint": codec and mask from the start; "mask": no codec
    labels            cross entropy with the photos' classes instead of distillation
    prefix_share, block_weight, attention_weight  of the distillation: see `TokenLoss`
    steps             optimizer steps of each stage, ``batch_size`` photos each, over all
                      processes; made of ``accumulate`` micro-batches
    gradual           the mask grows sparser by a cubic over the first half of the steps
    learn_crops       crops for the averaged attention and the codec's closed form
    """

    image_size: int = 224
    normalization: Normalization = IMAGENET
    mode: str = "mask"
    labels: bool = False
    prefix_share: float | None = TokenLoss.prefix_share
    block_weight: float = TokenLoss.block_weight
    attention_weight: float = TokenLoss.attention_weight
    steps: int = 200
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 2e-5
    ema_decay: float = 0.0
    gradual: bool = False
    recompute: bool = False
    learn_crops: int = 128
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        MaskSettings.__post_init__(self)
        CodecSettings.__post_init__(self)
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        for name in ("image_size", "steps", "batch_size", "accumulate", "learn_crops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _ = self.loss  # checks itself
        if self.gradual and (self.rule != "information" or self.sparsity is None):
            amounts = {name: getattr(self, name) for name in AMOUNTS}
            got = next(f"{name}={value}" for name, value in amounts.items() if value is not None)
            raise ValueError(
                'a mask grows by the rule "information" to a sparsity alone, got '
                f"gradual=True, rule={self.rule!r}, {got}"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"a batch of {self.batch_size} photos cannot be cut into {self.accumulate} "
                "micro-batches of equal size"
            )

    @property
    def loss(self) -> TokenLoss:
        return TokenLoss(self.prefix_share, self.block_weight, self.attention_weight)

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            learning_rate=self.learning_rate,
            accumulate=self.accumulate,
            ema_decay=self.ema_decay,
            full_rate_loss=0.0,
        )


def train_sparse(
    model: nn.Module,
    photos: Photos,
    settings: TrainSettings = TrainSettings(),
    folder: Path | None = None,
    progress: Progress = silent,
    *,
    mask: AttentionMask | None = None,
    hardware: Hardware = presets["vitcod"],
) -> SparseModel:
    """Make ``model`` sparse and train it so; ``model`` itself is not changed.

    photos    to train on; with ``settings.labels`` their first folder is their class
    folder    for checkpoints and logs, a folder a stage; what is there is resumed
    mask      to train with, in place of one learned from ``photos``, say of
              `sievit.sparsify.budgeted_masks`; ``settings.sparsity`` is then the mask's
    hardware  the simulated machine that ``settings.cycles`` are counted on

    With several processes (`torchrun`) each takes its share of every batch. Raises
    ValueError for photos without classes where labels are wanted, more processes than
    photos in a micro-batch, a mask that does not fit or should grow (``gradual``), and a
    resume with other settings or another mask.
    """
    torch.manual_seed(settings.seed)
    if mask is not None:
        if settings.gradual:
            raise ValueError("a mask that is given cannot grow: gradual=True learns its own")
        with attach(model, mask, image_size=settings.image_size):
            pass  # it fits: said now, not after the codec's training
        settings = replace(
            settings.with_amount(sparsity=mask.sparsity), global_threshold=mask.global_threshold
        )
    sparse = Sparsifier(model, settings.image_size, hardware).copied()
    run = _Training(sparse, photos, settings, folder, progress, mask)
    if settings.mode == "mask":
        run.train("mask", run.find_mask())
    elif settings.mode == "joint":
        found = run.find_mask()
        run.put_codec()
        run.train("joint", found)
    else:
        run.put_codec()
        run.train("codec", None)
        run.train("mask", run.find_mask())
    return run.finished()


class _Training:
    """A model as it goes through the stages."""

    def __init__(
        self,
        sparse: Sparsifier,
        photos: Photos,
        settings: TrainSettings,
        folder: Path | None,
        progress: Progress,
        mask: AttentionMask | None,
    ) -> None:
        self.sparse, self.teacher, self.student = sparse, sparse.dense, sparse.model
        self.photos, self.settings = photos, settings
        self.folder, self.progress = folder, progress
        self.classes, self.labels = (
            _classes(self.teacher, photos, settings) if settings.labels else (None, None)
        )
        self.codec_term: Reconstruction | None = None
        self.given = self.sparse.mask = mask
        self.logs: dict[str, Trained] = {}
        _check_processes(settings)

    def find_mask(self) -> AttentionMask:
        """The mask given, or one from the attention of the student as it stands now."""
        if self.given is not None:
            return self.given
        self.progress("averaging attention", 0.0)
        self.sparse.average(self._learn_batches())
        self.progress("averaging attention", 1.0)
        return self.sparse.make_mask(self.settings, self.settings.seed)

    def put_codec(self) -> None:
        """Codecs in closed form, their rotation folded into the student where it can be."""
        self.progress("fitting the codec", 0.0)
        self.sparse.observe_heads(self._learn_batches())
        codecs = self.sparse.fit_codecs(self.settings).codecs
        self.sparse.fold(codecs)
        self.codec_term = Reconstruction(codecs)
        self.sparse.put_codecs(self.codec_term.watch)
        self.progress("fitting the codec", 1.0)

    def train(self, stage: str, mask: AttentionMask | None) -> None:
        settings = self.settings
        gradual = None
        if mask is not None and settings.gradual and settings.sparsity is not None:
            gradual = GradualMask(
                self.sparse.maps,
                settings.sparsity,
                prefix_tokens=self.sparse.prefix,
                image_size=settings.image_size,
            )
        elif mask is not None:
            self.sparse.put_mask(mask)
        with self._log(stage) as listener:
            self.logs[stage] = finetune(
                self.student,
                self._stream,
                teacher=None if settings.labels else self.teacher,
                loss=settings.loss,
                extra=self.codec_term,
                steps=settings.steps,
                recipe=settings.recipe,
                gradual=gradual,
                recompute=settings.recompute,
                checkpointing=self._checkpointing(stage),
                listener=listener,
            )
        if gradual is not None and gradual.handle is not None:
            self.sparse.attached.enter_context(gradual.handle)

    def finished(self) -> SparseModel:
        """The student with nothing attached, and what belongs around it."""
        self.sparse.remove()
        settings = self.settings
        attachments = self.sparse.attachments(asdict(settings))
        return SparseModel(
            self.student, attachments, self.logs, self.classes, settings.normalization
        )

    def _learn_batches(self) -> Iterator[Tensor]:
        """Crops for the averaged attention and the codec's closed form."""
        settings, generator = self.settings, np.random.default_rng(self.settings.seed)
        crops = random_crops(self.photos, settings.image_size, settings.learn_crops, generator)
        return batches(crops, settings.batch_size, settings.normalization)

    def _stream(self, start: int) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        """This process's micro-batches from the ``start``-th on."""
        settings, several = self.settings, world_size()
        micro = settings.batch_size // settings.accumulate
        crops = endless_crops(
            self.photos,
            settings.image_size,
            micro,
            settings.seed + 1,
            start,
            self.labels,
            settings.normalization,
        )
        for batch in crops:
            if isinstance(batch, Tensor):
                yield batch[rank() :: several]
            else:
                images, labels = batch
                yield images[rank() :: several], labels[rank() :: several]

    def _checkpointing(self, stage: str) -> Checkpointing | None:
        if self.folder is None:
            return None
        usual: dict[str, tuple[Any, ...]] = {
            f.name: (f.default,) for f in fields(self.settings) if f.name in NEWER
        }
        # How a mask is polarized changes nothing of the training, so a training that was
        # begun under the earlier default is resumed under today's.
        usual["global_threshold"] += (PUBLISHED_GLOBAL_THRESHOLD,)
        settings = {
            name: value
            for name, value in asdict(self.settings).items()
            if name not in usual or value not in usual[name]
        }
        settings["photos"] = len(self.photos)
        if self.settings.cycles is not None:
            settings["hardware"] = asdict(self.sparse.hardware)
        if self.given is not None:
            settings["mask"] = self.given.digest
        return Checkpointing(self.folder / stage, self.settings.checkpoint_every, settings)

    def _log(self, stage: str) -> _Listeners:
        folder = self.folder if rank() == 0 else None
        log = None if folder is None else TrainingLog(folder / stage)
        return _Listeners(log, lambda share: self.progress(f"training: {stage}", share))


class _Listeners:
    """Progress, and the log where there is one."""

    def __init__(self, log: TrainingLog | None, tell: Callable[[float], None]) -> None:
        self.log, self.tell = log, tell

    def __call__(self, step: int, rate: float, terms: Mapping[str, float], share: float) -> None:
        self.tell(share)
        if self.log is not None:
            self.log(step, rate, terms, share)

    def __enter__(self) -> _Listeners:
        self.tell(0.0)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.log is not None:
            self.log.close()
        self.tell(1.0)


def _check_processes(settings: TrainSettings) -> None:
    micro, several = settings.batch_size // settings.accumulate, world_size()
    if micro % several:
        raise ValueError(
            f"{several} processes cannot share micro-batches of {micro} photos equally "
            f"(batch {settings.batch_size} / accumulate {settings.accumulate})"
        )


def _classes(
    model: nn.Module, photos: Photos, settings: TrainSettings
) -> tuple[tuple[str, ...], list[int]]:
    """`class_labels`, for a model that gives one logit a class."""
    classes, labels = class_labels(photos)
    size, device = settings.image_size, next(model.parameters()).device
    with torch.no_grad():
        outputs = as_logits(model(torch.zeros(1, 3, size, size, device=device)))
    if outputs.shape[-1] != len(classes):
        raise ValueError(
            f"the model gives {outputs.shape[-1]} outputs, the photos have {len(classes)} classes"
        )
    return classes, labels
