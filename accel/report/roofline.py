"""CPUs and GPUs beside the accelerator: a modelled roofline, and what a clock said.

Two types that do not mix: `Modelled` is arithmetic on a device's published peaks, kernel by
kernel, the longest of launch, computing and memory: every kernel at its peaks, what kernels
hand to each other through main memory (a cache that holds it makes a real kernel faster than
this; all else makes it slower). `Measured` is a clock's: ViTCoD's authors' logs (`MEASURED`), or
this computer's. A `Speedup` names what it is against, and the batches. Seconds, FLOPs
(two a MAC), bytes.

Devices compute dense attention: pruned entries inside a dense kernel save no time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...checks import integer
from ...workload import Attention, Conv, Gemm, Op, Unknown, Unused, Workload
from .report import Report

WIDTH_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes of an element by precision."""

ATTENTION_STYLES = ("eager", "fused")
"""Four kernels that hand the scores on through memory, or one that keeps them on chip."""


@dataclass(frozen=True)
class Device:
    """Published peaks; each figure's source is in ``source``.

    product_flops_per_s  dense products by precision (tensor cores where it has them)
    vector_flops_per_s   everything else: fp32 outside tensor cores
    memory_bytes_per_s   of its main memory
    launch_s             host time of one kernel (one operator on a CPU)
    """

    name: str
    product_flops_per_s: Mapping[str, float]
    vector_flops_per_s: float
    memory_bytes_per_s: float
    launch_s: float
    source: str

    def __post_init__(self) -> None:
        for name in self.product_flops_per_s:
            if name not in WIDTH_BYTES:
                raise ValueError(f"precision must be one of {', '.join(WIDTH_BYTES)}, got {name!r}")
        rates = dict(self.product_flops_per_s) | {
            "vector_flops_per_s": self.vector_flops_per_s,
            "memory_bytes_per_s": self.memory_bytes_per_s,
        }
        for name, rate in rates.items():
            if not rate > 0:
                raise ValueError(f"{self.name}: {name} must be positive, got {rate!r}")
        if self.launch_s < 0:
            raise ValueError(f"{self.name}: launch_s must not be negative, got {self.launch_s!r}")


# A raw cuLaunchKernel takes 3.0-3.3 us (tritonbench pull request 1017, on a GB200's host): a
# floor, slower hosts take longer. A plain operator call of PyTorch on a CPU takes 1.4 us
# (pytorch issue 177109).
_GPU_LAUNCH_S, _CPU_CALL_S = 3.0e-6, 1.4e-6

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            "xeon-gold-6230r",
            {"fp32": 26 * 2.1e9 * 2 * 16 * 2},
            26 * 2.1e9 * 2 * 16 * 2,
            6 * 8 * 2.933e9,
            _CPU_CALL_S,
            "Intel's product page: 26 cores, 2.1 GHz base clock, 2 AVX-512 FMA units a core, "
            "6 channels of DDR4-2933; 16 fp32 lanes a unit. AVX-512 code clocks lower",
        ),
        Device(
            "jetson-xavier-nx",
            {"fp32": 384 * 2 * 1.1e9, "fp16": 48 * 128 * 1.1e9},
            384 * 2 * 1.1e9,
            128 / 8 * 2 * 1.6e9,
            _GPU_LAUNCH_S,
            "NVIDIA's data sheet DA-09366-001: 384 CUDA cores, 48 tensor cores, 1100 MHz, "
            "128-bit LPDDR4x at 1600 MHz; 64 FMAs a tensor core and cycle (Volta whitepaper)",
        ),
        Device(
            "rtx-2080-ti",
            {"fp32": 13.4e12, "fp16": 53.8e12},
            13.4e12,
            616e9,
            _GPU_LAUNCH_S,
            "NVIDIA's Turing whitepaper, reference card; fp16 accumulated in fp32",
        ),
        Device(
            "a100",
            {"fp32": 19.5e12, "fp16": 312e12, "bf16": 312e12},
            19.5e12,
            2039e9,
            _GPU_LAUNCH_S,
            "NVIDIA's A100 data sheet, SXM, 80 GB, dense; fp32 outside tensor cores",
        ),
        Device(
            "h100",
            {"fp32": 66.9e12, "fp16": 989.4e12, "bf16": 989.4e12},
            66.9e12,
            3350e9,
            _GPU_LAUNCH_S,
            "NVIDIA's H100 data sheet and whitepaper, SXM, 80 GB, dense",
        ),
        Device(
            "h200",
            {"fp32": 66.9e12, "fp16": 989.4e12, "bf16": 989.4e12},
            66.9e12,
            4800e9,
            _GPU_LAUNCH_S,
            "NVIDIA's H200 data sheet, SXM, 141 GB: the H100's chip; dense",
        ),
    )
}
"""By name."""


