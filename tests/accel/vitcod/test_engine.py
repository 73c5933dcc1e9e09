"""The compiled engine against its naive twin: every count, every cycle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from naive_engine import Twin
from numba import njit

from sievit.accel import jit as compiled
from sievit.accel.hardware import Hardware, presets
from sievit.accel.schedule import ASSIGNMENTS, DEFAULT, Schedule
from sievit.accel.vitcod import engine
from sievit.accel.vitcod.mapper import choose
from sievit.accel.vitcod.program import V, build
from sievit.accel.vitcod.registers import COUNTS, PHASES, STALLS
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


def both(op, hardware, instances=1, schedule=DEFAULT):
    """(program, trace, twin) of an attention call."""
    mapping = choose(op, hardware, schedule)
    program, _ = build(mapping, instances)
    trace = engine.run(program, mapping)
    return program, trace, Twin(program, hardware, mapping).run()


def assert_equal_runs(trace, twin):
    assert {name: trace.count(name) for name in COUNTS} == {n: twin.count[n] for n in COUNTS}
    assert trace.stage_phases.tolist() == [[p[name] for name in PHASES] for p in twin.phases]
    assert trace.stage_engines.tolist() == twin.engines
    assert trace.stage_stalls.tolist() == [[s[name] for name in STALLS] for s in twin.stalls]
    assert trace.stage_times.tolist() == twin.stage_times
    times = [twin.transfer_times[i] for i in range(len(trace.transfer_times))]
    assert trace.transfer_times.tolist() == times
    units = [(u, r) for u, n in enumerate(np.diff(twin.p.unit_row)) for r in range(n)]
    assert trace.row_ready.tolist() == [twin.ready.get(place, 0) for place in units]
    for found, times in ((trace.landed_at, twin.tokens), (trace.decoded_at, twin.decoded)):
        for side, ends in times.items():
            assert found[side, : len(ends)].tolist() == ends
            assert not found[side, len(ends) :].any()


def random_case(seed):
    """A call, a machine that it fits, a number of instances and a schedule, anything varied."""
    rng = np.random.default_rng(seed)
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    square = rng.random() < 0.6
    queries = int(rng.integers(1, 20))
    heads = pick(1, 2, 4)
    codec = None
    if heads > 1 and rng.random() < 0.5:
        groups = pick(1, 2)
        codec = HeadCodec(heads, pick(groups, heads), groups)
    hardware = replace(
        SMALL,
        lines=pick(1, 2, 3, 4, 7),
        q_banks=pick(1, 2, 5, 8),
        k_banks=pick(1, 2, 4),
        v_banks=pick(1, 3, 8),
        output_banks=pick(1, 2, 4),
        index_entries_per_cycle=pick(1, 2, 8),
        pipeline_cycles=pick(0, 1, 4),
        reconfigure_cycles=pick(0, 3),
        softmax_lanes=pick(1, 4),
        softmax_latency_cycles=pick(0, 30),
        dram_latency_cycles=pick(0, 1, 20),
        dram_bytes_per_s=pick(500_000_000, 3_300_000_000, 40_000_000_000),
        decoder_macs=pick(1, 16, 500),
        q_buffer_bytes=pick(200, 512, 4096),
        k_buffer_bytes=pick(200, 512, 4096),
        v_buffer_bytes=pick(200, 4096),
        index_buffer_bytes=pick(120, 400),
        output_buffer_bytes=pick(1200, 8192),
        other_buffer_bytes=pick(300, 2048),
    )
    op = attention(
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
    return op, hardware, pick(1, 1, 2), Schedule(assignment=ASSIGNMENTS[seed % 3])


@pytest.mark.parametrize("seed", range(60))
def test_equals_its_naive_twin(seed):
    op, hardware, instances, schedule = random_case(seed)
    _, trace, twin = both(op, hardware, instances, schedule)
    assert_equal_runs(trace, twin)


@pytest.mark.parametrize("seed", range(30))
def test_equals_its_naive_twin_on_ddr4(seed):
    op, hardware, instances, schedule = random_case(seed)
    hardware = replace(
        hardware,
        dram_model="ddr4",
        dram_bytes_per_s=(1, 2, 4)[seed % 3] * 19_200_000_000,
        dram_map=("groups_interleaved", "rows_interleaved")[seed % 2],
        index_buffer_bytes=hardware.index_buffer_bytes + 100,
    )
    _, trace, twin = both(op, hardware, instances, schedule)
    assert_equal_runs(trace, twin)


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
    _, trace, twin = both(op, SMALL, schedule=Schedule(assignment=policy))
    assert_equal_runs(trace, twin)


@pytest.fixture(scope="module")
def deit_masks(golden):
    mask = AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy"))
    return [tuple(polarize_head(keep) for keep in layer) for layer in mask.keep]


@pytest.mark.parametrize(("layer", "number"), [(2, 0), (7, 1), (10, 2)])
def test_equals_its_twin_on_real_heads(deit_masks, layer, number):
    op = Attention("real", 1, 197, 197, 64, 64, masks=deit_masks[layer][number : number + 1])
    _, trace, twin = both(op, presets["vitcod"])
    assert_equal_runs(trace, twin)


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
