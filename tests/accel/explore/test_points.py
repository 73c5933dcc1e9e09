"""Points of an exploration: fronts, missing figures, sensitivity."""

from __future__ import annotations

import numpy as np
import pytest
from explored import GRID, SMALL, script_workload, tiny_workload

from sievit.accel.explore.grid import grid
from sievit.accel.explore.points import ATTENTION_OBJECTIVES, OBJECTIVES, sensitivity
from sievit.accel.explore.sweep import explore


def test_front_and_missing_figures():
    found = explore({"a": tiny_workload()}, GRID, base=SMALL, jobs=1)
    for objectives in (OBJECTIVES, ATTENTION_OBJECTIVES, ("sram_bytes",)):
        front = found.front(objectives)
        assert front
        assert [p.cost(objectives[0]) for p in front] == sorted(
            p.cost(objectives[0]) for p in front
        )
    with pytest.raises(ValueError, match=r"no figure 'bottleneck'.* has cycles, seconds"):
        found.front(("bottleneck",))
    released = explore({"a": script_workload()}, [{}], simulator="released", jobs=1)
    assert released.points[0].figures["energy_pj"] is None
    with pytest.raises(ValueError, match="no figure 'energy_pj' under simulator 'released'"):
        released.front()
    assert released.front(("seconds", "area_mm2")) == released.points


def test_sensitivity_compares_like_with_like():
    values = {
        "lines": (4, 8),
        "q_buffer_bytes+k_buffer_bytes": (1024, 2048),
        "dram_bytes_per_s": (4 * 10**9, 8 * 10**9),
    }
    work = {"a": tiny_workload(), "b": tiny_workload(kept=0.7)}
    labels = {"a": {"sparsity": 0.7}, "b": {"sparsity": 0.3}}
    found = explore(work, grid(values), base=SMALL, jobs=1, labels=labels)
    assert found.axes() == {
        "sparsity": ("sparsity",),
        "lines": ("lines",),
        "q, k_buffer_bytes": ("q_buffer_bytes", "k_buffer_bytes"),
        "dram_bytes_per_s": ("dram_bytes_per_s",),
    }
    effects = sensitivity(found, "attention_cycles")["lines"]
    assert [effect.value for effect in effects] == [4, 8]
    assert effects[0][1:] == (1.0, 1.0, 1.0, 8)
    ratios = []
    for slow in found.points:
        if slow.labels["lines"] == 4:
            same = {**slow.labels, "lines": 8}
            fast = next(point for point in found.points if point.labels == same)
            ratios.append(fast.cost("attention_cycles") / slow.cost("attention_cycles"))
    assert effects[1] == (8, min(ratios), float(np.median(ratios)), max(ratios), 8)
