"""One co-design run as it goes on: what `pipeline` does stage by stage.

A `Run` holds the photos and their crops, the fidelity found so far and the seconds of each
stage; its methods are the stages, in the order in which `pipeline.codesign` walks them.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn

from ..accel import Hardware, Report, arithmetic_of, simulate
from ..accel.kernels import MeasuredAttention, measure_attention
from ..ae import CodecErrors, FittedCodecs, attach_codec, codec_errors, train_codec
from ..images import Photos, batches, center_crops, endless_crops, random_crops
from ..models import trace
from ..models.training.loop import Trained
from ..models.training.recipe import Recipe
from ..progress import Progress
from ..sparsify import (
    Fidelity,
    attach,
    evaluate,
    random_mask,
    recover,
    token_features,
)
from ..sparsify.fidelity import Saliency
from ..workload import AttentionMask, Workload
from .settings import Settings, rate_for
from .sparsifier import Sparsifier

SIMULATORS = ("systolic", "vitcod_plain", "vitcod_no_reorder", "vitcod_no_codec", "vitcod")

INT8_CROPS = 16
"""Crops that the scales of the machine's integers are taken from."""

Tell = Callable[[float], None]
Batch = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Images, or images and labels."""


class Run:
    """One co-design run as it goes on: photos, crops, fidelity so far, seconds by stage."""

    def __init__(
        self,
        model: nn.Module,
        photos: tuple[Photos, Photos],
        settings: Settings,
        saliency: Saliency | None,
        progress: Progress,
        hardware: Hardware,
    ) -> None:
        self.hardware = hardware
        self.sparse = Sparsifier(model, settings.image_size, hardware)
        self.model, self.settings, self.saliency = model, settings, saliency
        self.learn, self.judged = photos
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.fidelity: dict[str, Fidelity] = {}
        self.codec_errors: tuple[CodecErrors, ...] = ()
        generator = np.random.default_rng(settings.seed)
        size = settings.image_size
        self.learn_crops = random_crops(self.learn, size, settings.learn_crops, generator)
        self.judge_crops = _judge_crops(self.judged, settings, generator)
        self.dense: torch.Tensor | None = None  # tokens of the unchanged model

    def batches(self, crops: np.ndarray) -> Iterator[torch.Tensor]:
        """``crops`` as the model takes them."""
        return batches(crops, self.settings.batch_size, self.settings.normalization)

    @contextmanager
    def stage(self, name: str) -> Iterator[Tell]:
        begin = time.perf_counter()
        self.progress(name, 0.0)
        yield lambda share: self.progress(name, share)
        self.progress(name, 1.0)
        self.seconds[name] = time.perf_counter() - begin

    def average(self) -> None:
        """Average the attention over the crops that are learned from."""
        crops = self.learn_crops
        with self.stage("averaging attention") as tell:
            self.sparse.average(self.batches(crops), lambda done: tell(done / len(crops)))

    def learn_mask(self) -> AttentionMask:
        """The mask that the settings' rule or budget makes of averaged attention."""
        self.average()
        settings = self.settings
        if not settings.has_budget:
            return self.sparse.make_mask(settings, settings.seed)
        with self.stage("choosing entries by what they cost"):
            return self.sparse.make_mask(settings, settings.seed)

    def fit_codecs(self) -> tuple[FittedCodecs, FittedCodecs]:
        """Codecs as the settings want them, and ones without rotation to compare with."""
        settings, sparse = self.settings, self.sparse
        with self.stage("fitting the codec") as tell:
            sparse.observe_heads(self.batches(self.learn_crops))
            plain, layers = sparse.fit_codecs(settings, rotation=False), len(sparse.moments)
            if not settings.rotation:
                return plain, plain
            fitted = sparse.fit_codecs(settings, progress=lambda n: tell(n / layers))
        return fitted, plain

    def evaluate(self, changed: nn.Module) -> Fidelity:
        """Fidelity of ``changed`` as it stands, against the dense model."""
        if self.dense is None:
            raise ValueError("the dense model is judged first, by `judge_masks`")
        crops = self.batches(self.judge_crops)
        return evaluate(changed, self.dense, crops, self.saliency, self.settings.image_size)

    def judge_masks(self, mask: AttentionMask) -> None:
        """The learned mask beside both random controls of equal sparsity."""
        chance = partial(
            random_mask, mask.shapes, prefix_tokens=self.sparse.prefix, seed=self.settings.seed
        )
        variants = {
            "random mask, rows as learned": chance(like=mask),
            "random mask, uniform": chance(sparsity=mask.sparsity),
            "learned mask": mask,
        }
        with self.stage("judging masks") as tell:
            crops = self.batches(self.judge_crops)
            self.dense = token_features(self.model, crops)
            for index, (name, variant) in enumerate(variants.items()):
                with attach(self.model, variant, image_size=self.settings.image_size):
                    self.fidelity[name] = self.evaluate(self.model)
                tell((index + 1) / len(variants))

    def judge_unrotated(self, plain: FittedCodecs) -> None:
        """Codecs for heads as they are, to show what rotating them is worth."""
        size = self.settings.image_size
        with (
            self.stage("judging the codec without rotation"),
            attach_codec(self.model, plain.codecs, size),
        ):
            self.fidelity["codec alone, heads not rotated"] = self.evaluate(self.model)

    def train(
        self, mask: AttentionMask, codecs: FittedCodecs | None
    ) -> tuple[nn.Module, Trained | None, Trained | None]:
        """A copy of the model with mask and codecs in it, trained and judged step by step."""
        settings = self.settings
        size, suffix = settings.image_size, " + codec" if codecs else ""
        stream = endless_crops(
            self.learn, size, settings.batch_size, settings.seed + 1, by=settings.normalization
        )
        self.sparse = self.sparse.copied()
        student = self.sparse.model
        codec_log = recovery_log = None
        if codecs:
            codec_log = self._put_codec(mask, codecs, stream)
        else:
            self.sparse.put_mask(mask)
        seconds, steps = settings.recovery_seconds, settings.recovery_steps
        if seconds or steps:
            recipe = Recipe(learning_rate=settings.recovery_rate or rate_for(len(self.learn)))
            with self.stage("recovering") as tell:
                recovery_log = recover(
                    student,
                    self.model,
                    stream,
                    steps=None if seconds else steps,
                    seconds=seconds,
                    recipe=recipe,
                    listener=lambda step, rate, terms, share: tell(share),
                )
            with self.stage("judging the recovered model"):
                self.fidelity[f"learned mask{suffix}, recovered"] = self.evaluate(student)
        return student, codec_log, recovery_log

    def _put_codec(
        self, mask: AttentionMask, codecs: FittedCodecs, stream: Iterator[Batch]
    ) -> Trained | None:
        """Fold the rotation, judge the codec alone, attach the mask, train, attach the codec."""
        size, steps, log = self.settings.image_size, self.settings.codec_steps, None
        sparse, student = self.sparse, self.sparse.model
        with self.stage("judging the codec"):
            sparse.fold(codecs.codecs)
            with attach_codec(student, codecs.codecs, size):
                self.fidelity["codec alone"] = self.evaluate(student)
        sparse.put_mask(mask)
        if steps:
            with self.stage("training the codec") as tell:
                log = train_codec(
                    student,
                    self.model,
                    codecs.codecs,
                    stream,
                    steps=steps,
                    listener=lambda step, rate, terms, share: tell(share),
                )
        with self.stage("judging mask and codec"):
            some = self.batches(self.judge_crops[: self.settings.batch_size])
            self.codec_errors = codec_errors(student, codecs.codecs, some, size)
            sparse.put_codecs()
            self.fidelity["learned mask + codec"] = self.evaluate(student)
        return log

    def judge_integers(self) -> None:
        """The trained model with its attention in the hardware's integers, whose scales come
        from crops that were learned from; left out, with a warning, where the model writes
        its softmax out or the widths are none that `Arithmetic` takes."""
        attached = self.sparse.attachments()
        bare = copy.deepcopy(self.model)
        bare.load_state_dict(self.sparse.model.state_dict())
        with self.stage("judging in integers"):
            some = self.batches(self.learn_crops[:INT8_CROPS])
            try:
                widths = arithmetic_of(self.hardware)
                with attached.attach_int8(bare, some, widths):
                    name = f"as above, attention in int{widths.operand_bits}"
                    self.fidelity[name] = self.evaluate(bare)
            except ValueError as error:
                warnings.warn(f"not judged in integers: {error}", stacklevel=2)

    def traced(self, name: str | None) -> Workload:
        """The dense network as operations."""
        workload = trace(self.model, self.settings.image_size)
        return workload if name is None else replace(workload, name=name)

    def simulate(self, workload: Workload) -> dict[str, Report]:
        """The workload on every machine of `SIMULATORS`."""
        reports = {}
        with self.stage("simulating") as tell:
            for index, simulator in enumerate(SIMULATORS):
                reports[simulator] = simulate(workload, self.hardware, simulator=simulator)
                tell((index + 1) / len(SIMULATORS))
        return reports

    def measure(self, workload: Workload) -> tuple[MeasuredAttention, ...]:
        """Dense attention here, for one image and for a batch, on CPU and GPU."""
        devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        with self.stage("measuring this machine"):
            return tuple(
                row
                for device in devices
                for batch in sorted({1, self.settings.batch_size})
                for row in measure_attention(workload, batch=batch, device=device)
            )


def _judge_crops(photos: Photos, settings: Settings, generator: np.random.Generator) -> np.ndarray:
    """Central crops of as many photos as asked for; random crops where photos are fewer."""
    count, size = settings.judge_crops, settings.image_size
    central = center_crops(photos.take(list(range(min(count, len(photos))))), size)
    if len(central) == count:
        return central
    return np.concatenate([central, random_crops(photos, size, count - len(central), generator)])
