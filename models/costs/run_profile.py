"""Where a network's measured run time goes on this computer's processor.

The EfficientViT paper (CVPR 2023, section 2.1) calls reshapes, element-wise additions,
copies and normalisation memory-bound: they move data and compute next to nothing. Times
are those of PyTorch's profiler, an operation's own without the operations inside it; work
that PyTorch fuses (softmax within fused attention) counts with what it is fused into.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..running import evaluating

MEMORY_BOUND = ("reshape", "add", "copy", "normalisation")
"""The paper's four kinds."""

PRODUCTS, ACTIVATION, SAMPLING, OTHER = "products", "activation", "sampling", "other element-wise"

_KINDS = {
    PRODUCTS: "linear matmul mm addmm bmm baddbmm mv addmv einsum conv1d conv2d conv3d convolution "
    "_convolution mkldnn_convolution thnn_conv2d slow_conv2d_forward _slow_conv2d_forward "
    "_conv_depthwise2d convolution_overrideable scaled_dot_product_attention "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math "
    "_fused_sdp_choice",
    "reshape": "view _unsafe_view reshape flatten unflatten permute transpose t numpy_T as_strided "
    "expand expand_as broadcast_to unsqueeze squeeze select slice narrow split unbind chunk "
    "split_with_sizes tensor_split alias detach resolve_conj resolve_neg _reshape_alias "
    "view_as reshape_as movedim swapaxes pixel_shuffle pixel_unshuffle channel_shuffle",
    "copy": "copy clone contiguous _to_copy to cat concat stack index index_select gather roll pad "
    "constant_pad_nd repeat flip empty empty_like empty_strided new_empty resize zeros zeros_like "
    "ones full fill zero new_zeros arange scalar_tensor lift_fresh upsample_bicubic2d "
    "upsample_bilinear2d upsample_nearest2d _upsample_bicubic2d_aa",
    "add": "add sub rsub addcmul",
    "normalisation": "layer_norm native_layer_norm batch_norm native_batch_norm group_norm "
    "_batch_norm_impl_index native_group_norm rms_norm _fused_rms_norm instance_norm "
    "_native_batch_norm_legit_no_training mkldnn_batch_norm",
    ACTIVATION: "relu gelu silu hardswish hardtanh hardsigmoid sigmoid tanh clamp clamp_min elu "
    "leaky_relu softplus softmax _softmax _safe_softmax log_softmax glu mish",
    SAMPLING: "grid_sampler grid_sampler_2d grid_sample deform_conv",
}
KIND_OF = {op: kind for kind, ops in _KINDS.items() for op in ops.split()}
"""PyTorch's operation -> its kind here; what is not listed is `OTHER`."""


@dataclass(frozen=True)
class RunProfile:
    """Times of one batch. ``operations`` are seconds by PyTorch's name, summed over repeats
    and divided by them; ``seconds`` is the median batch without the profiler."""

    model: str
    image_size: tuple[int, int]
    batch: int
    threads: int
    repeats: int
    seconds: float
    operations: Mapping[str, float]

    @property
    def kinds(self) -> dict[str, float]:
        """Seconds by kind, most first."""
        sums: dict[str, float] = {}
        for name, seconds in self.operations.items():
            kind = operation_kind(name)
            sums[kind] = sums.get(kind, 0.0) + seconds
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    @property
    def profiled_seconds(self) -> float:
        """Sum of all operations: what shares are shares of."""
        return sum(self.operations.values())

    @property
    def memory_bound_share(self) -> float:
        """Share of the operations' time in the paper's four memory-bound kinds."""
        kinds = self.kinds
        return sum(kinds.get(kind, 0.0) for kind in MEMORY_BOUND) / self.profiled_seconds

    def largest(self, kind: str, count: int = 3) -> tuple[str, ...]:
        """PyTorch's names of the ``count`` operations of ``kind`` that took longest."""
        own = [name for name in self.operations if operation_kind(name) == kind]
        names = sorted(own, key=lambda name: -self.operations[name])
        return tuple(name.removeprefix("aten::") for name in names[:count])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "model": self.model,
            "image_size": list(self.image_size),
            "batch": self.batch,
            "threads": self.threads,
            "repeats": self.repeats,
            "seconds_per_batch": self.seconds,
            "memory_bound_share": self.memory_bound_share,
            "kinds": {
                kind: {"seconds": seconds, "share": seconds / self.profiled_seconds}
                for kind, seconds in self.kinds.items()
            },
            "operations": dict(sorted(self.operations.items(), key=lambda item: -item[1])),
        }


def operation_kind(name: str) -> str:
    """The kind of a PyTorch operation, its library and the ``_`` of in-place forms apart."""
    plain = name.rpartition("::")[2]
    return KIND_OF.get(plain) or KIND_OF.get(plain.rstrip("_"), OTHER)


def profile_run(
    model: nn.Module,
    image_size: int | tuple[int, int] | None = None,
    batch: int = 1,
    threads: int | None = None,
    repeats: int = 5,
    progress: Callable[[float], None] | None = None,
) -> RunProfile:
    """Time ``model`` on random images in evaluation, operation by operation.

    image_size  a side in pixels or (height, width); default ``model.image_size``, else 224
    threads     of PyTorch during the run; default as it is set
    repeats     batches timed, and as many profiled, after two that are not

    The model and the number of threads are left as they were. Raises ValueError for a
    batch, threads or repeats below 1, and what the forward raises.
    """
    if min(batch, repeats, threads or 1) < 1:
        raise ValueError(
            f"batch, threads and repeats are at least 1, got {batch}, {threads}, {repeats}"
        )
    size = image_size or getattr(model, "image_size", 224)
    sides = (size, size) if isinstance(size, int) else (size[0], size[1])
    like = next(model.parameters())
    images = torch.randn(batch, 3, *sides, dtype=like.dtype, device=like.device)
    tell = progress or (lambda share: None)
    with evaluating(model), set_threads(threads), torch.inference_mode():
        times = timed(lambda: model(images), repeats, lambda share: tell(share / 2))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            for done in range(repeats):
                model(images)
                tell(0.5 + (done + 1) / repeats / 2)
        used = torch.get_num_threads()
    averages = recorded.key_averages()
    operations = {e.key: e.self_cpu_time_total / 1e6 / repeats for e in averages}
    name = getattr(model, "registered_name", type(model).__name__)
    return RunProfile(name, sides, batch, used, repeats, statistics.median(times), operations)


def timed(
    run: Callable[[], Tensor],
    repeats: int,
    progress: Callable[[float], None] = lambda share: None,
    warm_up: int = 2,
) -> list[float]:
    """Wall-clock seconds of each of ``repeats`` runs, after ``warm_up`` that are not timed."""
    for _ in range(warm_up):
        run()
    seconds = []
    for done in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
        progress((done + 1) / repeats)
    return seconds


def relative_time(run: Callable[[], Tensor], base: Callable[[], Tensor], repeats: int) -> float:
    """How many times as long ``run`` takes as ``base``: the median over ``repeats`` pairs.

    The two take turns, so that what slows the computer for a while slows both.
    """
    ratios = []
    for _ in range(repeats + 1):
        pair = timed(base, 1, warm_up=0) + timed(run, 1, warm_up=0)
        ratios.append(pair[1] / pair[0])
    return statistics.median(ratios[1:])  # the first pair warms up


@contextlib.contextmanager
def set_threads(count: int | None) -> Iterator[None]:
    """PyTorch's threads inside the block; None leaves them. Afterwards as they were."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
