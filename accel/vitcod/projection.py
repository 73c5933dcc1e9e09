"""What becomes of the results of a product that makes Q, K or V: the encoder compresses Q and K
before DRAM, and the first heads stay in the scratchpad for the attention behind it.
"""

from __future__ import annotations

from ...workload import Conv, Gemm
from ..products import Results
from .estimate import kept_bytes
from .mapping import Mapping, codec_side_bytes
from .stepped import AttentionRun


def kept_of(mapping: Mapping, sides: str) -> int:
    """Bytes of ``sides`` of Q, K and V that are on chip when the call begins, as DRAM would
    hold them."""
    return sum(size for side, size in zip("qkv", kept_bytes(mapping), strict=True) if side in sides)


def projected(op: Gemm | Conv, sides: str, run: AttentionRun, batch: int) -> Results:
    """Of a product that makes ``sides`` for a call: what stays on chip is not stored, and with a
    codec the encoder lets Q and K leave the chip compressed."""
    attention, codec, hardware = run.op, run.op.codec, run.hardware
    kept = kept_of(run.mapping, sides)
    saved, macs, weights = kept // hardware.operand_bytes, 0, 0
    coded = [side for side in sides if side in "qk"] if codec else []
    if codec and coded:
        if not hardware.encoder_macs:
            raise ValueError(
                f"{op.name} makes {', '.join(coded)} of a codec, and hardware {hardware.name!r} "
                "has encoder_macs 0: take the codec from the workload, or give the machine an "
                "encoder"
            )
        tokens = {"q": attention.queries, "k": attention.keys}
        vectors = attention.windows * batch * sum(tokens[side] for side in coded)
        saved += vectors * attention.key_dim * (codec.heads - codec.latent_heads)
        macs = codec.macs(vectors, attention.key_dim)
        weights = len(coded) * codec_side_bytes(attention, hardware, decoder=False)
    saved = min(saved, op.elements_written * batch)
    return Results(saved, kept, macs, weights)
