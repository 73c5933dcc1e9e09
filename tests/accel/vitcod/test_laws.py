"""What no run of the engine may break: conservation laws, lower bounds, direction of change."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from engine_laws import LAWS, OLD, computed_entries, expected_entries, made_run
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sievit.accel.dram.ddr4 import ADDRESS_MAPS
from sievit.accel.encodings import ENCODINGS
from sievit.accel.hardware import Hardware, presets
from sievit.accel.schedule import (
    ASSIGNMENTS,
    DEFAULT,
    INDEX_LOADS,
    KEY_LOADS,
    LATENTS,
    OBJECTIVES,
    QUERY_LOADS,
    SCRATCHPADS,
    Schedule,
    UserMapping,
)
from sievit.accel.vitcod.core.registers import STALLS
from sievit.accel.vitcod.mapper import candidates, choose
from sievit.accel.vitcod.program import CHANNELS, INDEX, STORE, K, Q, V
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
    latent_banks=st.sampled_from([1, 4, 32]),
    sorted_lists=st.booleans(),
    index_entries_per_cycle=st.sampled_from([1, 8]),
    pipeline_cycles=st.sampled_from([0, 4]),
    reconfigure_cycles=st.sampled_from([0, 4]),
    softmax_lanes=st.sampled_from([1, 8]),
    softmax_latency_cycles=st.sampled_from([0, 300]),
    decoder_macs=st.sampled_from([1, 16, 10**5]),
    dram_bytes_per_s=st.sampled_from([500_000_000, 3_300_000_000, 76_800_000_000]),
    dram_latency_cycles=st.sampled_from([0, 25]),
)


schedules = st.builds(
    Schedule,
    assignment=st.sampled_from(ASSIGNMENTS),
    objective=st.sampled_from(OBJECTIVES),
    scratchpad=st.sampled_from(SCRATCHPADS),
    on_chip=st.sampled_from(["fitting", "fitting", "nothing"]),
    latents=st.sampled_from(LATENTS),
    index_streams=st.sampled_from([1, 2]),
    index_encoding=st.sampled_from(list(ENCODINGS)),
    sparser_percent=st.sampled_from([1, 100, 108, 300]),
    query_loads=st.sampled_from(QUERY_LOADS),
    key_loads=st.sampled_from(KEY_LOADS),
    index_loads=st.sampled_from(INDEX_LOADS),
)

rooms = st.sampled_from([0, 500, 3000, 10**6])
"""Bytes that the projection may leave on chip."""


def run(op, hardware=None, instances=1, mapping=None, schedule=DEFAULT, room=0):
    """(mapping, program, trace) of a call, every law checked."""
    hardware = hardware or mapping.hardware
    made = made_run(op, hardware, instances, mapping, schedule, room)
    for law in LAWS:
        law(made)
    return made.mapping, made.program, made.trace


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@exhaustive
@given(calls(), machines, st.sampled_from([1, 2]), schedules, rooms)
def test_law(law, op, hardware, instances, schedule, room):
    law(made_run(op, hardware, instances, None, schedule, room))


@exhaustive
@given(calls(), machines, st.sampled_from([1, 2]), schedules, rooms)
def test_every_entry_is_computed_once(op, hardware, instances, schedule, room):
    made = made_run(op, hardware, instances, None, schedule, room)
    entries = computed_entries(made)
    assert len(entries) == instances * op.heads * 2
    for (_, head, _), times in entries.items():
        assert np.array_equal(times, expected_entries(op, head))


@exhaustive
@given(calls(), machines, st.sampled_from([60, 300, 900, 54272]), schedules, rooms, st.randoms())
def test_laws_hold_on_every_mapping_that_may_be_taken(op, hardware, size, schedule, room, random):
    fields = [field for field in BUFFERS if random.random() < 0.5]
    hardware = replace(hardware, **dict.fromkeys(fields, size))
    made = candidates(op, hardware, schedule, 1, room)
    for mapping in random.sample(made, min(len(made), 3)):
        run(op, hardware, mapping=mapping)


def least_machine(op, hardware, schedule):
    """The buffers that the refusal asks for where no buffer has more than a byte."""
    hardware = replace(hardware, **dict.fromkeys(BUFFERS, 1))
    with pytest.raises(ValueError, match="does not fit") as refusal:
        choose(op, hardware, schedule)
    needed = re.findall(r"([\w +]+) is \d+, one pass needs at least (\d+)", str(refusal.value))
    for names, size in needed:
        first, *others = names.strip().split(" + ")
        hardware = replace(hardware, **{first: int(size) - len(others)})
    return hardware


@exhaustive
@given(calls(), machines, st.sampled_from([1, 2]), schedules)
def test_laws_hold_where_no_buffer_has_a_byte_to_spare(op, hardware, instances, schedule):
    """The least buffers that the refusal asks for are enough, and nothing comes to a stand."""
    run(op, least_machine(op, hardware, schedule), instances, schedule=schedule)


@pytest.mark.parametrize("seed", range(100))
def test_a_mapping_runs_in_the_least_index_buffer_that_it_is_granted(seed):
    rng = np.random.default_rng(seed)
    queries, keys, lines = (int(size) for size in rng.integers((2, 2, 1), (9, 9, 3)))
    keep = rng.random((queries, keys)) < rng.choice([0.3, 0.6, 1.0])
    op = Attention("call", 1, queries, keys, 8, 8, masks=(polarize_head(keep, queries),))
    schedule = Schedule(
        index_streams=int(rng.integers(1, 3)),
        index_encoding=("relative", "relative", "absolute")[seed % 3],
        assignment=ASSIGNMENTS[seed % 3],
        mapping=UserMapping(),
    )
    with pytest.raises(ValueError, match="index_buffer_bytes is 1, it needs") as refusal:
        choose(op, Hardware(lines=lines, index_buffer_bytes=1), schedule)
    least = int(str(refusal.value).split("it needs ")[1])
    run(op, Hardware(lines=lines, index_buffer_bytes=least), schedule=schedule)


def ddr4_of(hardware, channels=4, dram_map="groups_interleaved"):
    """The machine with a stepped memory; its bandwidth is that of whole channels."""
    bandwidth = channels * 19_200_000_000
    return replace(hardware, dram_model="ddr4", dram_bytes_per_s=bandwidth, dram_map=dram_map)


@settings(exhaustive, max_examples=60)
@given(calls(), machines, st.sampled_from([1, 2]), st.sampled_from([1, 4]), schedules, rooms)
def test_laws_hold_on_ddr4(op, hardware, instances, channels, schedule, room):
    hardware = ddr4_of(hardware, channels, list(ADDRESS_MAPS)[instances - 1])
    _, program, trace = run(op, hardware, instances, None, schedule, room)
    assert trace.count("dram_lines") == len(program.bursts)
    rate = hardware.dram_bytes_per_cycle
    assert trace.count("cycles") * rate.numerator >= 64 * len(program.bursts) * rate.denominator
    for channel in range(CHANNELS):
        lines = program.bursts[slice(*program.channel_burst[channel : channel + 2])]
        assert lines["bytes"].sum() == program.dram_bytes(channel)
        assert (lines["bytes"] <= 64).all()
    loaded = program.transfers["bytes"] > 0
    loaded[slice(*program.channel_first[STORE : STORE + 2])] = False
    took = np.diff(trace.transfer_times[loaded], axis=1)
    assert (took >= hardware.dram_latency_cycles).all()


@settings(exhaustive, max_examples=60)
@given(calls(), machines, st.sampled_from([1, 4]))
def test_ddr4_is_never_faster_than_flat(op, hardware, channels):
    """With banks enough: where one bank serves many lines, who comes when decides how many
    share a read, and late data may happen to fall better (6 of 700 machines, up to 13 %)."""
    banks = dict.fromkeys(["q_banks", "k_banks", "v_banks", "output_banks"], 64)
    ddr4 = ddr4_of(replace(hardware, **banks), channels)
    flat = replace(ddr4, dram_model="flat")
    assert run(op, ddr4)[2].count("cycles") >= run(op, flat)[2].count("cycles")


@settings(exhaustive, max_examples=40)
@given(calls(), machines, schedules)
def test_ddr4_runs_where_no_buffer_has_a_byte_to_spare(op, hardware, schedule):
    run(op, least_machine(op, ddr4_of(hardware, 2), schedule), schedule=schedule)


@exhaustive
@given(calls(), machines, st.sampled_from(BUFFERS), st.integers(1, 4000), schedules)
def test_laws_hold_whatever_a_buffer_holds(op, hardware, field, size, schedule):
    hardware = replace(hardware, **{field: size})
    assume(candidates(op, hardware, schedule))
    run(op, hardware, schedule=schedule)


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
    mapping, program, _ = run(op, hardware, schedule=OLD)
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
        hardware = replace(presets["vitcod"], decoder_macs=10**5)
        mapping, _, trace = run(op, hardware, schedule=replace(DEFAULT, latents="fill"))
        assert mapping.group == 4 // groups
        stalled.append(int(trace.stage_stalls[:, STALLS.index("bank")].sum()))
    assert stalled[0] < 1.1 * stalled[1]


def test_4096_tokens():
    keep = np.random.default_rng(1).random((4096, 4096)) < 0.005
    keep[0] = keep[:, 0] = True
    op = Attention("longer", 1, 4096, 4096, 64, 64, masks=(polarize_head(keep, 2048),))
    for schedule, entry_bits in ((OLD, 16), (DEFAULT, 8)):
        mapping, program, _ = run(op, presets["vitcod"], schedule=schedule)
        assert mapping.widths.entry_bits == entry_bits
        assert program.dram_bytes(Q) == 4096 * 64
        tiles = len(mapping.query_tiles)
        assert tiles > 1
        assert mapping.used_keys == (schedule is DEFAULT)
        if mapping.used_keys:  # of 164 queries, each with 20 keys of 4,096 by chance
            share = 1 - (1 - 0.005) ** mapping.query_tile  # the first tile has the full row
            expected = (1 + (tiles - 1) * share) * 4096 * 64
            assert program.dram_bytes(K) == pytest.approx(expected, rel=0.02)
        else:
            assert program.dram_bytes(K) == tiles * 4096 * 64
        assert program.dram_bytes(V) == program.dram_bytes(K)


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


def layer(masks, codec=None):
    return Attention("layer", 3, 197, 197, 64, 64, masks=masks, codec=codec)


def run_layers(layers, hardware, codec=None, schedule=DEFAULT, room=0):
    """Cycles of each layer, laws checked."""
    calls = (layer(masks, codec) for masks in layers)
    runs = [run(op, hardware, schedule=schedule, room=room) for op in calls]
    return np.array([trace.count("cycles") for *_, trace in runs])


@pytest.mark.parametrize("codec", [None, HeadCodec(3, 2)])
@pytest.mark.parametrize("policy", ASSIGNMENTS)
@pytest.mark.parametrize("schedule", [OLD, DEFAULT], ids=["old", "default"])
def test_laws_hold_on_the_real_masks(deit_masks, policy, schedule, codec):
    schedule = replace(schedule, assignment=policy)
    run_layers(deit_masks, presets["vitcod"], codec, schedule, room=100_000)


@pytest.mark.parametrize("codec", [None, HeadCodec(3, 2)])
def test_ddr4_costs_a_little_on_the_real_masks(deit_masks, codec):
    """Tensors of a few rows spread over all channels: close to the flat model. A single layer
    may gain (6 %, the first) where queries that come less evenly meet less at the banks."""
    calls = [layer(masks, codec) for masks in deit_masks]
    mappings = [choose(op, presets["vitcod"]) for op in calls]
    runs = zip(calls, mappings, strict=True)
    flat = np.array([run(op, mapping=made)[2].count("cycles") for op, made in runs])
    for dram_map in ADDRESS_MAPS:
        hardware = ddr4_of(presets["vitcod"], 4, dram_map)
        same = [replace(made, hardware=hardware) for made in mappings]
        runs = zip(calls, same, strict=True)
        cycles = np.array([run(op, mapping=made)[2].count("cycles") for op, made in runs])
        assert (cycles >= 0.93 * flat).all()
        assert flat.sum() < cycles.sum() < 1.25 * flat.sum()


def test_cutting_long_rows_is_worth_it(deit_masks):
    cycles = {
        policy: run_layers(
            deit_masks, presets["vitcod"], schedule=replace(DEFAULT, assignment=policy)
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
    before, after = (run_layers(deit_masks, made, schedule=OLD) for made in (hardware, larger))
    assert after.sum() <= 1.01 * before.sum()
    assert (after <= 1.16 * before).all()
    three = replace(OLD, mappings_stepped=3)
    assert run_attention(layer(deit_masks[2]), larger, schedule=three).cycles <= before[2]


@pytest.mark.parametrize("machine", ["vitcod", "vitcod_ddr4"])
@pytest.mark.parametrize("field", ["q_banks", "v_banks", "lines"])
def test_twice_the_banks_or_lines_is_faster(deit_masks, field, machine):
    hardware = presets[machine]
    better = replace(hardware, **{field: getattr(hardware, field) * 2})
    assert run_layers(deit_masks, better).sum() < run_layers(deit_masks, hardware).sum()
