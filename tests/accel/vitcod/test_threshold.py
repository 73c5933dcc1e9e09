"""Which keys are global: the schedule's threshold on the masks of a call."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sievit.accel import presets, simulate
from sievit.accel.schedule import Schedule
from sievit.accel.vitcod.run import run_attention
from sievit.accel.vitcod.threshold import TRIED, repolarized, with_thresholds
from sievit.workload import Attention, HeadCodec, Workload, polarize_head

SMALL = replace(presets["vitcod"], lines=8, q_banks=4, k_banks=4, v_banks=4)


def attention(seed=0, heads=3, codec=None):
    """Heads that differ: columns of every fullness."""
    rng = np.random.default_rng(seed)
    fullness = rng.random((heads, 1, 48)) ** np.array([1, 3, 8])[:heads, None, None]
    keep = rng.random((heads, 48, 48)) < fullness
    keep[:, 0] = True
    masks = tuple(polarize_head(head, 0.5) for head in keep)
    return Attention("call", heads, 48, 48, 16, 16, masks=masks, codec=codec)


@pytest.mark.parametrize("threshold", ["none", "all", 0.3, 0.9, 7])
def test_a_threshold_polarizes_the_kept_entries_again(threshold):
    op = attention()
    made = with_thresholds(op, SMALL, Schedule(global_threshold=threshold))
    for before, after in zip(op.masks, made.masks, strict=True):
        assert after == polarize_head(before.dense(), threshold)
        assert np.array_equal(after.dense(), before.dense())
    assert with_thresholds(op, SMALL, Schedule()) is op


def test_an_equal_mask_is_made_once():
    mask = attention().masks[0]
    assert repolarized(mask, 0.5) is mask
    assert repolarized(mask, "none") is repolarized(mask, "none")


def alone(op, head, threshold):
    """Cycles of one head with all of it on chip."""
    mask = polarize_head(op.masks[head].dense(), threshold)
    one = replace(op, heads=1, codec=None, masks=(mask,))
    space = SMALL.q_buffer_bytes + SMALL.k_buffer_bytes + SMALL.v_buffer_bytes
    return run_attention(one, SMALL, 1, Schedule(), space).cycles


@pytest.mark.parametrize("seed", range(4))
def test_the_best_is_the_fastest_of_each_head_or_of_all_alike(seed):
    op = attention(seed)
    made = with_thresholds(op, SMALL, Schedule(global_threshold="best"))
    cycles = run_attention(made, SMALL).cycles
    own = []
    for head in range(op.heads):
        taken = [alone(op, head, threshold) for threshold in TRIED]
        own.append(TRIED[taken.index(min(taken))])
    choices = []
    for thresholds in (("none",) * 3, (0.5,) * 3, own):
        masks = tuple(
            polarize_head(mask.dense(), threshold)
            for mask, threshold in zip(op.masks, thresholds, strict=True)
        )
        choices.append(replace(op, masks=masks))
    stepped = [run_attention(choice, SMALL).cycles for choice in choices]
    assert cycles == min(stepped)
    assert made.masks == choices[stepped.index(min(stepped))].masks


def test_networks_take_the_schedules_threshold():
    op = attention(codec=HeadCodec(3, 2))
    cycles = {
        threshold: simulate(
            Workload("w", (op,)), SMALL, schedule=Schedule(global_threshold=threshold)
        ).attention_cycles
        for threshold in (None, "best", "none", 0.5, "all")
    }
    assert cycles[None] == cycles[0.5] != cycles["all"]
    assert cycles["best"] <= min(cycles["none"], cycles[0.5])
    dense = Attention("dense", 2, 48, 48, 16, 16)
    assert with_thresholds(dense, SMALL, Schedule(global_threshold="best")) is dense
