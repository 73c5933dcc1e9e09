"""Exact attention under a fixed mask: `sparse_attention` and its choice of a kernel.

softmax(scale Q K^T) V over the entries that the mask keeps; a query that keeps none gives
0. Behind it stand the operators of `operators`, compiled loops on a CPU and Triton on a
GPU, and PyTorch's own attention where that is faster or nothing else is there.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import operators  # noqa: F401  registers torch.ops.sievit
from .plan import DENSE_SHARE, SHORT_KEYS, AttentionPlan

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LEAST_DIM, MOST_DIM = 1, 256
KERNELS = ("compiled", "tiles", "short", "dense", "reference")

HAVE_NUMBA = importlib.util.find_spec("numba") is not None
HAVE_TRITON = importlib.util.find_spec("triton") is not None

_log = logging.getLogger("sievit.accel.kernels")

Kernel = Literal["auto", "compiled", "tiles", "short", "dense", "reference"]


@dataclass(frozen=True)
class Choice:
    """Which kernel computes a call, and why.

    compiled   loops over the kept entries (CPU)
    tiles      gathered keys of tiles of queries (GPU)
    short      all keys of a short sequence in one tile, masked (GPU)
    dense      PyTorch's scaled_dot_product_attention with the mask
    reference  `reference_attention`
    """

    kernel: Kernel
    reason: str


def choose_kernel(plan: AttentionPlan, device: torch.device, dtype: torch.dtype) -> Choice:
    """The kernel that ``sparse_attention`` takes by itself."""
    if dtype == torch.float64:
        return Choice("reference", "float64 is computed by the reference alone")
    if plan.density > DENSE_SHARE:
        reason = f"{plan.density:.0%} is kept, above {DENSE_SHARE:.0%} dense is faster"
        return Choice("dense", reason)
    if device.type == "cpu":
        if HAVE_NUMBA:
            return Choice("compiled", f"{plan.density:.1%} is kept")
        return Choice("dense", "numba is not installed")
    if device.type == "cuda":
        if not HAVE_TRITON:
            return Choice("dense", "triton is not installed")
        if plan.keys <= SHORT_KEYS and dtype != torch.float32:
            return Choice("short", f"{plan.keys} keys fit one tile")
        return Choice("tiles", f"tiles compute {plan.area:.0%} of all entries")
    return Choice("dense", f"there is no kernel for {device.type}")


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float | None = None,
    *,
    kernel: Kernel = "auto",
) -> Tensor:
    """Attention over the entries that ``plan`` keeps, exact and differentiable.

    q       [batch, heads, queries, key_dim], float32, float16 or bfloat16 (float64 by the
            reference), any strides
    k, v    [batch, heads, keys, key_dim] and [..., value_dim], of the same dtype and device
    scale   key_dim ** -0.5 by default
    kernel  one of `Choice`'s, or "auto" for `choose_kernel`

    Returns [batch, heads, queries, value_dim]. A query that keeps no key gives 0. Under
    autocast the operands are cast as those of ``scaled_dot_product_attention``. Gradients
    for q, k and v are the same in every run. Raises ValueError for other shapes, dtypes,
    devices or kernels than these.
    """
    if q.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(q.device.type):
        lower = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t.to(lower) if t.is_floating_point() else t for t in (q, k, v))
    _check(q, k, v, plan)
    scale = _scale(q, scale)
    if kernel == "auto":
        choice = choose_kernel(plan, q.device, q.dtype)
        kernel = choice.kernel
        if not torch.compiler.is_compiling():
            _say(choice, q.device)
    if q.dtype == torch.float64 and kernel not in ("dense", "reference"):
        raise ValueError(f"kernel {kernel!r} does not take float64: 'reference' and 'dense' do")
    if kernel == "compiled":
        return torch.ops.sievit.attention_by_rows(
            q, k, v, plan.order, plan.indptr, plan.columns, scale
        )[0]
    if kernel in ("tiles", "short"):
        _check_gpu(kernel, plan, q.device, q.dtype)
        words = plan.words if kernel == "short" else plan.words[:0]
        tiles = (plan.by_query.listed(), plan.by_key.listed())
        return torch.ops.sievit.attention_by_tiles(q, k, v, *tiles, words, scale)[0]
    if kernel == "dense":
        return dense_attention(q, k, v, plan.dense(), scale)
    if kernel == "reference":
        return reference_attention(q, k, v, plan.dense(), scale)
    raise ValueError(f"kernel must be 'auto' or one of {', '.join(KERNELS)}, got {kernel!r}")


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float | None = None
) -> Tensor:
    """The equation, written out: what every kernel is tested against, in float64."""
    scale = _scale(q, scale)
    scores = (q @ k.mT * scale).masked_fill(~keep, -math.inf)
    empty = ~keep.any(dim=-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(dim=-1)
    return weights.masked_fill(~keep, 0.0) @ v


def dense_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> Tensor:
    """PyTorch's attention with the mask ``keep``, bool [heads, queries, keys]."""
    empty = ~keep.any(dim=-1, keepdim=True)
    allowed = (keep | empty)[None]  # four axes: with three, the fast kernels refuse the mask
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)
    return mixed.masked_fill(empty, 0.0)


