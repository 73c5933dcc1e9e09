"""Attention timed on the machine at hand, through PyTorch: what a speed-up is against.

The ViTCoD paper compares with eager attention (scores written out, softmax, product);
PyTorch's fused attention is the fairer baseline, fused attention given the mask shows what
a fixed mask is worth without kernels made for it, and `sparse_attention` what with them.
Only the core is timed: queries, keys and values are there, the output projection is not.
Times are wall-clock medians over whole passes through all layers; they vary with the
machine and are never a test.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...provenance import device_name
from ...workload import Attention, Workload
from .attention import sparse_attention
from .plan import plan_attention


@dataclass(frozen=True)
class MeasuredAttention:
    """Attention of all layers of a network, timed, by one of `KERNELS`.

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


Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def _masked(op: Attention, device: torch.device) -> Step:
    """PyTorch's fused attention with the layer's mask, [heads, queries, keys]."""
    if op.masks is None:
        raise ValueError(f"'masked' needs masks, {op.name} has none")
    keep = torch.from_numpy(np.stack([mask.dense() for mask in op.masks]))
    return partial(F.scaled_dot_product_attention, attn_mask=keep.to(device))


def _sparse(op: Attention, device: torch.device) -> Step:
    """`sparse_attention` with the layer's plan; it may choose dense attention itself."""
    if op.masks is None:
        raise ValueError(f"'sparse' needs masks, {op.name} has none")
    return partial(sparse_attention, plan=plan_attention(op.masks).to(device))


KERNELS: dict[str, Callable[[Attention, torch.device], Step]] = {
    "eager": lambda op, device: eager_attention,
    "fused": lambda op, device: F.scaled_dot_product_attention,
    "masked": _masked,
    "sparse": _sparse,
}
"""By name: what runs a layer, made ready beforehand. "eager" and "fused" are dense whatever
the masks say, "masked" is fused and takes the layer's mask, "sparse" computes kept entries."""


@torch.inference_mode()
def measure_attention(
    workload: Workload,
    batch: int = 1,
    kernels: tuple[str, ...] = ("eager", "fused"),
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    passes: int = 7,
) -> tuple[MeasuredAttention, ...]:
    """Time the attention of ``workload`` for each of ``kernels``, names of `KERNELS`.

    Layers of one shape share their operands; codecs are not used. Kernels take turns, so
    that a change in the machine's speed meets all of them. Raises ValueError for an unknown
    kernel, a workload without attention and a kernel that needs masks where there are none.
    """
    unknown = [name for name in kernels if name not in KERNELS]
    if unknown:
        raise ValueError(f"kernels are {', '.join(KERNELS)}, got {unknown[0]!r}")
    if not workload.attention:
        raise ValueError(f"{workload.name} has no attention to measure")
    device = torch.device(device)
    operands = _operands(workload.attention, batch, device, dtype)
    steps = {name: [KERNELS[name](op, device) for op in workload.attention] for name in kernels}
    times: dict[str, list[float]] = {name: [] for name in kernels}
    for turn in range(passes + 1):  # the first pass of each warms up
        for name in kernels:
            spent = _timed_pass(steps[name], operands, device)
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


Operands = list[tuple[Tensor, Tensor, Tensor]]


def _operands(
    calls: tuple[Attention, ...], batch: int, device: torch.device, dtype: torch.dtype
) -> Operands:
    """(q, k, v) a layer."""
    generator = torch.Generator().manual_seed(0)
    made: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}
    operands = []
    for op in calls:
        shape = (op.windows, op.heads, op.queries, op.keys, op.key_dim, op.value_dim)
        if shape not in made:
            sizes = ((op.queries, op.key_dim), (op.keys, op.key_dim), (op.keys, op.value_dim))
            q, k, v = (
                torch.randn(batch * op.windows, op.heads, *size, generator=generator)
                for size in sizes
            )
            made[shape] = (q.to(device, dtype), k.to(device, dtype), v.to(device, dtype))
        operands.append(made[shape])
    return operands


def _timed_pass(steps: list[Step], operands: Operands, device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    for step, (q, k, v) in zip(steps, operands, strict=True):
        step(q, k, v)
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
