"""What no run of the engine may break: conservation laws, lower bounds, direction of change."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from engine_laws import LAWS, computed_entries, expected_entries, made_run
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sievit.accel.dram.ddr4 import ADDRESS_MAPS
from sievit.accel.hardware import Hardware, presets
from sievit.accel.schedule import ASSIGNMENTS, DEFAULT, Schedule
from sievit.accel.vitcod.mapper import candidates, choose
from sievit.accel.vitcod.program import CHANNELS, INDEX, STORE, K, Q, V
from sievit.accel.vitcod.registers import STALLS
from sievit.accel.vitcod.run import run_attention
from sievit.workload import Attention, AttentionMask, HeadCodec, polarize_head

exhaustive = settings(derandomize=True, deadline=None, max_examples=80)

BUFFERS = [name for name in Hardware.__dataclass_fields__ if name.endswith("_buffer_bytes")]


@st.composite
def calls(draw):
    """Any attention call: empty and full masks, rows without work, rectangles, codecs."""
    queries = draw(st.integers(1, 24))
    keys = draw(st.one_of(st.just(queries), st.integers(1, 24)))
    heads = draw(st.sampled_from([1, 2, 4]))
    dims = draw(st.tuples(*2 * [st.sampled_from([4, 8, 12, 20])]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    density = draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
    least = draw(st.sampled_from([0, queries // 2, queries]))
    keep = rng.random((heads, queries, keys)) < density
    if draw(st.booleans()):  # a full row and a column nearly full
        keep[:, rng.integers(queries)] = True
        keep[:, :, rng.integers(keys)] |= rng.random((heads, queries)) < 0.9
    masks = draw(st.sampled_from([None, tuple(polarize_head(h, least) for h in keep)]))
    groups = draw(st.sampled_from([0, 1, 2]))
    codec = None
    if groups and heads % groups == 0:
        codec = HeadCodec(heads, draw(st.sampled_from([groups, heads])), groups)
    bias = draw(st.sampled_from([0, 0, heads * 7, heads * queries * keys]))
    return Attention(
        "call", heads, queries, keys, *dims, masks=masks, codec=codec, bias_params=bias
    )


machines = st.builds(
    Hardware,
    lines=st.sampled_from([1, 2, 5, 8, 64]),
    q_banks=st.sampled_from([1, 4, 32]),
    k_banks=st.sampled_from([1, 4, 32]),
    v_banks=st.sampled_from([1, 4, 32]),
    output_banks=st.sampled_from([1, 4, 32]),
    index_entries_per_cycle=st.sampled_from([1, 8]),
    pipeline_cycles=st.sampled_from([0, 4]),
    reconfigure_cycles=st.sampled_from([0, 4]),
    softmax_lanes=st.sampled_from([1, 8]),
    softmax_latency_cycles=st.sampled_from([0, 300]),
    decoder_macs=st.sampled_from([1, 16, 10**5]),
    dram_bytes_per_s=st.sampled_from([500_000_000, 3_300_000_000, 76_800_000_000]),
    dram_latency_cycles=st.sampled_from([0, 25]),
)

schedules = st.builds(Schedule, assignment=st.sampled_from(ASSIGNMENTS))


def run(op, hardware, schedule=DEFAULT, instances=1, mapping=None):
    """(mapping, program, trace) of a call, every law checked."""
    made = made_run(op, hardware, schedule, instances, mapping)
    for law in LAWS:
        law(made)
    return made.mapping, made.program, made.trace


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@exhaustive
@given(op=calls(), hardware=machines, schedule=schedules, instances=st.sampled_from([1, 2]))
def test_law(law, op, hardware, schedule, instances):
    law(made_run(op, hardware, schedule, instances))


@exhaustive
@given(calls(), machines, schedules, st.sampled_from([1, 2]))
def test_every_entry_is_computed_once(op, hardware, schedule, instances):
    made = made_run(op, hardware, schedule, instances)
    entries = computed_entries(op, made.mapping, made.program)
    assert len(entries) == instances * op.heads * 2
    for (_, head, _), times in entries.items():
        assert np.array_equal(times, expected_entries(op, head))


@exhaustive
@given(calls(), machines, schedules, st.sampled_from([60, 300, 900, 54272]), st.randoms())
def test_laws_hold_on_every_mapping_that_may_be_taken(op, hardware, schedule, size, random):
    fields = [field for field in BUFFERS if random.random() < 0.5]
    hardware = replace(hardware, **dict.fromkeys(fields, size))
    for mapping in random.sample(made := candidates(op, hardware, schedule), min(len(made), 3)):
        run(op, hardware, schedule, mapping=mapping)


@exhaustive
@given(calls(), machines, schedules, st.sampled_from([1, 2]))
def test_laws_hold_where_no_buffer_has_a_byte_to_spare(op, hardware, schedule, instances):
    """The least buffers that the refusal asks for are enough, and nothing comes to a stand."""
    hardware = replace(hardware, **dict.fromkeys(BUFFERS, 1))
    with pytest.raises(ValueError, match="does not fit") as refusal:
        choose(op, hardware, schedule)
    needed = re.findall(r"(\w+) is 1, one pass needs at least (\d+)", str(refusal.value))
    run(op, replace(hardware, **{name: int(size) for name, size in needed}), schedule, instances)


def ddr4_of(hardware, channels=4, dram_map="groups_interleaved"):
    """The machine with a stepped memory; its bandwidth is that of whole channels."""
    bandwidth = channels * 19_200_000_000
    return replace(hardware, dram_model="ddr4", dram_bytes_per_s=bandwidth, dram_map=dram_map)


@settings(exhaustive, max_examples=60)
@given(calls(), machines, schedules, st.sampled_from([1, 2]), st.sampled_from([1, 4]))
def test_laws_hold_on_ddr4(op, hardware, schedule, instances, channels):
    hardware = ddr4_of(hardware, channels, list(ADDRESS_MAPS)[instances - 1])
    _, program, trace = run(op, hardware, schedule, instances)
    assert trace.count("dram_lines") == len(program.bursts)
    rate = hardware.dram_bytes_per_cycle
    assert trace.count("cycles") * rate.numerator >= 64 * len(program.bursts) * rate.denominator
    for channel in range(CHANNELS):
        lines = program.bursts[slice(*program.channel_burst[channel : channel + 2])]
        assert lines["bytes"].sum() == program.dram_bytes(channel)
        assert (lines["bytes"] <= 64).all()
    loads = program.channel_first[STORE]
    took = np.diff(trace.transfer_times[:loads], axis=1)
    assert (took >= hardware.dram_latency_cycles).all()


@settings(exhaustive, max_examples=60)
@given(calls(), machines, schedules, st.sampled_from([1, 4]))
def test_ddr4_is_hardly_ever_faster_than_flat(op, hardware, schedule, channels):
    """With banks enough: where one bank serves many lines, who comes when decides how many
    share a read, and late data may happen to fall better (6 of 700 machines, up to 13 %). A
    codec's decoder may likewise meet the tokens in a better order: 26 of 1,646 calls with a
    codec were up to 2.7 % faster, none of 1,354 without one."""
    banks = dict.fromkeys(["q_banks", "k_banks", "v_banks", "output_banks"], 64)
    ddr4 = ddr4_of(replace(hardware, **banks), channels)
    flat = replace(ddr4, dram_model="flat")
    cycles = [run(op, machine, schedule)[2].count("cycles") for machine in (ddr4, flat)]
    assert cycles[0] >= cycles[1] * (0.97 if op.codec else 1)


@settings(exhaustive, max_examples=40)
@given(calls(), machines, schedules)
def test_ddr4_runs_where_no_buffer_has_a_byte_to_spare(op, hardware, schedule):
    hardware = ddr4_of(replace(hardware, **dict.fromkeys(BUFFERS, 1)), 2)
    with pytest.raises(ValueError, match="does not fit") as refusal:
        choose(op, hardware, schedule)
    needed = re.findall(r"(\w+) is 1, one pass needs at least (\d+)", str(refusal.value))
    run(op, replace(hardware, **{name: int(size) for name, size in needed}), schedule)


@exhaustive
@given(calls(), machines, schedules, st.sampled_from(BUFFERS), st.integers(1, 4000))
def test_laws_hold_whatever_a_buffer_holds(op, hardware, schedule, field, size):
    hardware = replace(hardware, **{field: size})
    try:
        choose(op, hardware, schedule)
    except ValueError:
        assume(False)
    run(op, hardware, schedule)


@pytest.mark.parametrize("codec", [None, HeadCodec(6, 3), HeadCodec(6, 4, groups=2)])
def test_many_tokens_overflow_the_buffers_and_the_bytes_say_so(codec):
    rng = np.random.default_rng(0)
    keep = rng.random((1025, 1025)) < 0.01
    keep[0] = True
    keep[:, :3] = True
    hardware = presets["vitcod"]
    op = Attention(
        "long", 6, 1025, 1025, 64, 64, masks=(polarize_head(keep, 512),) * 6, codec=codec
    )
    mapping, program, _ = run(op, hardware)
    assert len(mapping.key_tiles) > 1
    once = 6 * 1025 * 64
    assert program.dram_bytes(V) == len(mapping.query_tiles) * once
    if codec is None:
        assert program.dram_bytes(K) == len(mapping.query_tiles) * once
        assert program.dram_bytes(Q) == once
    else:  # one head a pass: its block's latents are loaded again for each head
        assert mapping.group == 1
        assert program.dram_bytes(Q) == once * codec.latent_heads // codec.groups


def test_heads_of_one_pass_share_the_banks_as_one_head_does():
    """4 heads of 8 words in 32 banks: were they laid out token after token, each token of a
    head would begin in the same bank."""
    keep = np.random.default_rng(3).random((4, 96, 96)) < 0.3
    masks = tuple(polarize_head(head, 96) for head in keep)
    stalled = []
    for groups in (1, 4):
        codec = HeadCodec(4, 4, groups)
        op = Attention("call", 4, 96, 96, 64, 64, masks=masks, codec=codec)
        mapping, _, trace = run(op, replace(presets["vitcod"], decoder_macs=10**5))
        assert mapping.group == 4 // groups
        stalled.append(int(trace.stage_stalls[:, STALLS.index("bank")].sum()))
    assert stalled[0] < 1.1 * stalled[1]


def test_4096_tokens():
    keep = np.random.default_rng(1).random((4096, 4096)) < 0.005
    keep[0] = keep[:, 0] = True
    op = Attention("longer", 1, 4096, 4096, 64, 64, masks=(polarize_head(keep, 2048),))
    mapping, program, _ = run(op, presets["vitcod"])
    assert mapping.entry_bytes == 2
    assert program.dram_bytes(Q) == 4096 * 64
    assert program.dram_bytes(K) == len(mapping.query_tiles) * 4096 * 64


def test_dense_attention_takes_close_to_the_ideal():
    """Nothing pruned: all lines work nearly always once data flows."""
    op = Attention("dense", 3, 197, 197, 64, 64)
    _, program, trace = run(op, presets["vitcod"])
    assert program.dram_bytes(INDEX) == 0
    assert trace.count("cycles") < 1.35 * 3 * 197 * 197 * 16 / 64


@pytest.fixture(scope="module")
def deit_masks(golden):
    mask = AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy"))
    return [tuple(polarize_head(keep) for keep in layer) for layer in mask.keep]


def run_layers(layers, hardware, codec=None, schedule=DEFAULT):
    """Cycles of each layer, laws checked."""
    cycles = []
    for masks in layers:
        op = Attention("layer", 3, 197, 197, 64, 64, masks=masks, codec=codec)
        cycles.append(run(op, hardware, schedule)[2].count("cycles"))
    return np.array(cycles)


@pytest.mark.parametrize("codec", [None, HeadCodec(3, 2)])
@pytest.mark.parametrize("policy", ASSIGNMENTS)
def test_laws_hold_on_the_real_masks(deit_masks, policy, codec):
    run_layers(deit_masks, presets["vitcod"], codec, Schedule(assignment=policy))


@pytest.mark.parametrize("codec", [None, HeadCodec(3, 2)])
def test_ddr4_costs_a_little_on_the_real_masks(deit_masks, codec):
    """Tensors of a few rows spread over all channels: close to the flat model. A single layer
    may gain (6 %, the first) where queries that come less evenly meet less at the banks."""
    flat = run_layers(deit_masks, presets["vitcod"], codec)
    for dram_map in ADDRESS_MAPS:
        cycles = run_layers(deit_masks, ddr4_of(presets["vitcod"], 4, dram_map), codec)
        assert (cycles >= 0.93 * flat).all()
        assert flat.sum() < cycles.sum() < 1.25 * flat.sum()


def test_cutting_long_rows_is_worth_it(deit_masks):
    cycles = {
        policy: run_layers(
            deit_masks, presets["vitcod"], schedule=Schedule(assignment=policy)
        ).sum()
        for policy in ASSIGNMENTS
    }
    assert cycles["balanced"] < cycles["round_robin"] < cycles["lockstep"]


BETTER = {
    "dram_bytes_per_s": 2,
    "index_entries_per_cycle": 2,
    "softmax_lanes": 4,
    "output_banks": 2,
    "k_banks": 2,
    "index_buffer_bytes": 2,
    "other_buffer_bytes": 2,
    "dram_latency_cycles": 0,
    "softmax_latency_cycles": 0,
    "pipeline_cycles": 0,
}


@pytest.mark.parametrize("machine", ["vitcod", "vitcod_ddr4"])
@pytest.mark.parametrize("field", BETTER)
def test_more_of_a_resource_is_hardly_ever_slower(deit_masks, field, machine):
    """Arbitration in turn shifts by a cycle and conflicts fall otherwise: 1 % of noise a
    network, 5 % a layer; never more."""
    hardware = presets[machine]
    better = replace(hardware, **{field: getattr(hardware, field) * BETTER[field]})
    before, after = run_layers(deit_masks, hardware), run_layers(deit_masks, better)
    assert after.sum() <= 1.01 * before.sum()
    assert (after <= 1.05 * before).all()


@pytest.mark.parametrize("machine", ["vitcod", "vitcod_ddr4"])
def test_a_larger_output_buffer_and_the_mapper(deit_masks, machine):
    """The documented exception (`estimate`): the third layer's heads differ much, and the
    first of the larger machine's candidates loses 15 % there. Of the best three none does."""
    hardware = presets[machine]
    larger = replace(hardware, output_buffer_bytes=2 * hardware.output_buffer_bytes)
    before, after = run_layers(deit_masks, hardware), run_layers(deit_masks, larger)
    assert after.sum() <= 1.01 * before.sum()
    assert (after <= 1.16 * before).all()
    layer = Attention("third", 3, 197, 197, 64, 64, masks=deit_masks[2])
    best_of_three = run_attention(layer, larger, schedule=Schedule(mappings_stepped=3))
    assert best_of_three.cycles <= before[2]


@pytest.mark.parametrize("machine", ["vitcod", "vitcod_ddr4"])
@pytest.mark.parametrize("field", ["q_banks", "v_banks", "lines"])
def test_twice_the_banks_or_lines_is_faster(deit_masks, field, machine):
    hardware = presets[machine]
    better = replace(hardware, **{field: getattr(hardware, field) * 2})
    assert run_layers(deit_masks, better).sum() < run_layers(deit_masks, hardware).sum()
