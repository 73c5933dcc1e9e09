"""Simulate one sparse network on several machines: lines, bandwidth, how work is assigned.

python examples/simulate_configurations.py [MASK.npz or ViTCoD's MASK.npy] [MODEL]
"""

import sys
from dataclasses import replace

import numpy as np

from sievit.accel import Schedule, presets, simulate
from sievit.models import create, trace
from sievit.workload import AttentionMask


def local_mask(workload, width: int = 8, seed: int = 0) -> AttentionMask:
    """A stand-in where no learned mask is at hand: a band, the CLS token, a few global keys."""
    generator = np.random.default_rng(seed)
    layers = []
    for op in workload.attention:
        places = np.arange(op.keys)
        band = abs(places[:, None] - places) < width
        keep = band | (generator.random((op.heads, 1, op.keys)) < 0.03)
        keep[:, 0], keep[:, :, 0] = True, True
        layers.append(keep)
    return AttentionMask(tuple(layers))


def main(mask_path: str | None = None, model: str = "deit_tiny") -> None:
    dense = trace(create(model))
    mask = AttentionMask.load(mask_path) if mask_path else local_mask(dense)
    sparse = dense.with_attention(mask)
    machine = presets["vitcod"]
    usual = Schedule()
    configurations = {
        "as published": (machine, usual),
        "half the lines": (replace(machine, lines=32), usual),
        "a quarter of the bandwidth": (replace(machine, dram_bytes_per_s=19_200_000_000), usual),
        "whole columns, in turn": (machine, replace(usual, assignment="round_robin")),
        "8 banks a buffer": (replace(machine, q_banks=8, k_banks=8, v_banks=8), usual),
    }
    print(f"{model}, {mask.sparsity:.0%} of attention pruned")
    for name, (hardware, schedule) in configurations.items():
        report = simulate(sparse, hardware, schedule=schedule)
        print(
            f"{name:>27}: attention {report.attention_cycles:>7,} cycles, network "
            f"{report.seconds * 1e3:5.2f} ms, busiest in attention: {report.bottleneck()}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:3])
