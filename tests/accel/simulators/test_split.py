"""The warning where global keys cost time: exact, silent elsewhere, and cheap."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.accel import Schedule, UserMapping, compare, explore, presets, record, simulate
from sievit.accel.simulate import simulate_silently
from sievit.accel.simulators import split
from sievit.accel.simulators.registry import SIMULATORS
from sievit.accel.simulators.split import SAMPLED, TOLERANCE, cycles_unsplit
from sievit.pipeline.networks import attention_cycles
from sievit.workload import Attention, AttentionMask, Gemm, HeadCodec, Workload

SMALL = replace(presets["vitcod"], lines=8, q_banks=8, k_banks=8, v_banks=8)
CODEC = HeadCodec(2, 1)
ALONE = Schedule(global_threshold="none")


def network(mask: AttentionMask, codec: HeadCodec | None = None) -> Workload:
    """A call a layer, after its projection."""
    ops = []
    for layer, (heads, queries, keys) in enumerate(mask.shapes):
        ops.append(Gemm(f"qkv {layer}", queries, 32, 3 * heads * 16))
        ops.append(Attention(f"call {layer}", heads, queries, keys, 16, 16))
    return Workload("w", tuple(ops)).with_attention(mask, codec)


def mask(share: float = 0.2, threshold=3, layers: int = 4, tokens: int = 40) -> AttentionMask:
    """Kept by chance: a low threshold makes dense blocks that are nearly empty."""
    rng = np.random.default_rng(0)
    keep = rng.random((layers, 2, tokens, tokens)) < share
    keep[..., 0] = keep[..., 0, :] = True
    return AttentionMask(tuple(keep), threshold)


def said(run) -> list[str]:
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run()
    return [str(one.message) for one in seen if "global keys" in str(one.message)]


@pytest.mark.parametrize("simulator", ["vitcod", "vitcod_no_codec"])
def test_a_split_that_costs_time_is_warned_of_with_both_figures(simulator):
    workload = network(mask(), CODEC)
    taken, alone = (
        simulate_silently(workload, SMALL, simulator, schedule=schedule).attention_cycles
        for schedule in (Schedule(), ALONE)
    )
    assert taken > 1.2 * alone
    (text,) = said(lambda: simulate(workload, SMALL, simulator))
    assert f"on {simulator} global keys (kept by more than 3 queries) cost time" in text
    assert [int(x.replace(",", "")) for x in re.findall(r"\d+(?:,\d{3})+", text)] == [taken, alone]
    assert f"{taken / alone - 1:.1%} more" in text
    assert 'Schedule(global_threshold="best")' in text
    assert said(lambda: record(workload, SMALL, simulator)) == [text]
    assert text in said(lambda: compare(workload, SMALL, ("systolic", simulator)))
    assert said(lambda: simulate(workload, SMALL, simulator, 2))  # a batch


def test_the_schedules_own_threshold_is_named():
    workload = network(mask(threshold="none"))
    assert not said(lambda: simulate(workload, SMALL))
    (text,) = said(lambda: simulate(workload, SMALL, schedule=Schedule(global_threshold=0.05)))
    assert "(kept by more than 0.05 of the queries)" in text


def test_nothing_is_said_where_no_key_need_be_global():
    workload = network(mask(), CODEC)
    for threshold in ("best", "none"):
        schedule = Schedule(global_threshold=threshold)
        assert not said(lambda schedule=schedule: simulate(workload, SMALL, schedule=schedule))
    for name, entry in SIMULATORS.items():
        expected = name in ("vitcod", "vitcod_no_codec")
        assert entry.splits == expected
        if name != "released":  # refuses the mask
            assert bool(said(lambda name=name: simulate(workload, SMALL, name))) == expected
    crowded = replace(SMALL, q_banks=2, k_banks=2, v_banks=2)
    assert not said(lambda: simulate(network(mask(0.9, 0.5)), crowded))  # the split pays
    assert not said(lambda: simulate(Workload("dense", network(mask()).ops[:1]), SMALL))


def test_sweeps_and_costs_of_masks_say_nothing_and_step_nothing_more(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(split, "_stepped", refuse)
    workload = network(mask(0.21))
    with pytest.raises(AssertionError):
        simulate(workload, SMALL)
    (point,) = explore({"w": workload}, [SMALL], jobs=1).points
    assert point.error is None
    dense = replace(workload, ops=tuple(replace(op, masks=None) if isinstance(op, Attention)
                                        else op for op in workload.ops))  # fmt: skip
    assert not said(lambda: attention_cycles(dense, SMALL, 3)(mask(0.21)))


def test_equal_runs_are_stepped_once(monkeypatch):
    workload, stepped = network(mask(0.22)), []
    make = split._stepped
    monkeypatch.setattr(split, "_stepped", lambda *a: stepped.append(a) or make(*a))
    first = said(lambda: simulate(workload, SMALL))
    assert said(lambda: simulate(replace(workload, name="again"), SMALL)) == first != []
    assert len(stepped) == 1
    simulate_silently(workload, SMALL)
    said(lambda: simulate(workload, replace(SMALL, lines=4)))
    said(lambda: simulate(network(mask(0.23)), SMALL))
    assert len(stepped) == 3
    given, machines = [10**6] * 4, (SMALL, replace(SMALL, lines=4))
    assert len({cycles_unsplit(workload, one, Schedule(), 1, given) for one in machines}) == 2


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.integers(0, 99), st.sampled_from([2, 4, 8]), st.sampled_from([0.1, 0.3, 0.5, 0.8, "all", 5]),
    st.sampled_from([0.05, 0.2, 0.6]), st.booleans(), st.sampled_from([1, 3]),
)  # fmt: skip
def test_what_is_found_is_what_the_machine_takes(seed, banks, threshold, share, coded, batch):
    """Against whole runs: never a loss that is none, and none missed where the longest calls
    lose as well."""
    rng = np.random.default_rng(seed)
    keep = rng.random((5, 2, 24, 24)) < share * rng.random((5, 1, 1, 1)) * 2
    keep[:, :, :, : rng.integers(1, 6)] |= rng.random((5, 2, 24, 1)) < rng.random()
    workload = network(AttentionMask(tuple(keep), threshold), CODEC if coded else None)
    hardware = replace(SMALL, q_banks=banks, k_banks=banks, v_banks=banks)
    ours, alone = (
        [op.cycles for op in simulate_silently(
            workload, hardware, "vitcod", batch, schedule=schedule).attention]
        for schedule in (Schedule(), ALONE)
    )  # fmt: skip
    found = cycles_unsplit(workload, hardware, Schedule(), batch, ours)
    order = sorted(range(5), key=lambda call: -ours[call])[: -(-5 // SAMPLED)]
    sampled = sum(alone[call] for call in order) < sum(ours[call] for call in order)
    if sampled and sum(alone) * TOLERANCE < sum(ours):
        assert found == sum(alone)
    else:
        assert found is None


def test_a_mapping_that_does_not_fit_without_global_keys_is_let_be():
    """Its scores are stored with their keys, for which the output buffer has no room."""
    workload = network(mask(1.0, layers=1))
    scores, accumulators = 2 * 40 * 40 * SMALL.score_bytes, 2 * 40 * 16 * SMALL.accumulator_bytes
    small = replace(SMALL, output_buffer_bytes=scores + accumulators)
    schedule = Schedule(mapping=UserMapping())
    ours = simulate_silently(workload, small, schedule=schedule).attention_cycles
    with pytest.raises(ValueError, match="output_buffer_bytes is 11520, it needs"):
        simulate_silently(workload, small, schedule=replace(schedule, global_threshold="none"))
    assert cycles_unsplit(workload, small, schedule, 1, [2 * ours]) is None
