"""From averaged attention to what is attached: the one flow of `codesign` and `train_sparse`.

In the order in which a `Sparsifier` walks it: average the attention, make the mask, fit the
codecs, fold their rotation into the projections, attach. When each step is taken, and what is
trained and judged between them, is up to the command.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..ae import FittedCodecs, attach_codec, fit_codecs, fold, head_moments
from ..ae.adapt import Watcher
from ..models import prefix_tokens
from ..sparsify import attach, threshold
from ..workload import AttentionMask
from .attachments import Attachments
from .settings import CodecSettings, MaskSettings

Maps = tuple[np.ndarray, ...]
Moments = tuple[Any, ...]


def mask_of(maps: Maps, settings: MaskSettings, prefix: int, seed: int = 0) -> AttentionMask:
    """The mask that the settings' rule makes of averaged ``maps``."""
    made = threshold(
        maps,
        settings.rule,
        sparsity=settings.sparsity,
        theta=settings.theta,
        prefix_tokens=prefix,
        granularity=settings.granularity,
        grid=settings.grid,
        seed=seed,
    )
    return AttentionMask(made.keep, settings.global_threshold)


def codecs_of(
    moments: Moments,
    settings: CodecSettings,
    rotation: bool | None = None,
    progress: Callable[[int], None] | None = None,
) -> FittedCodecs:
    """Codecs in closed form; ``rotation`` None is that of the settings."""
    return fit_codecs(
        moments,
        settings.latent_heads,
        settings.groups,
        rotation=settings.rotation if rotation is None else rotation,
        progress=progress,
    )


class Sparsifier:
    """A model as mask and codecs are put into it: averaged ``maps``, ``mask``, ``codecs``."""

    def __init__(self, model: nn.Module, image_size: int) -> None:
        self.model, self.image_size = model, image_size
        self.maps: Maps = ()
        self.mask: AttentionMask | None = None
        self.codecs: nn.ModuleList | None = None
        self.attached = ExitStack()

    @property
    def prefix(self) -> int:
        """Tokens whose rows and columns every mask keeps."""
        return prefix_tokens(self.model)

    def make_mask(self, settings: MaskSettings, seed: int = 0) -> AttentionMask:
        """`mask_of` the averaged maps."""
        self.mask = mask_of(self.maps, settings, self.prefix, seed)
        return self.mask

    def moments(self, crops: Iterable[Tensor]) -> Moments:
        """What codecs are fitted to."""
        return head_moments(self.model, crops)

    def fold(self, codecs: nn.ModuleList) -> None:
        """Move the codecs' rotation into the projections, or say why it stays."""
        self.codecs = codecs
        try:
            fold(self.model, codecs, self.image_size)
        except ValueError as error:
            warnings.warn(f"the rotation stays inside the codec: {error}", stacklevel=3)

    def put_mask(self, mask: AttentionMask) -> None:
        self.mask = mask
        self.attached.enter_context(attach(self.model, mask, image_size=self.image_size))

    def put_codecs(self, watcher: Watcher | None = None) -> None:
        handle = attach_codec(self.model, self.codecs, self.image_size, watcher)
        self.attached.enter_context(handle)

    def remove(self) -> None:
        """Take out everything that was put in; the model keeps its weights."""
        self.attached.close()

    def attachments(self, settings: Mapping[str, Any]) -> Attachments:
        """Mask and codecs as they stand, to be saved or put into another model."""
        return Attachments(self.image_size, self.mask, self.codecs, settings)
