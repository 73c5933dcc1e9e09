"""Photos -> normalised batches: a folder of the user's own, or scikit-image's samples.

Photos stay uint8 until a batch is made; crops are cut and resized bicubically by Pillow.
Everything random comes from a seed.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
Channels = tuple[float, float, float]
"""Red, green, blue."""

SAMPLES_TO_LEARN_FROM = ("astronaut", "camera", "clock", "coffee", "stereo_motorcycle")
SAMPLES_TO_JUDGE_ON = ("cat", "coins", "rocket")


@dataclass(frozen=True)
class Normalization:
    """Pixels in [0, 1] as a model wants them: (pixel - ``mean``) / ``std``, by default those
    of ImageNet, which DeiT, DINOv2 and torchvision expect."""

    mean: Channels = (0.485, 0.456, 0.406)
    std: Channels = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3 or (name == "std" and min(values) <= 0):
                above = ", each above 0" if name == "std" else ""
                raise ValueError(f"{name} has 3 channels{above}, got {values}")
            object.__setattr__(self, name, values)


IMAGENET = Normalization()
NORMALIZATIONS = {
    "imagenet": IMAGENET,
    "inception": Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": Normalization(
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ),
}
"""By the names that timm and others use: "inception" is of the original ViTs and of timm's
"augreg", "clip" of OpenAI's."""


@dataclass(frozen=True, eq=False)
class Photos:
    """Decoded photos: ``arrays`` uint8 [height, width, 3], with their ``names``."""

    names: tuple[str, ...]
    arrays: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.arrays)

    def split(self, every: int = 4) -> tuple[Photos, Photos]:
        """(to learn from, to judge on): every ``every``-th photo is held out."""
        if len(self) < 2:
            raise ValueError(
                f"at least 2 photos are needed, some to learn from and others to judge on; "
                f"got {len(self)}"
            )
        held = [i for i in range(len(self)) if i % every == every - 1] or [len(self) - 1]
        return self.take([i for i in range(len(self)) if i not in set(held)]), self.take(held)

    def take(self, indices: list[int]) -> Photos:
        """The photos at ``indices``, in that order."""
        return Photos(tuple(self.names[i] for i in indices), tuple(self.arrays[i] for i in indices))


def image_paths(folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Image files anywhere under ``folder``, sorted. Raises ValueError where there is none."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"image folder {str(folder)!r} does not exist or is not a folder")
    paths = tuple(sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES))
    if not paths:
        raise ValueError(f"image folder {str(folder)!r} holds no file ending in {SUFFIXES}")
    return paths


def load_folder(
    folder: str | os.PathLike[str], limit: int | None = None, longest_side: int = 1024
) -> Photos:
    """Decode the photos under ``folder`` in sorted order, ``limit`` of them, evenly spread.

    A file that cannot be decoded is skipped with a warning that names it; ValueError when
    none is left. Photos beyond ``longest_side`` are reduced while decoding.
    """
    paths = image_paths(folder)
    names, arrays = [], []
    for path in _spread(paths, limit):
        try:
            with Image.open(path) as image:
                image.draft("RGB", (longest_side, longest_side))
                arrays.append(_reduced(image.convert("RGB"), longest_side))
            names.append(str(path.relative_to(folder)))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            warnings.warn(f"skipped {path}: {error}", stacklevel=2)
    if not arrays:
        raise ValueError(f"none of the {len(paths)} image files in {str(folder)!r} can be read")
    return Photos(tuple(names), tuple(arrays))


