"""ViTCoD's released simulator, figure by figure: what the published script prints.

Its own formulas, for comparison alone; its faults are kept. Attention runs on width x width
MACs and the linear layers on width x height, head 0 stands for all heads, loads hide behind
other layers' computing, transfers round up token by token, 76.8 GB/s is read as GiB, and
index, output, softmax and FFN weights cost nothing (for fewer tokens than MACs).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import TypeVar

import numpy as np

from ...moved import old_names
from ...workload import PUBLISHED_GLOBAL_THRESHOLD, Attention, PolarizedMask, Workload
from ..hardware import Hardware
from ..report.report import OpCost
from ..schedule import Schedule
from .simulator import NoParameters, Simulator

Number = TypeVar("Number", int, float)


def costs(
    workload: Workload, hardware: Hardware, _schedule: Schedule, batch: int, _own: NoParameters
) -> tuple[OpCost, OpCost]:
    """The script's cycles for ``workload``: one "attention" and one "dense" operation.

    Heads, tokens, dims, the masks of head 0 and the codec's ratio come from the workload;
    width and height from the hardware's lines and MACs a line, its bandwidth read as GiB.
    ``details`` hold the script's own sums. Raises ValueError, naming the layer, for what the
    script cannot express and for what it would crash on.
    """
    if batch != 1:
        raise ValueError(f"the released script knows one image, got batch {batch}")
    if not workload.attention:
        raise ValueError(f"{workload.name} has no attention")
    for op in workload.attention:
        _check(op)
    attention = [_attention(op, hardware) for op in workload.attention]
    linear = [_linear(op, hardware) for op in workload.attention]
    return _attention_cost(attention), _linear_cost(linear)


def _attention_cost(layers: Iterable[tuple[int, int, int]]) -> OpCost:
    loading, decoding, computing = (sum(parts) for parts in zip(*layers, strict=True))
    waited = max(loading - decoding - computing, 0)
    return OpCost(
        "attention",
        "attention",
        max(loading, decoding + computing),
        {"decode": decoding, "sddmm and spmm": computing, "load beyond them": waited},
        macs=0,
        kept_macs=0,
        details={"preloading": loading, "processing": decoding, "computation": computing},
    )


def _linear_cost(layers: Iterable[tuple[int, ...]]) -> OpCost:
    computing, encoding, loading, ffn_computing, ffn_loading = (
        sum(parts) for parts in zip(*layers, strict=True)
    )
    linear, ffn = max(computing + encoding, loading), max(ffn_computing, ffn_loading)
    return OpCost(
        "linear and FFN",
        "dense",
        linear + ffn,
        {"linear": linear, "ffn": ffn},
        macs=0,
        kept_macs=0,
        details={
            "linear preprocessing": encoding,
            "linear preloading": loading,
            "linear computation": computing,
            "ffn preloading": ffn_loading,
            "ffn computation": ffn_computing,
        },
    )


def _attention(op: Attention, hardware: Hardware) -> tuple[int, int, int]:
    """(loading, decoding, computing) of a layer, by its head 0."""
    heads, dim, tokens, ratio = _sizes(op)
    width = hardware.lines
    columns, sparse = _global_columns(op)
    denser = int(width * (columns * tokens / (sparse + columns * tokens)))
    sparser = width - denser
    _divides(op, hardware.k_buffer_bytes / (heads * dim) - columns, "keys that fit less global")
    token = _transfer(op, heads * ratio * dim, hardware, hardware.k_buffer_bytes)
    value = _transfer(op, heads * dim, hardware, hardware.v_buffer_bytes)
    weights = _transfer(op, heads * ratio, hardware, hardware.q_buffer_bytes, 1 / heads)
    loading = (columns + tokens + tokens - columns) * token + tokens * value
    loading += (2 + (tokens > columns)) * weights
    lanes = _divides(op, int(width * width / heads), "decoder lanes")
    decoding = 2 * tokens * ceil(heads * ratio * dim / lanes)
    step = ceil(dim / (width / heads))
    _divides(op, denser, "lines of the denser engine")
    _divides(op, sparser, "lines of the sparser engine")
    computing = max(columns * ceil(tokens / denser), ceil(sparse / sparser)) * step
    denser_lanes = _divides(op, int(denser * width / heads), "lanes of the denser engine")
    sparser_lanes = _divides(op, int(sparser * width / heads), "lanes of the sparser engine")
    computing += max(
        ceil(tokens * dim * columns / denser_lanes), ceil(sparse * dim / sparser_lanes)
    )
    return loading, decoding, computing


def _linear(op: Attention, hardware: Hardware) -> tuple[int, int, int, int, int]:
    """(computing, encoding, loading, FFN computing, FFN loading) of a layer: Q, K, V and
    output projections with the encoder; then two layers of ratio 4."""
    heads, dim, tokens, ratio = _sizes(op)
    embed, macs = heads * dim, hardware.lines * hardware.macs_per_line
    limit = hardware.output_buffer_bytes
    lanes = _divides(op, int(macs / heads), "lanes of a head")
    encoder = _divides(op, int(macs / (heads * ratio)), "encoder lanes")
    computing = 3 * tokens * (embed * dim // lanes) + tokens * embed * dim // lanes
    encoding = 2 * tokens * (embed // encoder)
    loading = 3 * dim * _transfer(op, heads * embed, hardware, limit)
    loading += 2 * _transfer(op, heads, hardware, limit, 1 / (heads * ratio))
    loading += 2 * tokens * _transfer(op, dim, hardware, limit, 1 / (heads * ratio))
    loading += tokens * _transfer(op, dim, hardware, limit, 1 / heads)
    loading += tokens // lanes * embed * _transfer(op, dim, hardware, limit, 1 / heads)
    ffn = 2 * (4 * tokens * embed * embed // macs)
    ffn_loading = 4 * embed * _transfer(op, embed, hardware, limit)
    ffn_loading += embed * _transfer(op, 4 * embed, hardware, limit)
    return computing, encoding, loading, ffn, tokens // macs * ffn_loading


def _sizes(op: Attention) -> tuple[int, int, int, float]:
    return op.heads, op.key_dim, op.queries, op.codec.ratio if op.codec else 1.0


def _global_columns(op: Attention) -> tuple[int, int]:
    """Columns of head 0 with more than 50 kept entries, and the kept entries of the others."""
    kept = _masks(op)[0].dense().sum(axis=0)
    is_global = kept > PUBLISHED_GLOBAL_THRESHOLD
    columns, sparse = int(is_global.sum()), kept[~is_global]
    _divides(op, columns, "global keys in head 0")
    return columns, _divides(op, int(np.sum(sparse)), "kept entries beside the global keys")


def _transfer(
    op: Attention, size: float, hardware: Hardware, limit: int, share: float = 1.0
) -> int:
    """Cycles of one transfer, rounded up, at a share of 76.8 GiB/s (as it is coded there)."""
    if size > limit:
        raise ValueError(
            f"the released script crashes at {op.name}: one transfer of {size:g} bytes is "
            f"larger than its buffer of {limit}"
        )
    bandwidth = hardware.dram_bytes_per_s / 1e9 * 2**30 / hardware.clock_hz
    return ceil(size / (bandwidth * share))


def _divides(op: Attention, value: Number, what: str) -> Number:
    """``value``, which the script divides by."""
    if value == 0:
        raise ValueError(f"the released script divides by zero at {op.name}: 0 {what}")
    return value


def _masks(op: Attention) -> tuple[PolarizedMask, ...]:
    if op.masks is None:
        raise ValueError(f"the released script needs masks, {op.name} has none")
    return op.masks


def _check(op: Attention) -> None:
    """Refuse what the script has no words for."""
    _masks(op)
    if op.queries != op.keys or op.key_dim != op.value_dim or op.windows != 1:
        raise ValueError(
            "the released script knows one window of as many queries as keys and one head "
            f"dim, {op.name} has {op.windows} of {op.queries} x {op.keys}, dims {op.key_dim} "
            f"and {op.value_dim}"
        )


RELEASED = Simulator("released", costs, "the published script's own formulas")

__getattr__ = old_names(__name__)
