"""A small network and a grid of machines to explore."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sievit.accel import presets
from sievit.accel.explore.grid import grid
from sievit.workload import Attention, Gemm, HeadCodec, Workload, polarize_head

SMALL = replace(presets["vitcod"], lines=8, name="small")


def tiny_workload(
    name: str = "tiny", kept: float = 0.3, codec: HeadCodec | None = None
) -> Workload:
    generator = np.random.default_rng(7)
    masks = []
    for _ in range(2):
        keep = generator.random((17, 17)) < kept
        keep[:, 0] = keep[0] = True
        masks.append(polarize_head(keep, 10))
    calls = [
        Gemm(f"{layer}.qkv", 17, 16, 48, bias=True) if part == "qkv"
        else Attention(f"{layer}.attn", 2, 17, 17, 8, 8, masks=tuple(masks), codec=codec)
        for layer in range(2)
        for part in ("qkv", "attn")
    ]  # fmt: skip
    return Workload(name, tuple(calls))


def script_workload() -> Workload:
    """The released script wants a global key, which 50 queries keep, and some others."""
    keep = np.eye(60, dtype=bool)
    keep[:, 0] = True
    call = Attention("a", 1, 60, 60, 8, 8, masks=(polarize_head(keep, 50),))
    return Workload("script", (call,))


GRID = grid({"lines": (4, 8, 16), "dram_bytes_per_s": (4 * 10**9, 8 * 10**9)})
