"""Calls of one token, heads that keep nothing, machines without latency: no simulator breaks.

The released script refuses such calls: its own tests say how.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from sievit.accel import Hardware, Schedule, simulate
from sievit.accel.schedule import ASSIGNMENTS, ON_CHIP, VECTOR_FUSIONS
from sievit.accel.simulators.registry import SIMULATORS
from sievit.workload import Attention, Gemm, HeadCodec, Workload, polarize_head


def small_network(rng: random.Random) -> Workload:
    """One call, with a projection before it or without."""
    heads, queries = rng.choice([1, 2, 3]), rng.choice([1, 1, 2, 7, 20])
    keys, dim = rng.choice([1, queries, queries, 5, 20]), rng.choice([1, 4, 8, 20])
    generator = np.random.default_rng(rng.randrange(10**6))
    keep = generator.random((heads, queries, keys)) < rng.choice([0, 0, 0.1, 0.5, 1])
    if rng.random() < 0.3:
        keep[0] = False
    threshold = rng.choice([0.5, "none", "all", 0])
    masks = tuple(polarize_head(head, threshold) for head in keep) if rng.random() < 0.9 else None
    codec = HeadCodec(heads, 1) if rng.random() < 0.3 else None
    sizes = heads, queries, keys, dim, rng.choice([1, dim]), rng.choice([1, 3])
    op = Attention("call", *sizes, masks=masks, codec=codec)
    before = (Gemm("qkv", queries, heads * dim, 3 * heads * dim),) if rng.random() < 0.5 else ()
    return Workload("network", (*before, op))


def small_machine(rng: random.Random) -> Hardware:
    return Hardware(
        lines=rng.choice([1, 4, 64]),
        macs_per_line=rng.choice([1, 8]),
        pipeline_cycles=rng.choice([0, 4]),
        dram_latency_cycles=rng.choice([0, 25]),
        softmax_latency_cycles=rng.choice([0, 16]),
        reconfigure_cycles=rng.choice([0, 4]),
        dram_model=rng.choice(["flat", "flat", "ddr4"]),
        clock_hz=rng.choice([10**7, 5 * 10**8]),
    )


@pytest.mark.parametrize("name", [name for name in SIMULATORS if name != "released"])
def test_no_small_call_breaks_a_simulator(name):
    rng = random.Random(name)
    for _ in range(60):
        workload, hardware = small_network(rng), small_machine(rng)
        schedule = Schedule(
            index_streams=rng.choice([1, 2]),
            assignment=rng.choice(ASSIGNMENTS),
            vector_fusion=rng.choice(VECTOR_FUSIONS),
            on_chip=rng.choice(ON_CHIP),
            global_threshold=rng.choice([None, None, "best", "none"]),
        )
        batch = rng.choice([1, 2])
        report = simulate(workload, hardware, name, batch, schedule=schedule)
        assert report.cycles > 0
        assert all(count >= 0 for op in report.ops for count in op.phases.values())
