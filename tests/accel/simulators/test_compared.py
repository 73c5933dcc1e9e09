"""The compared machines: Sanger's packing by a naive twin, SpAtten's cascade, their laws."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.accel import presets, simulate
from sievit.accel.products import array_cycles, layouts
from sievit.accel.products.array import Array
from sievit.accel.schedule import Schedule
from sievit.accel.simulators import cascade, overlap, packing, sanger, spatten
from sievit.workload import Attention, AttentionMask, Gemm, Workload, polarize_head

VITCOD = presets["vitcod"]
QUICK = settings(derandomize=True, deadline=None, max_examples=40)


def pack_naive(kept: list[int], width: int) -> list[list[tuple[int, int]]]:
    """Array rows as lists of (mask row, entries): every open row is looked at."""
    rows: list[list[tuple[int, int]]] = []
    for index, count in enumerate(kept):
        while count >= width:
            rows.append([(index, width)])
            count -= width
        if count:
            room = [(width - sum(n for _, n in row), i) for i, row in enumerate(rows)]
            fits = [(free, i) for free, i in room if free >= count]
            if fits:
                rows[min(fits)[1]].append((index, count))
            else:
                rows.append([(index, count)])
    return rows


@QUICK
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 16))
def test_packing_equals_its_naive_twin(kept, width):
    rows = pack_naive(kept, width)
    packed = packing.pack(np.array(kept, dtype=np.int64), width)
    assert packed.rows == len(rows)
    assert packed.pieces == sum(map(len, rows))
    places = [(index, at) for at, row in enumerate(rows) for index, _ in row]
    sizes = [n for row in rows for _, n in row]
    in_order = sorted(zip(places, sizes, strict=True), key=lambda piece: piece[0][0])
    by_query = np.repeat(np.arange(len(kept)), [-(-n // width) for n in kept])
    assert sorted(zip(by_query, packed.place, packed.sizes, strict=True)) == sorted(
        (index, at, n) for (index, at), n in in_order
    )
    held = np.zeros(len(kept), dtype=int)
    for row in rows:
        assert sum(n for _, n in row) <= width
        for index, n in row:
            held[index] += n
    assert held.tolist() == kept  # each entry once
    assert ceil(sum(kept) / width) <= packed.rows <= sum(ceil(n / width) for n in kept)


def masked(keep: np.ndarray, dim: int = 16, value_dim: int = 16, windows: int = 1) -> Attention:
    heads, queries, keys = keep.shape
    masks = tuple(polarize_head(head, 0.3) for head in keep)
    return Attention("attn", heads, queries, keys, dim, value_dim, windows, masks)


def random_mask(seed: int, heads: int, queries: int, keys: int, density: float) -> np.ndarray:
    return np.random.default_rng(seed).random((heads, queries, keys)) < density


def network(*calls: Attention) -> Workload:
    return Workload("made", (Gemm("qkv", 40, 32, 96), *calls))


@pytest.mark.parametrize("shape", [(2, 30, 30), (1, 17, 41)])
def test_rows_are_counted_in_the_original_order(shape):
    keep = random_mask(3, *shape, 0.3)
    for head in keep:
        assert np.array_equal(overlap.kept_by_row(polarize_head(head, 0.3)), head.sum(axis=1))


@QUICK
@given(
    st.integers(0, 9),
    st.sampled_from([(1, 1, 1), (2, 24, 24), (3, 65, 65), (1, 20, 80), (2, 200, 200)]),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    st.integers(1, 3),
)
@pytest.mark.parametrize("simulator", ["sanger", "spatten"])
def test_laws_hold_on_any_mask(simulator, seed, shape, density, batch):
    op = masked(random_mask(seed, *shape, density), dim=12, value_dim=20, windows=2)
    loaded = Schedule(on_chip="nothing")
    cost = simulate(network(op), VITCOD, simulator, batch, schedule=loaded).attention[0]
    assert_laws_of_time(cost)
    assert_laws_of_bytes(cost)
    if simulator == "sanger":
        assert_laws_of_sanger(cost, op, batch)


def assert_laws_of_time(cost):
    assert sum(cost.phases.values()) == cost.cycles
    assert min(cost.phases.values()) > 0
    assert all(0 <= busy <= cost.cycles for busy in cost.busy.values())
    assert cost.macs <= cost.cycles * VITCOD.macs
    assert cost.macs >= cost.kept_macs


def traffic_at(cost):
    return {(row.tensor, row.level): row for row in cost.traffic}


def assert_laws_of_bytes(cost):
    at = traffic_at(cost)
    moved = sum(row.total_bytes for row in cost.traffic if row.level == "dram")
    assert cost.cycles >= moved / VITCOD.dram_bytes_per_cycle
    for tensor in "QKV":
        assert at[tensor, "buffer"].written_bytes == at[tensor, "dram"].read_bytes


def assert_laws_of_sanger(cost, op, batch):
    assert cost.kept_macs == op.kept * batch * 32
    assert cost.macs - cost.kept_macs == op.entries * batch * 12 // 4
    queries = traffic_at(cost)["Q", "dram"].read_bytes
    assert queries == op.entries // op.keys * batch * 12
    assert cost.busy["MAC lines"] * VITCOD.macs >= cost.macs


def test_sanger_by_hand():
    keep = np.zeros((1, 8, 16), dtype=bool)
    for row, count in enumerate([16, 3, 5, 9, 0, 8, 7, 1]):
        keep[0, row, :count] = True
    # 16 = 8 + 8, 9 = 8 + 1, 8: four full rows; 3 + 5, 1 + 7, 1: three rows more.
    tiny = replace(VITCOD, lines=2)
    schedule = Schedule(dense_fill="per_tile", dense_dataflow="os")
    op = masked(keep, dim=16, value_dim=24)
    cost = simulate(network(op), tiny, "sanger", schedule=schedule).attention[0]
    assert cost.details["packed_rows"] == 7
    assert cost.details["packed_fill"] == pytest.approx(49 / 56)
    assert cost.phases["predict"] == array_cycles(8, 16, 4, tiny, schedule)
    assert cost.phases["sddmm"] == 4 * (16 + 2 + 8 - 2)
    assert cost.phases["spmm"] == 4 * (24 + 2 + 8 - 2)
    two = sanger.Sanger(mac_split="subword_parallel")
    slower = simulate(network(op), tiny, "sanger", schedule=schedule, parameters=two).attention[0]
    assert slower.phases["predict"] == array_cycles(8, 16, 8, tiny, schedule)
    # Nothing else changes, and at its best neither fill nor a tile has a skew of its own.
    assert {**slower.phases, "predict": 0} == {**cost.phases, "predict": 0}
    best = simulate(network(op), tiny, "sanger").attention[0]
    assert best.phases["sddmm"] == 4 * 16 + 2 + 8 - 2


@pytest.mark.parametrize("shape", [(197, 197, 64, 64), (45, 45, 16, 64), (20, 4096, 32, 8)])
@pytest.mark.parametrize("dataflow", ["best", "os"])
def test_attention_is_laid_out_as_well_as_any_two_layouts(shape, dataflow):
    """Against all pairs of layouts of the two products, softmax between them."""
    queries, keys, dim, value_dim = shape
    hardware, schedule = replace(VITCOD, lines=24), Schedule(dense_dataflow=dataflow)
    array = Array.of(hardware, schedule)

    def cycles(scores, values):
        beyond = overlap.softmax_beyond(queries, keys, 3, scores, values, hardware)
        return scores.cycles(3) + values.cycles(3) + beyond

    least = min(
        cycles(scores, values)
        for scores in layouts(queries, keys, dim, array)[:30]
        for values in layouts(queries, value_dim, keys, array)[:30]
    )
    sizes = overlap.Sizes(queries, keys, dim, value_dim, 3)
    pair = overlap.attention_pair(sizes, hardware, schedule)
    assert cycles(pair.scores, pair.values) <= 1.01 * least
    softmax = overlap.softmax_beyond(queries, keys, 3, pair.scores, pair.values, hardware)
    assert pair.beyond == softmax


def test_spatten_softmax_follows_scores_whatever_the_buffer_holds():
    op = masked(random_mask(0, 1, 512, 512, 0.2))
    roomy = replace(VITCOD, output_buffer_bytes=1 << 24)
    few, one = (simulate(network(op), h, "spatten").attention[0] for h in (VITCOD, roomy))
    assert one.cycles <= few.cycles
    assert few.busy["softmax"] == one.busy["softmax"]
    assert few.phases["softmax"] < few.busy["softmax"]


def test_sanger_pays_for_prediction_whatever_the_mask_keeps():
    costs = [
        simulate(network(masked(random_mask(0, 2, 64, 64, d))), VITCOD, "sanger").attention[0]
        for d in (0.02, 0.1, 0.5)
    ]
    assert len({cost.phases["predict"] for cost in costs}) == 1
    assert [c.cycles for c in costs] == sorted({c.cycles for c in costs})


def test_sanger_loads_k_and_v_again_for_tiles_that_do_not_fit():
    op = masked(random_mask(1, 1, 256, 256, 0.1), dim=64, value_dim=64)
    small = replace(VITCOD, k_buffer_bytes=1024, v_buffer_bytes=1024, q_buffer_bytes=64 * 64)
    cost = simulate(network(op), small, "sanger").attention[0]
    loads = {r.tensor: r.read_bytes for r in cost.traffic if r.level == "dram"}
    assert cost.details["queries_a_tile"] == 64
    one = sanger.Sanger(units_held=1, prediction_bits=8)
    tight = replace(small, output_buffer_bytes=cost.kept_macs // 128 * 3 // 4)
    costs = [simulate(network(op), tight, "sanger", parameters=p).attention[0] for p in (None, one)]
    tiles = [256 // cost.details["queries_a_tile"] for cost in costs]
    assert tiles[0] > tiles[1]
    size = 256 * 64
    assert traffic_at(costs[1])["K", "dram"].read_bytes == tiles[1] * size * 2
    assert (loads["Q"], loads["K"], loads["V"]) == (size, 4 * size * 3 // 2, 4 * size)
    with pytest.raises(ValueError, match=r"attn: one query needs 64 bytes, q_buffer_bytes is 8"):
        simulate(network(op), replace(VITCOD, q_buffer_bytes=8), "sanger")
    with pytest.raises(ValueError, match=r"output_buffer_bytes is 8"):
        simulate(network(op), replace(VITCOD, output_buffer_bytes=8), "spatten")


@QUICK
@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8))
def test_the_cascade_falls_and_keeps_as_much_as_the_masks(densities):
    calls = tuple(masked(random_mask(i, 1, 20 + 3 * i, 20, d)) for i, d in enumerate(densities))
    shares = cascade.cascade(calls)
    assert all(a >= b for a, b in pairwise(shares))
    kept = sum(share * op.entries for share, op in zip(shares, calls, strict=True))
    assert kept == pytest.approx(sum(op.kept for op in calls))
    own = [op.kept / op.entries for op in calls]
    if own == sorted(own, reverse=True):
        assert shares == pytest.approx(own)


def test_spatten_density_is_near_the_masks_and_only_pruning_layers_predict():
    calls = [masked(random_mask(i, 2, 197, 197, d)) for i, d in enumerate((0.3, 0.1, 0.12))]
    costs = simulate(network(*calls), VITCOD, "spatten").attention
    mean = sum(c.details["density"] for c in costs) / 3
    assert mean == pytest.approx(sum(op.kept / op.entries for op in calls) / 3, rel=0.02)
    tokens = [cost.details["keys_kept"] for cost in costs]
    assert tokens[0] > tokens[1] == tokens[2]
    assert costs[0].details["predicted_4bit_products"] == 2 * 197 * 197 * 16
    assert costs[1].details["predicted_4bit_products"] == 2 * tokens[0] ** 2 * 16
    assert "predict" not in costs[2].phases
    assert costs[2].busy["top-k"] == 0


def one_layer(op, hardware, entering, share, method):
    """One call of SpAtten, whose first tokens stay."""
    heads = max(round(op.heads * method.head_share), 1)
    before, now = (cascade.alive(op, part, heads) for part in (entering, share))
    layer = cascade.Pruning(before, now, np.arange(now.queries), np.arange(now.keys))
    return spatten.attention_cost(op, layer, hardware, 1, method)


def test_spatten_bytes_of_progressive_quantization():
    op = masked(random_mask(0, 2, 100, 100, 0.25))
    shares = {}
    for lsb in (0.0, 0.1, 1.0):
        method = spatten.Spatten(lsb_share=lsb)
        cost = one_layer(op, VITCOD, 0.25, 0.25, method)
        shares[lsb] = {r.tensor: r.read_bytes for r in cost.traffic if r.level == "dram"}
    half = 2 * 50 * 16 // 2  # 50 of 100 tokens, 16 dimensions, 4 bits
    assert shares[0.0] == {"Q": half, "K": half, "V": 4 * half // 2, "output": 0}
    assert (shares[0.1]["Q"], shares[0.1]["K"]) == (half * 11 // 10, 2 * half)
    assert shares[1.0]["Q"] == 2 * half


def test_spatten_loads_k_and_v_again_for_tiles_of_queries():
    op = masked(random_mask(0, 1, 100, 100, 0.25), dim=16)
    # A row of 100 scores takes 400 bytes twice, one of 50 takes 200: 5 and 10 rows a tile.
    small = replace(VITCOD, k_buffer_bytes=256, v_buffer_bytes=256, output_buffer_bytes=2000)
    cost = one_layer(op, small, 1.0, 0.25, spatten.Spatten(lsb_share=0.0))
    loads = {r.tensor: r.read_bytes for r in cost.traffic if r.level == "dram"}
    assert cost.details["keys_kept"] == 50
    assert loads["K"] == 100 * 8 * 20 + 50 * 8 * 5
    assert loads["V"] == 50 * 16 * 5
    assert loads["Q"] == 100 * 8  # they stay on chip between the two passes


def test_dense_attention_without_a_mask_runs_on_both():
    op = Attention("attn", 2, 32, 32, 16, 16)
    for simulator in ("sanger", "spatten"):
        cost = simulate(network(op), VITCOD, simulator).attention[0]
        assert cost.kept_macs >= op.entries * 16
    assert "predict" not in simulate(network(op), VITCOD, "spatten").attention[0].phases


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mac_split", "booth"),
        ("lsb_share", 1.5),
        ("head_share", 0),
        ("comparators", 0),
        ("topk_visits", 0),
    ],
)
def test_bad_methods_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .* got {value!r}"):
        spatten.Spatten(**{field: value})


def test_head_pruning_leaves_the_density():
    op = masked(random_mask(0, 4, 100, 100, 0.1))
    method = spatten.Spatten(head_share=0.5)
    cost = one_layer(op, VITCOD, 1.0, op.kept / op.entries, method)
    assert cost.details["heads_kept"] == 2
    assert cost.details["density"] == pytest.approx(op.kept / op.entries, rel=0.05)


def test_on_the_published_masks(golden):
    mask = AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy"))
    ops = tuple(Attention(f"attn{i}", 3, 197, 197, 64, 64) for i in range(12))
    workload = Workload("DeiT-Tiny", ops).with_attention(mask)
    dense = simulate(workload, VITCOD, "systolic")
    kept = mask.kept
    for name in ("sanger", "spatten"):
        report = simulate(workload, VITCOD, name)
        assert kept * 128 / 512 < report.cycles < dense.cycles
    rows = [pack_naive(head.sum(1).tolist(), 8) for layer in mask.keep for head in layer]
    report = simulate(workload, VITCOD, "sanger")
    assert sum(op.details["packed_rows"] for op in report.ops) == sum(map(len, rows))
    assert sum(op.kept_macs for op in report.ops) == kept * 128
    density = [op.details["density"] for op in simulate(workload, VITCOD, "spatten").ops]
    assert np.mean(density) == pytest.approx(1 - mask.sparsity, rel=0.02)
