"""From a checkpoint and a folder of photos to a sparse model: the training in full.

ViTCoD's two steps (codec first, then the mask on the model as trained with it), both at
once, or the mask alone; with labels or, without any, by distilling the dense model. Each
stage keeps checkpoints in its own folder and resumes there.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .ae import Reconstruction, attach_codec, fit_codecs, fold, head_moments
from .attachments import Attachments
from .images import Photos, batches, center_crops, endless_crops, random_crops
from .masks import AttentionMask
from .models import prefix_tokens
from .models.objectives import TokenLoss
from .models.processes import rank, world_size
from .models.recipe import Recipe
from .models.training import Checkpointing, Trained
from .result import save_weights, versions, write_json
from .sparsify import (
    Fidelity,
    GradualMask,
    attach,
    average_attention,
    finetune,
    judge,
    threshold,
    token_features,
)
from .training_log import TrainingLog

Progress = Callable[[str, float], None]
"""Called with (stage, share of the stage done)."""

MODES = ("two-step", "joint", "mask")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of `train_sparse`; checks itself.

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
    sparsity: float = 0.9
    mode: str = "mask"
    latent_heads: int | None = None
    groups: int = 1
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
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        for name in ("image_size", "steps", "batch_size", "accumulate", "learn_crops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _ = self.loss  # checks itself
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


@dataclass(frozen=True, eq=False)
class SparseModel:
    """A trained model, what is attached to it, and the log of each stage."""

    model: nn.Module
    attachments: Attachments
    logs: dict[str, Trained]

    def judge(
        self, dense: nn.Module, photos: Photos, progress: Progress = lambda stage, share: None
    ) -> dict[str, Fidelity]:
        """Against ``dense`` on central crops of ``photos``: its mask untrained, and this."""
        size, mask = self.attachments.image_size, self.attachments.mask
        crops = list(batches(center_crops(photos, size), 16))
        progress("judging", 0.0)
        wanted = token_features(dense, crops)
        with attach(dense, mask, image_size=size):
            rows = {"mask, untrained": judge(dense, wanted, crops, image_size=size)}
        progress("judging", 0.5)
        name = "mask, trained" if self.attachments.codecs is None else "mask + codec, trained"
        with self.attachments.attach(self.model):
            rows[name] = judge(self.model, wanted, crops, image_size=size)
        progress("judging", 1.0)
        return rows

    def save(self, folder: Path, fidelity: Mapping[str, Fidelity]) -> tuple[Path, ...]:
        """Write model.safetensors, attachments.safetensors and training.json (settings,
        losses of each stage, ``fidelity``); each whole or not at all."""
        paths = tuple(
            folder / n for n in ("model.safetensors", "attachments.safetensors", "training.json")
        )
        save_weights(self.model, paths[0])
        self.attachments.save(paths[1])
        content = {
            "settings": dict(self.attachments.settings),
            "versions": versions(),
            "losses": {stage: list(log.losses) for stage, log in self.logs.items()},
            "fidelity": {name: asdict(row) for name, row in fidelity.items()},
        }
        write_json(content, paths[2])
        return paths


def train_sparse(
    model: nn.Module,
    photos: Photos,
    settings: TrainSettings = TrainSettings(),
    folder: Path | None = None,
    progress: Progress = lambda stage, share: None,
) -> SparseModel:
    """Make ``model`` sparse and train it so; ``model`` itself is not changed.

    photos    to train on; with ``settings.labels`` their first folder is their class
    folder    for checkpoints and logs, a folder a stage; what is there is resumed

    With several processes (`torchrun`) each takes its share of every batch. Raises
    ValueError for photos without classes where labels are wanted, more processes than
    photos in a micro-batch, and a resume with other settings.
    """
    torch.manual_seed(settings.seed)
    run = _Training(model, photos, settings, folder, progress)
    if settings.mode == "mask":
        run.train("mask", run.learn_mask())
    elif settings.mode == "joint":
        mask = run.learn_mask()
        run.put_codec()
        run.train("joint", mask)
    else:
        run.put_codec()
        run.train("codec", None)
        run.train("mask", run.learn_mask())
    return run.finished()


class _Training:
    """A model as it goes through the stages."""

    def __init__(
        self,
        model: nn.Module,
        photos: Photos,
        settings: TrainSettings,
        folder: Path | None,
        progress: Progress,
    ) -> None:
        self.teacher, self.student = model, copy.deepcopy(model)
        self.photos, self.settings = photos, settings
        self.folder, self.progress = folder, progress
        self.labels = _labels(model, photos, settings) if settings.labels else None
        self.attached = ExitStack()
        self.codec_term: Reconstruction | None = None
        self.maps: tuple[np.ndarray, ...] = ()
        self.mask: AttentionMask | None = None
        self.logs: dict[str, Trained] = {}
        _check_processes(settings)

    def learn_mask(self) -> AttentionMask:
        """From the attention of the student as it stands now."""
        generator = np.random.default_rng(self.settings.seed)
        crops = random_crops(
            self.photos, self.settings.image_size, self.settings.learn_crops, generator
        )
        self.progress("averaging attention", 0.0)
        self.maps = average_attention(self.student, batches(crops, self.settings.batch_size))
        self.progress("averaging attention", 1.0)
        prefix = prefix_tokens(self.student)
        self.mask = threshold(self.maps, sparsity=self.settings.sparsity, prefix_tokens=prefix)
        return self.mask

    def put_codec(self) -> None:
        """Codecs in closed form, their turn folded into the student where it can be."""
        settings = self.settings
        generator = np.random.default_rng(settings.seed)
        crops = random_crops(self.photos, settings.image_size, settings.learn_crops, generator)
        self.progress("fitting the codec", 0.0)
        moments = head_moments(self.student, batches(crops, settings.batch_size))
        codecs = fit_codecs(moments, settings.latent_heads, settings.groups).codecs
        try:
            fold(self.student, codecs, settings.image_size)
        except ValueError as error:
            warnings.warn(f"the turn stays inside the codec: {error}", stacklevel=2)
        self.codec_term = Reconstruction(codecs)
        handle = attach_codec(self.student, codecs, settings.image_size, self.codec_term.watch)
        self.attached.enter_context(handle)
        self.progress("fitting the codec", 1.0)

    def train(self, stage: str, mask: AttentionMask | None) -> None:
        settings = self.settings
        gradual = None
        if mask is not None and settings.gradual:
            gradual = GradualMask(
                self.maps,
                settings.sparsity,
                prefix_tokens=prefix_tokens(self.student),
                image_size=settings.image_size,
            )
        elif mask is not None:
            self.attached.enter_context(attach(self.student, mask, image_size=settings.image_size))
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
        if gradual is not None:
            self.attached.enter_context(gradual.handle)

    def finished(self) -> SparseModel:
        """The student with nothing attached, and what belongs around it."""
        self.attached.close()
        codecs = None if self.codec_term is None else self.codec_term.codecs
        settings = self.settings
        attachments = Attachments(settings.image_size, self.mask, codecs, asdict(settings))
        return SparseModel(self.student, attachments, self.logs)

    def _stream(self, start: int) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        """This process's micro-batches from the ``start``-th on."""
        settings, several = self.settings, world_size()
        micro = settings.batch_size // settings.accumulate
        crops = endless_crops(
            self.photos, settings.image_size, micro, settings.seed + 1, start, self.labels
        )
        for batch in crops:
            if isinstance(batch, Tensor):
                yield batch[rank() :: several]
            else:
                yield tuple(part[rank() :: several] for part in batch)

    def _checkpointing(self, stage: str) -> Checkpointing | None:
        if self.folder is None:
            return None
        settings = asdict(self.settings) | {"photos": len(self.photos)}
        return Checkpointing(self.folder / stage, self.settings.checkpoint_every, settings)

    def _log(self, stage: str) -> _Listeners:
        writes = self.folder is not None and rank() == 0
        log = TrainingLog(self.folder / stage) if writes else None
        return _Listeners(log, lambda share: self.progress(f"training: {stage}", share))