@dataclass(frozen=True)
class Kernel:
    """One launch: its work, and which of launch, compute and memory takes longest."""

    op: str
    kind: str
    name: str
    flops: int
    moved_bytes: int
    seconds: float
    bound: str


@dataclass(frozen=True)
class Modelled:
    """A workload on a device's roofline, the whole batch. ``unknown`` operations are charged
    for their bytes alone."""

    device: Device
    workload: str
    precision: str
    batch: int
    attention_style: str
    kernels: tuple[Kernel, ...]
    unknown: tuple[str, ...] = ()

    @property
    def basis(self) -> str:
        return "modelled"

    @property
    def seconds(self) -> float:
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def attention_seconds(self) -> float:
        return sum(kernel.seconds for kernel in self.kernels if kernel.kind == "attention")

    @property
    def label(self) -> str:
        return (
            f"{self.device.name}, {self.attention_style} attention, {self.precision}, "
            f"batch {self.batch} (modelled)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        totals = {"seconds": self.seconds, "attention_seconds": self.attention_seconds}
        plain = asdict(self) | {"unknown": list(self.unknown)}
        plain["kernels"] = [asdict(kernel) for kernel in self.kernels]
        return {"basis": self.basis, "label": self.label} | totals | plain


def roofline(
    workload: Workload,
    device: Device,
    precision: str = "fp32",
    batch: int = 1,
    attention_style: str = "eager",
) -> Modelled:
    """The network on ``device``, one kernel an operation, weights read once a batch.

    Launches run ahead of the device, so a kernel takes the longest of its launch, its
    computing and its memory traffic. Raises ValueError for a precision that the device has
    no figure for, an unknown style and a batch below 1.
    """
    if precision not in device.product_flops_per_s:
        known = ", ".join(device.product_flops_per_s)
        raise ValueError(f"precision on {device.name} must be one of {known}, got {precision!r}")
    if attention_style not in ATTENTION_STYLES:
        raise ValueError(
            f"attention_style must be one of {', '.join(ATTENTION_STYLES)}, got {attention_style!r}"
        )
    batch = integer("batch", batch)
    kernels = tuple(
        _timed(op.name, "attention" if isinstance(op, Attention) else "rest", work, device)
        for op in workload.ops
        for work in _works(op, precision, batch, attention_style)
    )
    names = tuple(op.name for op in workload.unknown)
    return Modelled(device, workload.name, precision, batch, attention_style, kernels, names)


@dataclass(frozen=True)
class _Work:
    """One kernel before a device times it: FLOPs of products and of the rest."""

    name: str
    precision: str
    product_flops: int
    vector_flops: int
    moved_bytes: int


def _timed(op: str, kind: str, work: _Work, device: Device) -> Kernel:
    compute = work.product_flops / device.product_flops_per_s[work.precision]
    compute += work.vector_flops / device.vector_flops_per_s
    times = {
        "launch": device.launch_s,
        "compute": compute,
        "memory": work.moved_bytes / device.memory_bytes_per_s,
    }
    bound = max(times, key=lambda name: times[name])
    flops = work.product_flops + work.vector_flops
    return Kernel(op, kind, work.name, flops, work.moved_bytes, times[bound], bound)


def _works(op: Op, precision: str, batch: int, style: str) -> list[_Work]:
    """The kernels of one operation; a parameter nobody reads has none."""
    width = WIDTH_BYTES[precision]
    if isinstance(op, Unused):
        return []
    if isinstance(op, Attention):
        return _attention_works(op, precision, batch, style)
    inputs = (op.elements_read - op.params) * batch
    moved = (inputs + op.params + op.elements_written * batch) * width
    if isinstance(op, (Gemm, Conv)):
        return [_Work("product", precision, 2 * op.macs * batch, 0, moved)]
    if isinstance(op, Unknown):
        return [_Work("unknown", precision, 0, 0, moved)]
    # One FLOP an element read at least; a sampling operator's own where they are more.
    return [_Work("vector", precision, 0, max(2 * op.macs * batch, inputs), moved)]


SOFTMAX_FLOPS = 4
"""Of one score: maximum, exponential, sum, division, counted as one each."""


def _attention_works(op: Attention, precision: str, batch: int, style: str) -> list[_Work]:
    """Dense attention without its codec: scores, scale, softmax and values, or all in one."""
    width, scores = WIDTH_BYTES[precision], op.entries * batch
    heads = op.heads * op.windows * batch
    q_and_k = heads * (op.queries + op.keys) * op.key_dim
    values, output = heads * op.keys * op.value_dim, heads * op.queries * op.value_dim
    first, second = 2 * scores * op.key_dim, 2 * scores * op.value_dim
    rest = (1 + SOFTMAX_FLOPS) * scores
    if style == "fused":
        moved = (q_and_k + values + output) * width
        return [_Work("fused attention", precision, first + second, rest, moved)]
    return [
        _Work("scores", precision, first, 0, (q_and_k + scores) * width),
        _Work("scale", precision, 0, scores, 2 * scores * width),
        _Work("softmax", precision, 0, SOFTMAX_FLOPS * scores, 2 * scores * width),
        _Work("values", precision, second, 0, (scores + values + output) * width),
    ]


ORIGINS = {"log": "measured log", "here": "measured here"}
"""Basis of a measurement by its origin."""


@dataclass(frozen=True)
class Measured:
    """Somebody's clock: seconds of one image, at the batch at which it was measured.

    origin  "log" (published by others) or "here" (this computer); the basis of a `Speedup`
    seconds_per_image  of the whole network; None where attention alone was measured
    """

    name: str
    device: str
    workload: str
    software: str
    precision: str
    batch: int
    attention_seconds_per_image: float
    seconds_per_image: float | None
    source: str
    origin: str = "log"

    def __post_init__(self) -> None:
        if self.origin not in ORIGINS:
            raise ValueError(f"origin must be one of {', '.join(ORIGINS)}, got {self.origin!r}")

    @property
    def basis(self) -> str:
        return ORIGINS[self.origin]

    @property
    def label(self) -> str:
        what = f"{self.device}, {self.software}, {self.precision}, batch {self.batch}"
        return f"{what} ({self.basis})"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"basis": self.basis, "label": self.label} | asdict(self)


