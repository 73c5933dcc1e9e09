"""Real processors beside a simulated machine: timed here, logged by others, modelled.

The three are kept apart by `Measured.origin` and by type, and every row says which it is
and at which batch. Seconds are of one image. A processor computes dense attention in
floating point, the machine sparse attention in int8: a factor between them is what the
ViTCoD paper prints, not a race of equals.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..accel import Report
from ..accel.kernels import MeasuredAttention, measure_attention
from ..accel.report.roofline import DEVICES, MEASURED, Measured, Modelled, roofline, speedup
from ..models.running import evaluating
from ..workload import Workload

PASSES = 7
BATCHES = (1, 64)
"""Of the modelled rows: one image, as the paper's edge device has it, and a server's."""

SOFTWARE = {
    "eager": "PyTorch, unfused attention",
    "fused": "PyTorch, fused attention",
    "masked": "PyTorch, fused attention with the mask",
    "sparse": "sievit, sparse attention",
}
NETWORK_BACKENDS: dict[str, Callable[[], Any]] = {
    "eager": lambda: sdpa_kernel(SDPBackend.MATH),
    "fused": nullcontext,
}
"""Kernels under which the whole network is timed too."""


@dataclass(frozen=True)
class Beside:
    """One processor beside a report: seconds of an image there, and the factors.

    None where the network was not measured.
    """

    against: Measured | Modelled
    attention_seconds: float
    network_seconds: float | None
    attention_speedup: float
    network_speedup: float | None

    @property
    def basis(self) -> str:
        return self.against.basis

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "against": self.against.label,
            "basis": self.basis,
            "batch": self.against.batch,
            "attention_seconds": self.attention_seconds,
            "network_seconds": self.network_seconds,
            "attention_speedup": self.attention_speedup,
            "network_speedup": self.network_speedup,
        }


def timed_here(
    workload: Workload,
    model: nn.Module | None = None,
    *,
    image_size: int = 224,
    batch: int = 1,
    kernels: Iterable[str] = ("eager", "fused"),
    device: str | torch.device = "cpu",
    passes: int = PASSES,
) -> tuple[Measured, ...]:
    """The workload's attention timed on this computer, kernel by kernel, fp32; with
    ``model`` its whole forward pass too, where attention inside it runs the same way."""
    rows = measure_attention(workload, batch, tuple(kernels), device, passes=passes)
    return tuple(
        _as_measured(row, workload, _network_seconds(row, model, image_size, device))
        for row in rows
    )


def _as_measured(
    row: MeasuredAttention, workload: Workload, network_seconds: float | None
) -> Measured:
    threads = f", {row.threads} threads" if row.threads > 1 else ", 1 thread" * row.threads
    return Measured(
        name=f"here, {row.kernel}",
        device=row.device,
        workload=workload.name,
        software=SOFTWARE.get(row.kernel, f"PyTorch, {row.kernel} attention") + threads,
        precision={"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[row.dtype],
        batch=row.batch,
        attention_seconds_per_image=row.seconds_per_image,
        seconds_per_image=network_seconds,
        source=f"median of {row.passes} passes, torch {torch.__version__}",
        origin="here",
    )


@torch.inference_mode()
def _network_seconds(
    row: MeasuredAttention, model: nn.Module | None, image_size: int, device: str | torch.device
) -> float | None:
    """Median forward pass of an image, or None where the kernel cannot be put inside."""
    if model is None or row.kernel not in NETWORK_BACKENDS:
        return None
    model = model.to(device)
    images = torch.zeros(row.batch, 3, image_size, image_size, device=device)
    times = []
    with evaluating(model), NETWORK_BACKENDS[row.kernel]():
        for turn in range(row.passes + 1):  # the first warms up
            begin = time.perf_counter()
            model(images)
            if images.is_cuda:
                torch.cuda.synchronize(device)
            if turn:
                times.append((time.perf_counter() - begin) / row.batch)
    return statistics.median(times)


def modelled(workload: Workload, batches: Iterable[int] = BATCHES) -> tuple[Modelled, ...]:
    """Every device of `DEVICES`: eager fp32, and fused attention at its best precision."""
    rows = []
    for device in DEVICES.values():
        best = max(device.product_flops_per_s, key=lambda p: device.product_flops_per_s[p])
        for batch in batches:
            for precision, style in (("fp32", "eager"), (best, "fused")):
                rows.append(roofline(workload, device, precision, batch, style))
    return tuple(rows)


def beside(report: Report, against: Iterable[Measured | Modelled]) -> tuple[Beside, ...]:
    """``report`` beside each of ``against``."""
    return tuple(_beside(report, other) for other in against)


def _beside(report: Report, other: Measured | Modelled) -> Beside:
    if isinstance(other, Modelled):
        attention, network = other.attention_seconds / other.batch, other.seconds / other.batch
    else:
        attention, network = other.attention_seconds_per_image, other.seconds_per_image
    factor = speedup(report, other).factor
    whole = None if network is None else speedup(report, other, attention_only=False).factor
    return Beside(other, attention, network, factor, whole)


def logs() -> tuple[Measured, ...]:
    """What ViTCoD's authors logged, of a ViT-Tiny with 196 tokens."""
    return tuple(MEASURED.values())