def _scale(q: Tensor, given: float | None) -> float:
    return q.shape[-1] ** -0.5 if given is None else float(given)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> None:
    if {q.ndim, k.ndim, v.ndim} != {4}:
        raise ValueError(
            "q, k and v are [batch, heads, tokens, dim], "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    for name, tensor, tokens in (("q", q, plan.queries), ("k", k, plan.keys), ("v", v, plan.keys)):
        if tensor.shape[1] != plan.heads or tensor.shape[2] != tokens:
            raise ValueError(
                f"the plan is for {plan.heads} heads, {plan.queries} queries and {plan.keys} "
                f"keys; {name} is {list(tensor.shape)}"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"q is {q.dtype} on {q.device}, {name} is {tensor.dtype} on {tensor.device}; "
                "they must be alike"
            )
        if tensor.shape[0] != q.shape[0]:
            raise ValueError(f"q is of {q.shape[0]} images, {name} of {tensor.shape[0]}")
        if not LEAST_DIM <= tensor.shape[3] <= MOST_DIM:
            raise ValueError(
                f"the head dim must be {LEAST_DIM} to {MOST_DIM}, {name} is {list(tensor.shape)}"
            )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has key_dim {q.shape[3]}, k {k.shape[3]}")
    if q.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {q.dtype}")
    if plan.device != q.device:
        raise ValueError(f"q is on {q.device}, the plan on {plan.device}: use plan.to(device)")


def _check_gpu(kernel: str, plan: AttentionPlan, device: torch.device, dtype: torch.dtype) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not HAVE_TRITON or not (device.type == "cuda" or interpreted):
        raise ValueError(
            f"kernel {kernel!r} needs triton and a GPU; triton is "
            f"{'there' if HAVE_TRITON else 'not installed'}, the tensors are on {device}"
        )
    if kernel == "short" and (plan.keys > SHORT_KEYS or dtype == torch.float32):
        raise ValueError(
            f"kernel 'short' takes up to {SHORT_KEYS} keys in float16 or bfloat16, "
            f"got {plan.keys} in {dtype}"
        )


_said: set[tuple[str, str]] = set()


def _say(choice: Choice, device: torch.device) -> None:
    """Log each kernel when it is first taken, with the reason of then; warn once where a
    compiler is missing."""
    missing = choice.reason.endswith("is not installed")
    said = (device.type, choice.reason if missing else choice.kernel)
    if said in _said:
        return
    _said.add(said)
    _log.info("sparse attention on %s: %s (%s)", device.type, choice.kernel, choice.reason)
    if missing:
        warnings.warn(
            f"{choice.reason}: sparse attention on {device.type} is computed densely, slower",
            RuntimeWarning,
            stacklevel=4,
        )


class SparseAttention(nn.Module):
    """`sparse_attention` with a plan that moves with the module; nothing is in its state
    dict. Called with q, k and v, and the scale where it is not key_dim ** -0.5."""

    def __init__(self, plan: AttentionPlan, kernel: Kernel = "auto") -> None:
        super().__init__()
        self.plan = plan
        self.kernel: Kernel = kernel

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.plan = self.plan.to(fn(torch.empty(0, device=self.plan.device)).device)
        return self

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        return sparse_attention(q, k, v, self.plan, scale, kernel=self.kernel)

    def extra_repr(self) -> str:
        plan = self.plan
        return (
            f"heads={plan.heads}, queries={plan.queries}, keys={plan.keys}, kept={plan.density:.1%}"
        )
