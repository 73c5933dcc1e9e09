"""From photos to what is attached: the one flow of `codesign` and `train_sparse`.

In the order in which a `Sparsifier` walks it: average the attention, make the mask, fit the
codecs, fold their rotation into the projections, attach. When each step is taken, and what is
trained and judged between them, is up to the command.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..accel import Hardware, presets
from ..ae import FittedCodecs, attach_codec, fit_codecs, fold, head_moments
from ..ae.adapt import Watcher
from ..models import prefix_tokens, trace
from ..models.training.processes import agreed
from ..sparsify import HardwareMask, attach, average_attention, budgeted_masks, threshold
from ..sparsify.budgeted_masks import block_orders, tile_area, tiles
from ..workload import AttentionMask
from .attachments import Attachments
from .networks import attention_cycles
from .settings import CodecSettings, MaskSettings

Maps = tuple[np.ndarray, ...]
Moments = tuple[Any, ...]
Told = Callable[[int], None] | None
"""Called with the number of images, or of layers, that are done."""


class Sparsifier:
    """A model as mask and codecs are put into it.

    model     what is attached to; ``dense`` is the model as it was given
    hardware  the simulated machine that a budget of cycles is counted on
    maps      averaged attention, float32 [heads, queries, keys] a layer
    moments   of the heads' Q and K, a layer, that codecs are fitted to
    mask      made of the maps, or given
    found     what a budget bought, where the mask was made by one
    codecs    as they were folded, one a layer
    """

    def __init__(
        self, model: nn.Module, image_size: int, hardware: Hardware = presets["vitcod"]
    ) -> None:
        self.model = self.dense = model
        self.image_size, self.hardware = image_size, hardware
        self.maps: Maps = ()
        self.moments: Moments = ()
        self.mask: AttentionMask | None = None
        self.found: HardwareMask | None = None
        self.codecs: nn.ModuleList | None = None
        self.attached = ExitStack()

    def copied(self) -> Sparsifier:
        """The same over a copy of the model, which training may change."""
        made = Sparsifier(copy.deepcopy(self.model), self.image_size, self.hardware)
        made.dense, made.maps, made.moments = self.dense, self.maps, self.moments
        made.mask, made.found = self.mask, self.found
        return made

    @property
    def prefix(self) -> int:
        """Tokens whose rows and columns every mask keeps."""
        return prefix_tokens(self.model)

    def average(self, crops: Iterable[Tensor], progress: Told = None) -> Maps:
        """Average the attention over batches of ``crops``; all processes get the same maps."""
        self.maps = agreed(average_attention(self.model, crops, progress))
        return self.maps

    def make_mask(self, settings: MaskSettings, seed: int = 0) -> AttentionMask:
        """The mask that the settings' rule or budget makes of the averaged maps."""
        if settings.cycles is not None:
            self.found = self._within_cycles(settings.cycles)
        elif settings.tile_entries is not None:
            self.found = self._within_tiles(settings.tile_entries, settings.tile)
        else:
            self.found = None
        made = self._by_rule(settings, seed) if self.found is None else self.found.mask
        self.mask = AttentionMask(made.keep, settings.global_threshold)
        return self.mask

    def _by_rule(self, settings: MaskSettings, seed: int) -> AttentionMask:
        return threshold(
            self.maps,
            settings.rule,
            sparsity=settings.sparsity,
            theta=settings.theta,
            prefix_tokens=self.prefix,
            granularity=settings.granularity,
            grid=settings.grid,
            seed=seed,
        )

    def _within_cycles(self, budget: float) -> HardwareMask:
        cost = attention_cycles(trace(self.dense, self.image_size), self.hardware)
        return budgeted_masks(self.maps, cost, budget, prefix_tokens=self.prefix)

    def _within_tiles(self, budget: float, rows: int) -> HardwareMask:
        orders = block_orders([layer.shape[1] for layer in self.maps], rows, self.prefix)
        solver = tiles(rows, orders, self.prefix)
        cost = tile_area(rows)
        return budgeted_masks(self.maps, cost, budget, solver, prefix_tokens=self.prefix)

    def observe_heads(self, crops: Iterable[Tensor]) -> None:
        """Take the moments that codecs are fitted to, over batches of ``crops``."""
        self.moments = head_moments(self.model, crops)

    def fit_codecs(
        self, settings: CodecSettings, rotation: bool | None = None, progress: Told = None
    ) -> FittedCodecs:
        """Codecs in closed form; ``rotation`` None is that of the settings."""
        return fit_codecs(
            self.moments,
            settings.latent_heads,
            settings.groups,
            rotation=settings.rotation if rotation is None else rotation,
            progress=progress,
        )

    def fold(self, codecs: nn.ModuleList) -> None:
        """Move the codecs' rotation into the projections, or say why it stays."""
        self.codecs = codecs
        try:
            fold(self.model, codecs, self.image_size)
        except ValueError as error:
            warnings.warn(f"the rotation stays inside the codec: {error}", stacklevel=3)

    def put_mask(self, mask: AttentionMask) -> None:
        """Attach ``mask``, which is from now on the one that is saved."""
        self.mask = mask
        self.attached.enter_context(attach(self.model, mask, image_size=self.image_size))

    def put_codecs(self, watcher: Watcher | None = None) -> None:
        """Attach the codecs that `fold` was given."""
        if self.codecs is None:
            raise ValueError("there are no codecs to attach: fit and fold them first")
        handle = attach_codec(self.model, self.codecs, self.image_size, watcher)
        self.attached.enter_context(handle)

    def remove(self) -> None:
        """Take out everything that was put in; the model keeps its weights."""
        self.attached.close()

    def attachments(self, settings: Mapping[str, Any] | None = None) -> Attachments:
        """Mask and codecs as they stand, to be saved or put into another model."""
        return Attachments(self.image_size, self.mask, self.codecs, settings or {})
