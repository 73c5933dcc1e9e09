"""Masks and codecs of a model, saved beside its weights in one safetensors file.

The base model's state dict stays as it is; this file holds what `attach` and
`attach_codec` put around it, with the settings that made it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..accel.kernels import Arithmetic
from ..ae import QKCodec, attach_codec
from ..files import written_whole
from ..sparsify import attach, attach_int8, calibrate_int8
from ..workload import PUBLISHED_GLOBAL_THRESHOLD, AttentionMask, GlobalThreshold, HeadCodec
from ..workload.bits import packed, unpacked

FORMAT = "sievit attachments 1"


@dataclass(frozen=True, eq=False)
class Attachments:
    """A mask, codecs (one a layer) or both, for one model at one ``image_size``.

    ``settings`` is plain data (numbers, strings, lists, dicts), kept as it is.
    """

    image_size: int
    mask: AttentionMask | None = None
    codecs: nn.ModuleList | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def codec_shapes(self) -> tuple[HeadCodec, ...]:
        """Of each layer; () without codecs."""
        return tuple(codec.shape for codec in self.codecs or () if isinstance(codec, QKCodec))

    def attach(self, model: nn.Module, backend: str = "auto") -> ExitStack:
        """Put them into ``model``; closing what is returned takes them out again.

        Raises ValueError where layers, heads or tokens do not fit.
        """
        with ExitStack() as stack:
            if self.mask is not None:
                stack.enter_context(attach(model, self.mask, backend, self.image_size))
            if self.codecs is not None:
                stack.enter_context(attach_codec(model, self.codecs, self.image_size))
            return stack.pop_all()

    def attach_int8(
        self, model: nn.Module, batches: Iterable[Tensor], arithmetic: Arithmetic = Arithmetic()
    ) -> ExitStack:
        """As `attach`, the attention in the integers of the simulated machine, whose scales
        are taken from what ``batches`` of images reach.

        Raises ValueError where `attach` does, and where the model writes its softmax out.
        """
        with ExitStack() as stack:
            if self.codecs is not None:
                stack.enter_context(attach_codec(model, self.codecs, self.image_size))
            scales = calibrate_int8(model, batches, self.mask, arithmetic, self.image_size)
            stack.enter_context(attach_int8(model, self.mask, scales, arithmetic, self.image_size))
            return stack.pop_all()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``.safetensors`` file, whole or not at all."""
        from safetensors.torch import save_file

        if Path(path).suffix != ".safetensors":
            raise ValueError(f"attachments are saved as .safetensors, got {str(path)!r}")
        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {"image_size": self.image_size, "settings": dict(self.settings)}
        if self.mask is not None:
            about["mask"] = [list(shape) for shape in self.mask.shapes]
            about["global_threshold"] = self.mask.global_threshold
            for layer, keep in enumerate(self.mask.keep):
                tensors[f"mask.{layer}.bits"] = torch.from_numpy(packed(keep))
        if self.codecs is not None:
            about["codecs"] = [asdict(shape) for shape in self.codec_shapes]
            for name, value in self.codecs.state_dict().items():
                tensors[f"codecs.{name}"] = value.detach().cpu().contiguous()
        with written_whole(path) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Attachments:
        """Read a file of `save`. Raises ValueError where it is none or damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, FileNotFoundError, IsADirectoryError) as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path}: holds no masks and codecs; its format is {metadata.get('format')!r}, "
                f"expected {FORMAT!r}"
            )
        about = json.loads(metadata["about"])
        threshold = about.get("global_threshold", _earlier_threshold(about["settings"]))
        mask = _mask(about["mask"], threshold, tensors) if "mask" in about else None
        codecs = _codecs(about["codecs"], tensors) if "codecs" in about else None
        return cls(about["image_size"], mask, codecs, about["settings"])


def _earlier_threshold(settings: Mapping[str, Any]) -> GlobalThreshold:
    """Of a file that was written before masks remembered their rule: that of the run."""
    return settings.get("min_kept", PUBLISHED_GLOBAL_THRESHOLD)


def _mask(
    shapes: list[list[int]], threshold: GlobalThreshold, tensors: dict[str, Tensor]
) -> AttentionMask:
    bits = (tensors[f"mask.{layer}.bits"].numpy() for layer in range(len(shapes)))
    return AttentionMask(tuple(map(unpacked, bits, shapes)), threshold)


def _codecs(shapes: list[dict[str, int]], tensors: dict[str, Tensor]) -> nn.ModuleList:
    codecs = nn.ModuleList(QKCodec(HeadCodec(**shape)) for shape in shapes)
    prefix = "codecs."
    state = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    codecs.load_state_dict(state, strict=False)
    return codecs
