"""What a co-design run found: plain data, one JSON file, a folder of everything.

Figures that depend on the wall clock stand apart under ``measured``; the rest repeats
with the same seed, steps and thread count.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__, files, provenance
from ..accel import Report, area, energy
from ..accel.kernels import MeasuredAttention
from ..ae import CodecErrors, ExplainedVariance, mean_errors
from ..models.training.loop import Trained
from ..moved import old_names
from ..sparsify import Fidelity, polarize
from ..sparsify.reorder import Polarized
from ..workload import AttentionMask, HeadCodec, Workload
from .attachments import Attachments
from .pictures import draw
from .settings import FEW_PHOTOS, Settings

__getattr__ = old_names(__name__)


@dataclass(frozen=True)
class CodecSummary:
    """The codecs in numbers, layer by layer: variance over heads kept in closed form; errors
    as trained, with the mask in place, on crops that judge."""

    shapes: tuple[HeadCodec, ...]
    explained: tuple[ExplainedVariance, ...]
    explained_without_rotation: tuple[ExplainedVariance, ...]
    parameters: int
    errors: tuple[CodecErrors, ...]

    def mean_errors(self) -> CodecErrors:
        """Mean over the layers."""
        return mean_errors(self.errors)

    def mean(self, rotated: bool) -> ExplainedVariance:
        """Mean over the layers, with or without the free rotation of the heads."""
        rows = self.explained if rotated else self.explained_without_rotation
        return ExplainedVariance(
            q=sum(row.q for row in rows) / len(rows), k=sum(row.k for row in rows) / len(rows)
        )


@dataclass(frozen=True, eq=False)
class CodesignResult:
    """Everything `sievit.pipeline.codesign.codesign` found.

    mask             the learned mask
    kept_mass        share of the averaged attention that the mask keeps
    codecs           `sievit.ae.QKCodec` a layer, trained; None without codec
    fidelity         variant -> tokens against the dense model's
    student          the recovered model, mask and codecs attached
    workload         the network with masks and codec shapes, as simulated
    reports          simulator -> `sievit.accel.Report`
    measured         dense attention timed on this computer
    """

    settings: Settings
    learned_from: tuple[str, ...]
    judged_on: tuple[str, ...]
    mask: AttentionMask
    kept_mass: float
    codecs: nn.ModuleList | None
    codec_summary: CodecSummary | None
    fidelity: Mapping[str, Fidelity]
    codec_log: Trained | None
    recovery_log: Trained | None
    student: nn.Module
    workload: Workload
    reports: Mapping[str, Report]
    measured: tuple[MeasuredAttention, ...]
    stage_seconds: Mapping[str, float]

    @cached_property
    def polarized(self) -> Polarized:
        """The mask [layer][head], polarized by its own ``global_threshold``."""
        return polarize(self.mask)

    @property
    def photos_note(self) -> str:
        """How far the photos carry: said with every report."""
        count = len(self.judged_on)
        few = ", too few to judge a model by" if count < FEW_PHOTOS else ""
        named = f" ({', '.join(self.judged_on)})" if count <= 8 else ""
        return f"judged on {self.settings.judge_crops} crops of {count} photos{named}{few}"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: every figure, with the versions and settings that made it."""
        return {
            "sievit": __version__,
            "versions": provenance.versions(),
            "threads": torch.get_num_threads(),
            "model": self._model_dict(),
            "settings": asdict(self.settings),
            "photos": {
                "learned_from": list(self.learned_from),
                "judged_on": list(self.judged_on),
                "learn_crops": self.settings.learn_crops,
                "judge_crops": self.settings.judge_crops,
                "note": self.photos_note,
            },
            "mask": self._mask_dict(),
            "codec": self._codec_dict(),
            "recovery": _log_dict(self.recovery_log),
            "fidelity": {name: asdict(row) for name, row in self.fidelity.items()},
            "simulation": {
                name: report.to_dict()
                | {"energy": energy(report).to_dict(), "area": area(report.hardware).to_dict()}
                for name, report in self.reports.items()
            },
            "measured": {
                "attention": [asdict(row) for row in self.measured],
                "stage_seconds": dict(self.stage_seconds),
                "codec_training_seconds": self.codec_log.seconds if self.codec_log else None,
                "recovery_seconds": self.recovery_log.seconds if self.recovery_log else None,
            },
        }

    def _model_dict(self) -> dict[str, Any]:
        first = self.workload.attention[0]
        return {
            "name": self.workload.name,
            "parameters": sum(p.numel() for p in self.student.parameters()),
            "attention_layers": len(self.workload.attention),
            "heads": [op.heads for op in self.workload.attention],
            "tokens": first.queries,
            "image_size": self.settings.image_size,
        }

    def _mask_dict(self) -> dict[str, Any]:
        return {
            "sparsity": self.mask.sparsity,
            "kept_attention_mass": self.kept_mass,
            "sparsity_by_head": [row.tolist() for row in self.mask.sparsity_by_head()],
            "global_keys": [[head.num_global for head in layer] for layer in self.polarized],
        }

    def _codec_dict(self) -> dict[str, Any] | None:
        if self.codec_summary is None:
            return None
        summary = self.codec_summary
        return {
            "shapes": [asdict(shape) for shape in summary.shapes],
            "parameters": summary.parameters,
            "explained_variance": [asdict(row) for row in summary.explained],
            "explained_variance_without_rotation": [
                asdict(row) for row in summary.explained_without_rotation
            ],
            "errors": [asdict(row) for row in summary.errors],
            "training": _log_dict(self.codec_log),
        }

    def save(self, folder: str | os.PathLike[str], plots: bool = True) -> tuple[Path, ...]:
        """Write report.json, model.safetensors (the recovered weights),
        attachments.safetensors (mask and codecs, see `sievit.pipeline.attachments`) and, with
        ``plots``, PNGs; each whole or not at all.

        Returns the paths. Raises ``OSError`` where the folder cannot be written.
        """
        target = Path(folder)
        paths = [target / "attachments.safetensors", target / "model.safetensors"]
        size, settings = self.settings.image_size, asdict(self.settings)
        Attachments(size, self.mask, self.codecs, settings).save(paths[0])
        save_weights(self.student, paths[1])
        if plots:
            judged = (
                f"{self.workload.name}, {self.mask.sparsity:.0%} of attention pruned, "
                f"{settings['judge_crops']} crops of {len(self.judged_on)} photos"
            )
            paths += draw(
                self.mask,
                self.polarized,
                self.fidelity,
                judged,
                self.reports,
                self.codecs is not None,
                target,
            )
        paths.append(target / "report.json")
        files.write_json(self.to_dict(), paths[-1])
        return tuple(paths)


def _log_dict(log: Trained | None) -> dict[str, Any] | None:
    return None if log is None else {"steps": log.steps, "losses": list(log.losses)}


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a state dict as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    state = {n: v.detach().cpu().clone().contiguous() for n, v in module.state_dict().items()}
    with files.written_whole(path) as temporary:
        save_file(state, temporary)
