"""The compiled engine against its naive twin: every count, every cycle."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from engine_laws import OLD
from naive_engine import Twin
from numba import njit

from sievit.accel import jit as compiled
from sievit.accel.encodings import ENCODINGS
from sievit.accel.hardware import Hardware, presets
from sievit.accel.schedule import (
    ASSIGNMENTS,
    INDEX_LOADS,
    KEY_LOADS,
    LATENTS,
    SCRATCHPADS,
    Schedule,
)
from sievit.accel.vitcod.builder import build
from sievit.accel.vitcod.coded import with_index_held
from sievit.accel.vitcod.core import engine
from sievit.accel.vitcod.core.registers import COUNTS, PHASES, STALLS
from sievit.accel.vitcod.mapper import candidates, choose
from sievit.accel.vitcod.program import V
from sievit.accel.vitcod.regions import Cut
from sievit.workload import Attention, AttentionMask, HeadCodec, polarize_head

SMALL = Hardware(
    name="small",
    lines=4,
    q_banks=4,
    k_banks=4,
    v_banks=4,
    output_banks=4,
    index_entries_per_cycle=2,
    q_buffer_bytes=1024,
    k_buffer_bytes=1024,
    v_buffer_bytes=1024,
    index_buffer_bytes=512,
    output_buffer_bytes=8192,
    other_buffer_bytes=1024,
    softmax_lanes=2,
    softmax_latency_cycles=5,
    decoder_macs=24,
    dram_bytes_per_s=10_300_000_000,  # 20.6 bytes a cycle
    dram_latency_cycles=7,
)


def attention(rng, *, queries, keys, dim=16, value_dim=None, heads=1, density=0.3, codec=None,
              min_kept=None, masks=True):  # fmt: skip
    """A random call: one or two columns and rows nearly full, the rest at ``density``."""
    made = []
    for _ in range(heads):
        keep = rng.random((queries, keys)) < density
        keep[:, rng.integers(keys)] |= rng.random(queries) < 0.9
        keep[rng.integers(queries)] |= rng.random(keys) < 0.9
        least = min_kept if min_kept is not None else queries // 2
        made.append(polarize_head(keep, least))
    return Attention("test", heads, queries, keys, dim, value_dim or dim,
                     masks=tuple(made) if masks else None, codec=codec)  # fmt: skip


def both(mapping, instances=1):
    """(trace, twin) of a mapped attention call."""
    program, _ = build(mapping, instances)
    return engine.run(program, mapping), Twin(program, mapping.hardware, mapping).run()


def assert_equal_runs(trace, twin):
    assert {name: trace.count(name) for name in COUNTS} == {n: twin.count[n] for n in COUNTS}
    assert trace.stage_phases.tolist() == [[p[name] for name in PHASES] for p in twin.phases]
    assert trace.stage_engines.tolist() == twin.engines
    assert trace.stage_stalls.tolist() == [[s[name] for name in STALLS] for s in twin.stalls]
    assert trace.stage_times.tolist() == twin.stage_times
    times = [twin.transfer_times.get(i, [0, 0]) for i in range(len(trace.transfer_times))]
    assert trace.transfer_times.tolist() == times
    units = [(u, r) for u, n in enumerate(np.diff(twin.p.unit_row)) for r in range(n)]
    assert trace.row_ready.tolist() == [twin.ready.get(place, 0) for place in units]
    for found, times in ((trace.landed_at, twin.tokens), (trace.decoded_at, twin.decoded)):
        for side, ends in times.items():
            assert found[side, : len(ends)].tolist() == ends
            assert not found[side, len(ends) :].any()


def picker(rng):
    return lambda *values: values[rng.integers(len(values))]


def random_machine(rng):
    pick = picker(rng)
    return replace(
        SMALL,
        lines=pick(1, 2, 3, 4, 7),
        q_banks=pick(1, 2, 5, 8),
        k_banks=pick(1, 2, 4),
        v_banks=pick(1, 3, 8),
        output_banks=pick(1, 2, 4),
        latent_banks=pick(1, 2, 8),
        index_entries_per_cycle=pick(1, 2, 8),
        pipeline_cycles=pick(0, 1, 4),
        reconfigure_cycles=pick(0, 3),
        softmax_lanes=pick(1, 4),
        softmax_latency_cycles=pick(0, 30),
        sorted_lists=pick(True, False),
        dram_latency_cycles=pick(0, 1, 20),
        dram_bytes_per_s=pick(500_000_000, 3_300_000_000, 40_000_000_000),
        decoder_macs=pick(1, 16, 500),
        q_buffer_bytes=pick(200, 512, 4096),
        k_buffer_bytes=pick(200, 512, 4096),
        v_buffer_bytes=pick(200, 4096),
        index_buffer_bytes=pick(160, 400),
        output_buffer_bytes=pick(1200, 8192),
        other_buffer_bytes=pick(300, 2048),
    )


def random_schedule(rng):
    pick = picker(rng)
    return Schedule(
        assignment=pick(*ASSIGNMENTS),
        index_encoding=pick(*ENCODINGS),
        scratchpad=pick(*SCRATCHPADS),
        on_chip=pick("fitting", "fitting", "nothing"),
        latents=pick(*LATENTS),
        index_streams=pick(1, 1, 2),
        sparser_percent=pick(50, 100, 108, 200),
        query_loads=pick("once", "once", "per_key_tile"),
        key_loads=pick(*KEY_LOADS),
        index_loads=pick(*INDEX_LOADS),
    )


def random_call(rng):
    pick = picker(rng)
    square = rng.random() < 0.6
    queries = int(rng.integers(1, 20))
    heads = pick(1, 2, 4)
    codec = None
    if heads > 1 and rng.random() < 0.6:
        groups = pick(1, 2)
        codec = HeadCodec(heads, pick(groups, heads), groups)
    return attention(
        rng,
        queries=queries,
        keys=queries if square else int(rng.integers(1, 20)),
        dim=pick(4, 8, 12, 16),
        value_dim=pick(8, 20),
        heads=heads,
        density=pick(0.0, 0.1, 0.4, 1.0),
        codec=codec,
        min_kept=pick(0, queries // 2, queries),
        masks=rng.random() < 0.9,
    )


def random_case(seed, memory=lambda hardware: hardware):
    """(mapping, instances): a call on a machine that it fits, anything varied; one of the
    mappings that the machine could take, often with something on chip from the beginning."""
    rng = np.random.default_rng(seed)
    pick = picker(rng)
    while True:
        op, hardware, instances = random_call(rng), memory(random_machine(rng)), pick(1, 1, 2)
        room = pick(0, 700, 10**6)
        made = candidates(op, hardware, random_schedule(rng), instances, room)
        if made:
            return with_index_held(pick(*made[:8]), instances), instances


@pytest.mark.parametrize("seed", range(160))
def test_equals_its_naive_twin(seed):
    assert_equal_runs(*both(*random_case(seed)))


@pytest.mark.parametrize("seed", range(80))
def test_equals_its_naive_twin_on_ddr4(seed):
    def memory(hardware):
        return replace(
            hardware,
            dram_model="ddr4",
            dram_bytes_per_s=(1, 2, 4)[seed % 3] * 19_200_000_000,
            dram_map=("groups_interleaved", "rows_interleaved")[seed % 2],
        )

    assert_equal_runs(*both(*random_case(seed, memory)))


def test_the_twin_has_met_every_part():
    """What the random cases above must have held, each by name, and more than once."""
    met = Counter()
    for seed in range(160):
        mapping, _ = random_case(seed)
        op, kept = mapping.op, mapping.kept
        sparse = op.masks is not None and any(mask.sparser_kept for mask in op.masks)
        lists = sparse and mapping.one_stream
        met["kept Q, K and V"] += min(kept.q, kept.k, kept.v) > 0
        met["kept latents"] += kept.latents
        met["values kept beside decoded heads"] += bool(op.codec) and kept.v > 0
        met["resident latents"] += mapping.resident_latents
        met["resident latents of several blocks"] += (
            mapping.resident_latents and op.codec.groups > 1
        )
        met["resident latents, tiles of queries"] += (
            mapping.resident_latents and not mapping.whole_queries
        )
        met["a group of heads"] += mapping.group > 1
        met["lists as they were written"] += lists and not mapping.hardware.sorted_lists
        met["sorted lists"] += lists and mapping.hardware.sorted_lists
        met["lists over tiles of keys"] += lists and len(mapping.key_tiles) > 1
        met["units with keys of their own"] += mapping.used_keys
        met["queries fetched again"] += mapping.fetched_again and len(mapping.key_tiles) > 1
        met["an index for two images"] += mapping.index_held
        met["an index for two images, several heads"] += mapping.index_held and op.heads > 1
        met["two streams"] += sparse and not mapping.one_stream
        met["a cut scratchpad"] += mapping.cut != Cut.fixed(mapping.hardware)
        for name in ENCODINGS:
            met[name] += sparse and mapping.schedule.index_encoding == name
    assert {name for name, times in met.items() if times < 4} == set()


def head(keep, min_kept):
    return polarize_head(np.asarray(keep, dtype=bool), min_kept)


EDGES = {
    "nothing kept": (head(np.zeros((9, 9)), 3),),
    "everything kept, no global key": (head(np.ones((9, 9)), 9),),
    "only global keys": (head(np.ones((9, 9)), 0),),
    "a bitmap and nothing else": (head(np.eye(9) + np.eye(9)[0], 0),),
    "one column": (head(np.eye(9)[:1].repeat(9, 0), 9),),
    "one row": (head(np.eye(9)[:, :1].repeat(9, 1), 9),),
    "one entry": (head(np.diag([0] * 4 + [1] + [0] * 4), 3),),
    "a head with work and one without": (head(np.ones((9, 9)), 9), head(np.zeros((9, 9)), 9)),
    "one token": (head([[1]], 0),),
    "one token, pruned": (head([[0]], 0),),
    "one query": (head(np.ones((1, 9)), 1),),
    "one key": (head(np.ones((9, 1)), 9),),
}


@pytest.mark.parametrize("policy", ASSIGNMENTS)
@pytest.mark.parametrize("masks", EDGES.values(), ids=EDGES)
def test_edges(masks, policy):
    op = Attention("edge", len(masks), masks[0].queries, masks[0].keys, 12, 20, masks=masks)
    for schedule in (OLD, Schedule()):
        schedule = replace(schedule, assignment=policy)
        assert_equal_runs(*both(choose(op, SMALL, schedule, 1, 500)))


@pytest.fixture(scope="module")
def deit_masks(golden):
    mask = AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy"))
    return [tuple(polarize_head(keep) for keep in layer) for layer in mask.keep]


@pytest.mark.parametrize(("layer", "number"), [(2, 0), (7, 1), (10, 2)])
def test_equals_its_twin_on_real_heads(deit_masks, layer, number):
    op = Attention("real", 1, 197, 197, 64, 64, masks=deit_masks[layer][number : number + 1])
    assert_equal_runs(*both(choose(op, presets["vitcod"])))


REAL = {
    "latents and values on chip": (HeadCodec(3, 2), Schedule(latents="resident"), True, 150_000),
    "latents that come, lists as they were written": (
        HeadCodec(3, 2), Schedule(latents="resident"), False, 0,
    ),
    "plain heads on chip": (None, Schedule(), True, 60_000),
    "two streams": (None, Schedule(index_streams=2), True, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_equals_its_twin_on_a_real_layer(deit_masks, name):
    """The three heads of one layer, as a network has them."""
    codec, schedule, sorted_lists, room = REAL[name]
    hardware = replace(presets["vitcod"], sorted_lists=sorted_lists)
    op = Attention("real", 3, 197, 197, 64, 64, masks=deit_masks[6], codec=codec)
    assert_equal_runs(*both(choose(op, hardware, schedule, 1, room)))


def test_a_machine_that_comes_to_a_stand_says_so():
    op = attention(np.random.default_rng(0), queries=12, keys=12)
    mapping = choose(op, SMALL)
    program, _ = build(mapping, 1)
    first = program.channel_first[V]
    program.transfers["after"][first] = len(program.stages)  # V never comes
    with pytest.raises(RuntimeError, match="test stands still at cycle"):
        engine.run(program, mapping)


def test_compiling_is_announced_once(caplog, monkeypatch):
    monkeypatch.setattr(compiled._announcer, "said", False)
    mine, other = (lambda: 1), (lambda: 2)
    mine.__module__, other.__module__ = "sievit.accel.somewhere", "sievit.elsewhere"
    with caplog.at_level("INFO", logger="sievit.accel"):
        njit(other)()
        assert not caplog.records
        njit(mine)()
        njit(mine)()
    assert [record.message for record in caplog.records] == [
        "compiling the simulator, once on this computer: about 20 seconds"
    ]


def test_a_core_that_cannot_be_cached_is_compiled_all_the_same():
    """Code without a file has no place for a cache, like a package nobody can write beside."""
    names = {}
    exec("def twice(x):\n    return 2 * x", names)
    for decorator in (compiled.cached, compiled.cached_core):
        assert decorator(names["twice"])(21) == 42
