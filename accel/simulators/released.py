"""ViTCoD's released simulator, figure by figure: what the published script prints.

Its own formulas (they were found by running it), for comparison alone; its faults are kept:
attention runs on width x width MACs and the linear layers on width x height, head 0 stands
for all heads, loads hide behind other layers' computing, transfers round up token by token,
76.8 GB/s is read as GiB, and index, output, softmax and FFN weights cost nothing.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from ...masks import PUBLISHED_MIN_KEPT, PolarizedMask
from ...workload import Attention, Workload
from ..hardware import Hardware
from ..report import OpCost, Report

BANDWIDTH = 76.8 * 2**30 / 5e8  # bytes a cycle, as coded there


def simulate_released(workload: Workload, hardware: Hardware, batch: int = 1) -> Report:
    """The script's cycles for ``workload``: one "attention" and one "dense" operation.

    Heads, tokens, dims, masks and codec come from the workload, width and height from the
    hardware's lines and MACs a line. ``details`` hold the script's own sums. Raises
    ValueError, naming the layer, where the script would divide by zero.
    """
    if batch != 1:
        raise ValueError(f"the released script knows one image, got batch {batch}")
    calls = workload.attention
    if not calls:
        raise ValueError(f"{workload.name} has no attention")
    width, height = hardware.lines, hardware.macs_per_line
    loading = decoding = computing = 0
    for op in calls:
        parts = _attention(op, width)
        loading, decoding, computing = (
            total + part for total, part in zip((loading, decoding, computing), parts, strict=True)
        )
    total = max(loading, decoding + computing)
    linear, ffn = (
        sum(parts) for parts in zip(*(_linear(op, width, height) for op in calls), strict=True)
    )
    attention = OpCost(
        "attention",
        "attention",
        total,
        {"load" if loading == total else "decode and compute": total},
        macs=0,
        kept_macs=0,
        details={"preloading": loading, "processing": decoding, "computation": computing},
    )
    dense = OpCost(
        "linear and FFN",
        "dense",
        linear + ffn,
        {"linear": linear, "ffn": ffn},
        macs=0,
        kept_macs=0,
    )
    return Report("released", workload.name, hardware, batch, (attention, dense))


def _transfer(size: float, share: float = 1.0) -> int:
    return ceil(size / (BANDWIDTH * share))


def _attention(op: Attention, width: int) -> tuple[int, int, int]:
    """(loading, decoding, computing) of a layer, by its head 0."""
    heads, dim, tokens = op.heads, op.key_dim, op.queries
    ratio = op.codec.ratio if op.codec else 1.0
    mask = _head_zero(op)
    columns = int((mask.dense().sum(axis=0) > PUBLISHED_MIN_KEPT).sum())
    sparse = int(np.sort(mask.dense().sum(axis=0))[: mask.keys - columns].sum())
    denser = int(width * (columns * tokens / (sparse + columns * tokens))) if columns else 0
    if not columns or not denser or not sparse:
        raise ValueError(
            f"the released script divides by zero at {op.name}: head 0 has {columns} global "
            f"keys, {sparse} kept entries beside them and {denser} of {width} lines for them"
        )
    sparser = width - denser
    token, token_v = _transfer(heads * ratio * dim), _transfer(heads * dim)
    weights = _transfer(heads * ratio, 1 / heads)
    loading = columns * token + 2 * weights + tokens * token + (tokens - columns) * token
    loading += (weights if tokens > columns else 0) + tokens * token_v
    decoding = 2 * tokens * ceil(heads * ratio * dim / int(width * width / heads))
    step = ceil(dim / (width / heads))
    computing = max(columns * ceil(tokens / denser) * step, ceil(sparse / sparser) * step)
    computing += max(
        ceil(tokens * dim * columns / int(denser * width / heads)),
        ceil(sparse * dim / int(sparser * width / heads)),
    )
    return loading, decoding, computing


def _head_zero(op: Attention) -> PolarizedMask:
    if op.masks is None:
        raise ValueError(f"the released script needs masks, {op.name} has none")
    if op.queries != op.keys:
        raise ValueError(
            f"the released script needs a square mask, {op.name} is {op.queries} x {op.keys}"
        )
    return op.masks[0]


def _linear(op: Attention, width: int, height: int) -> tuple[int, int]:
    """(linear, FFN) of a layer: QKV, encoder and projection; then two layers of ratio 4."""
    heads, dim, tokens = op.heads, op.key_dim, op.queries
    ratio = op.codec.ratio if op.codec else 1.0
    embed = heads * dim
    lanes = int(width * height / heads)
    compute = 3 * tokens * (embed * dim // lanes) + tokens * embed * dim // lanes
    loading = 3 * dim * _transfer(heads * embed) + 2 * _transfer(heads, 1 / (heads * ratio))
    loading += 2 * tokens * _transfer(dim, 1 / (heads * ratio)) + tokens * _transfer(dim, 1 / heads)
    loading += tokens // lanes * embed * _transfer(dim, 1 / heads)
    ffn = 2 * (4 * tokens * embed * embed // (width * height))
    return max(compute, loading), ffn