MEASURED: dict[str, Measured] = {
    log.name: log
    for log in (
        Measured(
            "jetson-tx2",
            "Jetson TX2",
            "ViT-Tiny, 196 tokens, 12 layers of 3 heads",
            "TensorRT",
            "precision not stated",
            1,
            3.322222e-3,
            14.911232e-3,
            "ViTCoD's authors, per-layer averages of their repository's profile: the products "
            "of scores and of values and the softmax between them, 12 layers; all 456 layers",
        ),
        Measured(
            "rtx-2080-ti",
            "RTX 2080 Ti",
            "ViT-Tiny, 196 tokens, 12 layers of 3 heads",
            "PyTorch, eager",
            "fp32",
            2048,
            0.664473 / 3 / 2048,
            3.035566 / 3 / 2048,
            "ViTCoD's authors, kernel times of 3 profiled steps: both batched products, the "
            "scale and the softmax; all kernels",
        ),
    )
}
"""Logs by name. ViTCoD's tables are against a Xavier NX, its published log is of a TX2."""


@dataclass(frozen=True)
class Speedup:
    """How many times faster an image is, and than what."""

    factor: float
    part: str
    subject: str
    against: str
    basis: str

    def __str__(self) -> str:
        return f"{self.factor:.3g}x ({self.part}): {self.subject} against {self.against}"


def speedup(report: Report, against: Modelled | Measured, attention_only: bool = True) -> Speedup:
    """Time an image on ``against`` over time an image in ``report``, batches named."""
    own = report.attention_seconds if attention_only else report.seconds
    if not own:
        raise ValueError(f"{report.workload} on {report.simulator} takes no time in this part")
    if isinstance(against, Modelled):
        other = against.attention_seconds if attention_only else against.seconds
        other = other / against.batch
    else:
        other = against.attention_seconds_per_image if attention_only else against.seconds_per_image
        if other is None:
            raise ValueError(f"{against.label}: attention alone was measured, not the network")
    part = "attention" if attention_only else "end to end"
    subject = f"{report.workload} on {report.simulator}, batch {report.batch} (simulated)"
    return Speedup(other * report.batch / own, part, subject, against.label, against.basis)
