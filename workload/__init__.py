"""The waist of sievit: a network for one image as a list of plain operations, and the masks
and codecs that are put into it.

Models become a `Workload` (`sievit.models.trace`), and every machine reads it. Numpy only:
neither a model nor a machine is known here. Read `bits`, `masks`, `ops`, `network`.
"""

from ..moved import old_names
from .masks import (
    GLOBAL_THRESHOLD,
    PUBLISHED_GLOBAL_THRESHOLD,
    AttentionMask,
    GlobalThreshold,
    PolarizedMask,
    polarize_head,
)
from .network import Workload
from .ops import Attention, Conv, Deform, Elementwise, Gemm, HeadCodec, Op, Unknown, Unused

__all__ = [
    "GLOBAL_THRESHOLD",
    "PUBLISHED_GLOBAL_THRESHOLD",
    "Attention",
    "AttentionMask",
    "Conv",
    "Deform",
    "Elementwise",
    "Gemm",
    "GlobalThreshold",
    "HeadCodec",
    "Op",
    "PolarizedMask",
    "Unknown",
    "Unused",
    "Workload",
    "polarize_head",
]

__getattr__ = old_names(__name__)