def _spread(paths: tuple[Path, ...], limit: int | None) -> tuple[Path, ...]:
    if limit is None or limit >= len(paths):
        return paths
    return tuple(paths[i * len(paths) // limit] for i in range(limit))


def _reduced(image: Image.Image, longest_side: int) -> np.ndarray:
    image.thumbnail((longest_side, longest_side), Image.Resampling.BICUBIC)
    return np.asarray(image)


def sample_photos() -> tuple[Photos, Photos]:
    """(to learn from, to judge on): the natural photos inside scikit-image's package.

    Eight photos: enough to see the whole path work, too few to judge a model by.
    """
    if importlib.util.find_spec("skimage") is None:
        raise ValueError(
            "the sample photos come with scikit-image: pip install scikit-image, "
            "or give a folder of your own"
        )
    return _samples(SAMPLES_TO_LEARN_FROM), _samples(SAMPLES_TO_JUDGE_ON)


def _samples(names: tuple[str, ...]) -> Photos:
    from skimage import data

    arrays = []
    for name in names:
        photo = getattr(data, name)()
        photo = photo[0] if isinstance(photo, tuple) else photo  # the stereo pair's left
        gray = photo.ndim == 2
        arrays.append(np.repeat(photo[..., None], 3, axis=2) if gray else photo)
    return Photos(tuple(f"scikit-image: {name}" for name in names), tuple(arrays))


Images = Photos | tuple[Photos, Photos] | None


def photo_sets(images: Images) -> tuple[Photos, Photos]:
    """(to learn from, to judge on): every fourth is held out where the photos are one set;
    `sample_photos` for None."""
    if images is None:
        return sample_photos()
    return images.split() if isinstance(images, Photos) else images


Box = tuple[float, float, float, float]


def center_crops(photos: Photos, size: int) -> np.ndarray:
    """The largest central square of each photo at ``size``: uint8 [photos, size, size, 3]."""
    crops = []
    for array in photos.arrays:
        height, width = array.shape[:2]
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        crops.append(_crop(array, (left, top, left + side, top + side), size))
    return np.stack(crops)


def random_crops(
    photos: Photos,
    size: int,
    count: int,
    generator: np.random.Generator,
    area: tuple[float, float] = (0.25, 1.0),
) -> np.ndarray:
    """``count`` square crops, photos in turn: uint8 [count, size, size, 3].

    Each covers a share in ``area`` of its photo's largest square, anywhere in the photo,
    mirrored half of the time.
    """
    crops = []
    for index in range(count):
        array = photos.arrays[index % len(photos)]
        height, width = array.shape[:2]
        side = min(height, width) * generator.uniform(*area) ** 0.5
        left, top = generator.uniform(0, width - side), generator.uniform(0, height - side)
        crop = _crop(array, (left, top, left + side, top + side), size)
        crops.append(crop[:, ::-1] if generator.random() < 0.5 else crop)
    return np.stack(crops)


def _crop(array: np.ndarray, box: Box, size: int) -> np.ndarray:
    if array.shape[:2] == (size, size) and box == (0, 0, size, size):
        return array
    image = Image.fromarray(array)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def normalize(crops: np.ndarray, by: Normalization = IMAGENET) -> torch.Tensor:
    """uint8 [n, height, width, 3] -> float32 [n, 3, height, width]."""
    import torch

    images = torch.from_numpy(np.ascontiguousarray(crops.transpose(0, 3, 1, 2))).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (by.mean, by.std))
    return (images - mean) / std


def batches(
    crops: np.ndarray, batch_size: int, by: Normalization = IMAGENET
) -> Iterator[torch.Tensor]:
    """Normalised batches, in order."""
    for start in range(0, len(crops), batch_size):
        yield normalize(crops[start : start + batch_size], by)


def endless_crops(
    photos: Photos,
    size: int,
    batch_size: int,
    seed: int,
    start: int = 0,
    labels: Sequence[int] | None = None,
    by: Normalization = IMAGENET,
) -> Iterator[torch.Tensor | tuple[torch.Tensor, torch.Tensor]]:
    """Normalised random crops without end: each pass takes the photos in a new order.

    Batch i depends on ``seed`` and i alone, so that ``start`` continues a stream cheaply.
    With ``labels``, one a photo, batches are (images, labels).
    """
    import torch

    for index in itertools.count(start):
        places = range(index * batch_size, (index + 1) * batch_size)
        turns = {place // len(photos) for place in places}
        orders = {turn: _order(seed, turn, len(photos)) for turn in turns}
        chosen = [orders[p // len(photos)][p % len(photos)] for p in places]
        generator = np.random.default_rng((seed, 1, index))
        images = normalize(random_crops(photos.take(chosen), size, batch_size, generator), by)
        yield images if labels is None else (images, torch.tensor([labels[c] for c in chosen]))


def _order(seed: int, turn: int, count: int) -> list[int]:
    """The order of the photos in one pass through all of them."""
    return np.random.default_rng((seed, 0, turn)).permutation(count).tolist()
