"""Attention timed on the machine at hand, through PyTorch: what a speed-up is against.

The ViTCoD paper compares with eager attention (scores written out, softmax, product);
PyTorch's fused attention is the fairer baseline. Only the core is timed: queries, keys
and values are there, the output projection is not. Times are wall-clock medians over
whole passes through all layers; they vary with the machine and are never a test.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...workload import Attention, Workload


@dataclass(frozen=True)
class MeasuredAttention:
    """Dense attention of all layers of a network, timed.

    ``seconds_per_image`` is the median pass over ``batch`` images, divided by the batch;
    ``fastest`` and ``slowest`` pass alike. ``threads`` is PyTorch's, 0 on a GPU.
    """

    kernel: str
    device: str
    threads: int
    dtype: str
    batch: int
    passes: int
    seconds_per_image: float
    fastest_seconds_per_image: float
    slowest_seconds_per_image: float


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores, softmax and product as separate operations, all [batch, heads, tokens, dim]."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ v


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "eager": eager_attention,
    "fused": F.scaled_dot_product_attention,
}


@torch.inference_mode()
def measure_attention(
    workload: Workload,
    batch: int = 1,
    kernels: tuple[str, ...] = ("eager", "fused"),
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    passes: int = 7,
) -> tuple[MeasuredAttention, ...]:
    """Time dense attention of ``workload`` for each of ``kernels``.

    Layers of one shape share their operands; masks and codecs of the workload are not
    used: this is the dense baseline. Kernels take turns, so that a change in the
    machine's speed meets all of them. Raises ValueError for an unknown kernel or a
    workload without attention.
    """
    unknown = [name for name in kernels if name not in KERNELS]
    if unknown:
        raise ValueError(f"kernels are {', '.join(KERNELS)}, got {unknown[0]!r}")
    if not workload.attention:
        raise ValueError(f"{workload.name} has no attention to measure")
    device = torch.device(device)
    operands = _operands(workload.attention, batch, device, dtype)
    times: dict[str, list[float]] = {name: [] for name in kernels}
    for turn in range(passes + 1):  # the first pass of each warms up
        for name in kernels:
            spent = _timed_pass(KERNELS[name], operands, device)
            if turn:
                times[name].append(spent / batch)
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return tuple(
        MeasuredAttention(
            kernel=name,
            device=device_name(device),
            threads=threads,
            dtype=str(dtype).removeprefix("torch."),
            batch=batch,
            passes=passes,
            seconds_per_image=statistics.median(spent),
            fastest_seconds_per_image=min(spent),
            slowest_seconds_per_image=max(spent),
        )
        for name, spent in times.items()
    )


def device_name(device: torch.device) -> str:
    """The processor's name as the system gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1] for line in file if line.startswith("model name")]
        return names[0].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


Operands = list[tuple[Tensor, Tensor, Tensor, int]]


def _operands(
    calls: tuple[Attention, ...], batch: int, device: torch.device, dtype: torch.dtype
) -> Operands:
    """(q, k, v, number of layers) for each distinct shape."""
    shapes = Counter(
        (op.windows, op.heads, op.queries, op.keys, op.key_dim, op.value_dim) for op in calls
    )
    generator = torch.Generator().manual_seed(0)
    operands = []
    for (windows, heads, queries, keys, key_dim, value_dim), layers in shapes.items():
        sizes = ((queries, key_dim), (keys, key_dim), (keys, value_dim))
        tensors = (
            torch.randn(batch * windows, heads, *size, generator=generator).to(device, dtype)
            for size in sizes
        )
        operands.append((*tensors, layers))
    return operands


def _timed_pass(
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor], operands: Operands, device: torch.device
) -> float:
    _wait(device)
    begin = time.perf_counter()
    for q, k, v, layers in operands:
        for _ in range(layers):
            kernel(q, k, v)
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
