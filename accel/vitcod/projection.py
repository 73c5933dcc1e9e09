"""A product that makes Q, K or V, with what happens to its results before DRAM: the encoder
compresses Q and K, and the first heads stay in the scratchpad for the attention behind it.
"""

from __future__ import annotations

from dataclasses import replace

from ...workload import Conv, Gemm
from ..products import product_cost
from ..report.report import OpCost, Traffic
from ..schedule import Schedule
from .estimate import kept_bytes
from .mapping import Mapping, codec_side_bytes
from .run import AttentionRun


def kept_of(mapping: Mapping, sides: str) -> int:
    """Bytes of ``sides`` of Q, K and V that are on chip when the call begins, as DRAM would
    hold them."""
    return sum(size for side, size in zip("qkv", kept_bytes(mapping), strict=True) if side in sides)


def projection_cost(
    op: Gemm | Conv,
    sides: str,
    run: AttentionRun,
    kept: int,
    schedule: Schedule,
    batch: int,
) -> OpCost:
    """A product of Q, K or V: what stays on chip is not stored, and with a codec the encoder
    behind it lets Q and K leave the chip compressed."""
    attention, codec, hardware = run.op, run.op.codec, run.hardware
    coded = "".join(side for side in sides if side in "qk") if codec else ""
    width = hardware.operand_bytes
    saved, macs, cycles, weights = kept // width, 0, 0, 0
    if codec and coded:
        tokens = {"q": attention.queries, "k": attention.keys}
        vectors = attention.windows * batch * sum(tokens[side] for side in coded)
        saved += vectors * attention.key_dim * (codec.heads - codec.latent_heads)
        macs = codec.macs(vectors, attention.key_dim)
        cycles = -(-macs // hardware.encoder_macs)
        weights = len(coded) * codec_side_bytes(attention, hardware, decoder=False)
    saved = min(saved, op.elements_written * batch)
    cost = product_cost(op, hardware, batch, saved, cycles, schedule=schedule, kept_bytes=kept)
    if not macs:
        return cost
    loaded = (
        Traffic("codec weights", "dram", weights, 0),
        Traffic("codec weights", "buffer", weights, weights),
    )
    every, traffic = cost.macs + macs, (*cost.traffic, *loaded)
    return replace(cost, macs=every, kept_macs=every, codec_macs=macs, traffic=traffic)