class _Listeners:
    """Progress, and the log where there is one."""

    def __init__(self, log: TrainingLog | None, tell: Callable[[float], None]) -> None:
        self.log, self.tell = log, tell

    def __call__(self, step: int, rate: float, terms: dict[str, float], share: float) -> None:
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


def class_labels(photos: Photos) -> tuple[tuple[str, ...], list[int]]:
    """(class names, the class of each photo), from the first folder of their names.

    Raises ValueError where photos lie in no folder, or all in one.
    """
    loose = [name for name in photos.names if len(Path(name).parts) < 2]
    if loose:
        raise ValueError(f"labels are the folders that photos lie in; {loose[0]!r} lies in none")
    folders = [Path(name).parts[0] for name in photos.names]
    classes = tuple(sorted(set(folders)))
    if len(classes) < 2:
        raise ValueError(
            f"labelled training needs photos of at least 2 classes, got {classes[0]!r} alone"
        )
    return classes, [classes.index(folder) for folder in folders]


def _check_processes(settings: TrainSettings) -> None:
    micro, several = settings.batch_size // settings.accumulate, world_size()
    if micro % several:
        raise ValueError(
            f"{several} processes cannot share micro-batches of {micro} photos equally "
            f"(batch {settings.batch_size} / accumulate {settings.accumulate})"
        )


def _labels(model: nn.Module, photos: Photos, settings: TrainSettings) -> list[int]:
    """The class of each photo, for a model that gives one logit a class."""
    classes, labels = class_labels(photos)
    size, device = settings.image_size, next(model.parameters()).device
    with torch.no_grad():
        outputs = model(torch.zeros(1, 3, size, size, device=device))
    outputs = outputs.logits if hasattr(outputs, "logits") else outputs
    if outputs.shape[-1] != len(classes):
        raise ValueError(
            f"the model gives {outputs.shape[-1]} outputs, the photos have {len(classes)} classes"
        )
    return labels
