"""A trained sparse model: what is attached to it, how it is judged, what it leaves on disk."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from ..ae import CodecErrors, codec_errors
from ..files import write_json
from ..images import IMAGENET, Normalization, Photos, batches, center_crops
from ..models.training.loop import Trained
from ..progress import Progress, silent
from ..provenance import versions
from ..sparsify import Fidelity, accuracy, attach, evaluate, token_features
from .attachments import Attachments
from .result import save_weights

BATCH = 16
"""Crops in a batch for judging; also how many the scales of the machine's integers are from."""


@dataclass(frozen=True, eq=False)
class SparseModel:
    """A trained model, what is attached to it, and the log of each stage.

    classes        names in the order of its logits, where it was trained on labels
    normalization  of its images
    """

    model: nn.Module
    attachments: Attachments
    logs: dict[str, Trained]
    classes: tuple[str, ...] | None = None
    normalization: Normalization = IMAGENET

    def evaluate(
        self,
        dense: nn.Module,
        photos: Photos,
        progress: Progress = silent,
        learned_from: Photos | None = None,
    ) -> dict[str, Fidelity]:
        """Against ``dense`` on central crops of ``photos``: its mask untrained, and this.

        learned_from  photos for the scales of the simulated machine's integers: with them
                      the trained model is judged in int8 too, where that can be done

        With ``classes`` each row has the accuracy, and the dense model a row of its own;
        raises ValueError for photos of another class.
        """
        progress("judging", 0.0)
        judging = _Judging(self, dense, photos)
        rows = {}
        if self.classes is not None:
            rows["dense"] = judging.row(dense)
        mask = self.attachments.mask
        if mask is None:
            raise ValueError("a sparse model has a mask; these attachments hold none")
        with attach(dense, mask, image_size=self.attachments.image_size):
            rows["mask, untrained"] = judging.row(dense)
        progress("judging", 0.4)
        name = "mask, trained" if self.attachments.codecs is None else "mask + codec, trained"
        with self.attachments.attach(self.model):
            rows[name] = judging.row(self.model)
        progress("judging", 0.7)
        if learned_from is not None:
            rows |= self._in_integers(judging, learned_from)
        progress("judging", 1.0)
        return rows

    def _in_integers(self, judging: _Judging, photos: Photos) -> dict[str, Fidelity]:
        step = -(-len(photos) // BATCH)
        some = self.central(photos.take(list(range(0, len(photos), step))))
        try:
            with self.attachments.attach_int8(self.model, some):
                return {"as above, attention in int8": judging.row(self.model)}
        except ValueError as error:
            warnings.warn(f"not judged in integers: {error}", stacklevel=3)
            return {}

    def codec_errors(self, photos: Photos) -> tuple[CodecErrors, ...]:
        """Of each layer, under the mask, on central crops of ``photos``; () without codecs."""
        codecs, size = self.attachments.codecs, self.attachments.image_size
        if codecs is None:
            return ()
        crops = self.central(photos)
        with replace(self.attachments, codecs=None).attach(self.model):
            return codec_errors(self.model, codecs, crops, size)

    def central(self, photos: Photos) -> list[Tensor]:
        """Batches of their central crops, as the model takes them."""
        crops = center_crops(photos, self.attachments.image_size)
        return list(batches(crops, BATCH, self.normalization))

    def save(
        self,
        folder: Path,
        fidelity: Mapping[str, Fidelity],
        errors: Sequence[CodecErrors] = (),
    ) -> tuple[Path, ...]:
        """Write model.safetensors, attachments.safetensors and training.json (settings,
        losses of each stage, ``fidelity``, ``errors`` of the codecs by layer); each whole
        or not at all."""
        paths = tuple(
            folder / n for n in ("model.safetensors", "attachments.safetensors", "training.json")
        )
        save_weights(self.model, paths[0])
        self.attachments.save(paths[1])
        content = {
            "settings": dict(self.attachments.settings),
            "classes": self.classes,
            "versions": versions(),
            "losses": {stage: list(log.losses) for stage, log in self.logs.items()},
            "fidelity": {name: asdict(row) for name, row in fidelity.items()},
            "codec_errors": [asdict(row) for row in errors],
        }
        write_json(content, paths[2])
        return paths


class _Judging:
    """Crops to judge on, with the dense model's tokens and their classes."""

    def __init__(self, found: SparseModel, dense: nn.Module, photos: Photos) -> None:
        self.size = found.attachments.image_size
        classes = found.classes
        self.labels = None if classes is None else class_labels(photos, classes)[1]
        self.crops = found.central(photos)
        self.dense = token_features(dense, self.crops)

    def row(self, model: nn.Module) -> Fidelity:
        found = evaluate(model, self.dense, self.crops, image_size=self.size)
        if self.labels is None:
            return found
        return replace(found, accuracy=accuracy(model, self.crops, self.labels))


def class_labels(
    photos: Photos, classes: Sequence[str] | None = None
) -> tuple[tuple[str, ...], list[int]]:
    """(class names, the class of each photo), from the first folder of their names.

    ``classes`` None takes the folders in alphabetical order. Raises ValueError where photos
    lie in no folder, in one that is none of ``classes``, or all in one.
    """
    loose = [name for name in photos.names if len(Path(name).parts) < 2]
    if loose:
        raise ValueError(f"labels are the folders that photos lie in; {loose[0]!r} lies in none")
    folders = [Path(name).parts[0] for name in photos.names]
    if classes is None:
        classes = sorted(set(folders))
        if len(classes) < 2:
            raise ValueError(
                f"labelled training needs photos of at least 2 classes, got {classes[0]!r} alone"
            )
    known = {name: index for index, name in enumerate(classes)}
    for name, folder in zip(photos.names, folders, strict=True):
        if folder not in known:
            raise ValueError(f"{name!r} is of none of the classes {', '.join(known)}")
    return tuple(classes), [known[folder] for folder in folders]
