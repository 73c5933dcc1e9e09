"""Twice of any one field of the hardware: what it may do to the objective of a call.

The law is that no doubling makes a schedule's own objective worse by more than 3 %, energy at the
larger machine's prices. It holds for nearly all random machines, not for all: lines that lose
the step in which one read serves many find it again only by chance (`doublings.py` counts any
number of them).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from doublings import doublings

from sievit.accel.hardware import presets
from sievit.accel.report.energy import energy_pj
from sievit.accel.schedule import OBJECTIVES, Schedule
from sievit.accel.vitcod.cost import cost_of
from sievit.accel.vitcod.mapper import candidates
from sievit.accel.vitcod.run import run_attention
from sievit.accel.vitcod.stepped import run_mapping
from sievit.workload import Attention, polarize_head


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_hardly_any_doubling_makes_the_objective_worse(objective):
    ratios = np.array([ratio for ratio, _ in doublings(1, 50, objective)])
    assert len(ratios) == 50
    assert math.isfinite(ratios.max())  # twice of anything is never refused
    assert (ratios > 1.03).mean() <= 0.02
    assert ratios.max() < 1.25


def counted(run, objective):
    """What ``objective`` counts, from the counts of the run alone."""
    cost = cost_of(run, run.instances)
    energy = energy_pj(cost, run.hardware)
    return {
        "cycles": run.cycles,
        "bytes": cost.dram_bytes,
        "energy": energy,
        "edp": energy * run.cycles,
    }[objective]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_of_the_stepped_mappings_the_best_by_the_objective_is_taken(objective):
    """All mappings are stepped: none is better than the one taken."""
    keep = np.random.default_rng(0).random((3, 90, 90)) < 0.15
    keep[:, 0] = keep[:, :, 0] = True
    op = Attention("call", 3, 90, 90, 32, 32, masks=tuple(polarize_head(h, 0.5) for h in keep))
    hardware = replace(presets["vitcod"], dram_bytes_per_s=2 * 10**9, output_buffer_bytes=12_000)
    schedule = Schedule(objective=objective, mappings_stepped=1000)
    taken = counted(run_attention(op, hardware, 1, schedule), objective)
    made = [run_mapping(one, 1) for one in candidates(op, hardware, schedule)]
    cuts = {}
    for run in made:  # of mappings that are cut alike the first stands for all
        cut = (run.mapping.group, run.mapping.query_tile, run.mapping.key_tile)
        cuts.setdefault(cut, counted(run, objective))
    assert taken <= min(cuts.values())
    assert len({round(value, 3) for value in cuts.values()}) > 1
