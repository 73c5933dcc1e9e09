"""The third argument: it checks itself, it takes effect everywhere, and old places still do."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from sievit.accel import (
    Hardware,
    Schedule,
    UserMapping,
    compare,
    explore,
    integer_attention,
    presets,
    quantize,
    record,
    simulate,
    simulate_attention,
)
from sievit.accel.encodings import ENCODINGS
from sievit.accel.explore.grid import configured, grid, load_configurations
from sievit.accel.hardware import POLICIES, schedule_of
from sievit.accel.schedule import LATENTS
from sievit.accel.vitcod.mapper import candidates, choose
from sievit.workload import Attention, Gemm, HeadCodec, Workload, polarize_head

VITCOD = presets["vitcod"]
OTHERS = {
    "assignment": "lockstep",
    "mappings_stepped": 3,
    "dense_dataflow": "ws",
    "dense_fill": "per_tile",
}


def call(heads=2, tokens=40, codec=None, seed=0):
    keep = np.random.default_rng(seed).random((heads, tokens, tokens)) < 0.3
    keep[:, :, 0] = True
    masks = tuple(polarize_head(head, tokens // 3) for head in keep)
    return Attention("call", heads, tokens, tokens, 16, 16, masks=masks, codec=codec)


WORK = Workload("work", (Gemm("qkv", 40, 32, 96), call()))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Schedule, "assignment", "best"),
        (Schedule, "mappings_stepped", 0),
        (Schedule, "dense_dataflow", "rs"),
        (Schedule, "dense_fill", "never"),
        (Schedule, "index_encoding", "runs"),
        (Schedule, "mapping", 3),
        (Schedule, "objective", "area"),
        (Schedule, "scratchpad", "split"),
        (Schedule, "on_chip", "all"),
        (Schedule, "latents", "never"),
        (Schedule, "index_streams", 3),
        (Schedule, "query_loads", "twice"),
        (Schedule, "key_loads", "some"),
        (Schedule, "index_loads", "never"),
        (Schedule, "sparser_percent", 0),
        (Schedule, "sparser_percent", "half"),
        (UserMapping, "resident_latents", 1),
        (UserMapping, "group", 0),
        (UserMapping, "query_tile", 0),
        (UserMapping, "key_tile", 1.5),
        (UserMapping, "whole_queries", 1),
        (UserMapping, "output_regions", 3),
    ],
)
def test_a_bad_value_is_named(kind, field, value):
    with pytest.raises(ValueError, match=rf"{field} must be .* got {value}|got '{value}'"):
        kind(**{field: value})


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_runs_sparse_and_dense_calls(name):
    for workload in (WORK, Workload("dense", (Attention("a", 2, 9, 9, 8, 8),))):
        made = simulate(workload, schedule=Schedule(index_encoding=name))
        assert made.attention_cycles > 0


# ---------------------------------------------------------------- policies of earlier versions


@pytest.mark.parametrize("field", OTHERS)
def test_hardware_takes_old_policies_with_a_warning(field):
    given = {field: OTHERS[field]}
    with pytest.warns(DeprecationWarning, match=f"{field} of Hardware belong to Schedule"):
        old = Hardware(**given)
    with pytest.warns(DeprecationWarning, match=field):
        assert replace(VITCOD, **given) == replace(old, name="vitcod")
    assert schedule_of(old, simulate.__kwdefaults__["schedule"]) == Schedule(**given)
    assert old != VITCOD
    assert pickle.loads(pickle.dumps(old)) == old
    assert schedule_of(replace(old, lines=3), Schedule(**given)) == Schedule(**given)
    new = simulate(WORK, VITCOD, schedule=Schedule(**given))
    held = simulate(WORK, old)
    assert held.schedule == new.schedule == Schedule(**given)
    assert held.ops == new.ops
    with pytest.raises(ValueError, match="give one of them"):
        simulate(WORK, old, schedule=Schedule(index_encoding="absolute"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_policies_take_effect_in_every_entry():
    old, schedule = replace(VITCOD, assignment="lockstep"), Schedule(assignment="lockstep")
    rng = np.random.default_rng(0)
    qkv = [quantize(rng.standard_normal((2, 40, 16))) for _ in range(3)]
    masks = WORK.attention[0].masks
    usual = simulate(WORK).attention_cycles
    lockstep = simulate(WORK, schedule=schedule).attention_cycles
    assert lockstep != usual
    assert record(WORK, old).report.attention_cycles == lockstep
    assert record(WORK, VITCOD, schedule=schedule).report.attention_cycles == lockstep
    assert compare(WORK, old)[1].attention_cycles == lockstep
    assert compare(WORK, schedule=schedule)[1].attention_cycles == lockstep
    costs = (
        simulate_attention(*qkv, masks, old, on_chip_bytes=10**5).cost,
        simulate_attention(*qkv, masks, schedule=schedule, on_chip_bytes=10**5).cost,
    )
    assert [cost.cycles for cost in costs] == [lockstep, lockstep]
    entries = [old, {"assignment": "lockstep"}, configured(VITCOD, {"assignment": "lockstep"})]
    found = explore({"w": WORK}, entries, jobs=1)
    assert [p.figures["attention_cycles"] for p in found.points] == [lockstep] * 3
    assert [dict(p.labels) for p in found.points] == [{"assignment": "lockstep"}] * 3
    for arguments in ({"base": old}, {"schedule": schedule}):
        (point,) = explore({"w": WORK}, [{}], jobs=1, **arguments).points
        assert point.figures["attention_cycles"] == lockstep
        assert (point.hardware, point.schedule) == (VITCOD, schedule)


def test_reports_say_both_and_old_readers_find_what_they_read():
    made = simulate(WORK, schedule=Schedule(dense_dataflow="ws")).to_dict()
    assert made["schedule"] == asdict(Schedule(dense_dataflow="ws"))
    assert {name: made["hardware"][name] for name in POLICIES} == {
        name: made["schedule"][name] for name in POLICIES
    }
    json.dumps(made)


def test_configurations_set_fields_of_all_three(tmp_path):
    path = tmp_path / "machines.toml"
    path.write_text(
        '[[configuration]]\nlines = 8\nassignment = "lockstep"\n"spatten.lsb_share" = 0.5\n'
        "[configuration.mapping]\nquery_tile = 7\n"
    )
    made = configured(VITCOD, *load_configurations(path))
    assert made.hardware == replace(VITCOD, lines=8)
    assert made.schedule == Schedule("lockstep", mapping=UserMapping(query_tile=7))
    assert made.parameters["spatten"].lsb_share == 0.5
    with pytest.raises(ValueError, match="no such field of mapping: tile"):
        configured(VITCOD, {"mapping": {"tile": 3}})
    shares = grid({"spatten.lsb_share": (0.0, 1.0)})
    loaded = Schedule(on_chip="nothing")
    found = explore({"w": WORK}, shares, simulator="spatten", schedule=loaded, jobs=1)
    few, many = (point.figures["attention_dram_bytes"] for point in found.points)
    assert few < many
    assert list(found.axes()) == ["spatten.lsb_share"]
    assert "vitcod is run" in explore({"w": WORK}, shares[:1], jobs=1).points[0].error


def test_results_are_reused_for_an_equal_schedule_alone(tmp_path):
    def reused(**arguments):
        found = explore({"w": WORK}, [{}], results=tmp_path / "r.jsonl", jobs=1, **arguments)
        return found.reused

    assert [reused(), reused()] == [0, 1]
    assert [reused(schedule=Schedule(dense_fill="per_tile")) for _ in range(2)] == [0, 1]
    mapped = Schedule(mapping=UserMapping(query_tile=9))
    assert [reused(schedule=mapped) for _ in range(2)] == [0, 1]


# ---------------------------------------------------------------- a mapping of one's own


def test_the_mappers_own_choice_given_by_hand_changes_nothing():
    op, names = call(4, codec=HeadCodec(4, 2)), [field.name for field in fields(UserMapping)]
    for latents in LATENTS:
        for made in candidates(op, VITCOD, Schedule(latents=latents), 1, 5000)[:4]:
            asked = UserMapping(**{name: getattr(made, name) for name in names})
            taken = choose(op, VITCOD, Schedule(mapping=asked), 1, 5000)
            assert all(getattr(taken, name) == getattr(made, name) for name in names)
            assert (taken.cut, taken.kept) == (made.cut, made.kept)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("lists", ["sorted", "as written", "none"])
@pytest.mark.parametrize("tiles", [(None, None), (13, None), (40, 11), (1, 40), (7, 3)])
def test_any_mapping_computes_the_same_attention(tiles, lists, ahead, whole):
    mapping = UserMapping(1, *tiles, whole_queries=whole, ahead=ahead, output_regions=1)
    rng = np.random.default_rng(1)
    q, k, v = (quantize(rng.standard_normal((2, 40, 16))) for _ in range(3))
    masks = call().masks
    hardware = replace(VITCOD, sorted_lists=lists == "sorted")
    schedule = Schedule(mapping=mapping, index_streams=2 if lists == "none" else 1)
    found = simulate_attention(q, k, v, masks, hardware, schedule=schedule)
    keep = np.stack([mask.dense() for mask in masks])
    plain = integer_attention(q, k, v, keep, score_shift=found.score_shift)
    assert np.array_equal(found.output.values, plain.values)
    assert found.cost.details["queries_a_tile"] == (tiles[0] or 40)
    assert found.cost.details["keys_a_tile"] == (tiles[1] or 40)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"group": 3}, "group must be one of 1, 2, 4, got 3"),
        ({"query_tile": 41}, "query_tile must be None or at most its 40 queries, got 41"),
        ({"key_tile": 41}, "key_tile must be None or at most its 40 keys, got 41"),
        ({"group": 2, "key_tile": 20}, "key_tile must be None or its 40 keys for a group of 2"),
        ({"group": 2, "query_tile": 9, "whole_queries": False}, "whole_queries must be True"),
        ({"group": 2, "resident_latents": True}, "group must be 1 where latents are resident"),
        ({"key_tile": 9, "resident_latents": True}, "key_tile must be None or its 40 keys where"),
    ],
)
def test_a_mapping_that_no_buffer_helps_is_refused(asked, message):
    op = call(4, codec=HeadCodec(4, 2))
    with pytest.raises(ValueError, match=re.escape(f"mapping of call: {message}")):
        choose(op, VITCOD, Schedule(mapping=UserMapping(**asked)))


def test_latents_can_only_stay_where_there_are_latents():
    with pytest.raises(ValueError, match="must be False for a call without codec, got True"):
        choose(call(), VITCOD, Schedule(mapping=UserMapping(resident_latents=True)))


def test_a_mapping_that_does_not_fit_is_refused_with_the_shortage():
    small = replace(VITCOD, q_buffer_bytes=320)  # 40 queries of 16 bytes want twice as many
    fixed = Schedule(scratchpad="fixed", mapping=UserMapping())
    with pytest.raises(ValueError, match="q_buffer_bytes is 320, it needs 640"):
        choose(call(), small, fixed)
    split = replace(fixed, mapping=UserMapping(query_tile=10, whole_queries=False))
    assert choose(call(), small, split).query_tile == 10
    assert choose(call(), small, replace(fixed, scratchpad="shared")).cut.q >= 640
    least = dict.fromkeys(("k_buffer_bytes", "v_buffer_bytes", "other_buffer_bytes"), 1)
    shared = replace(fixed, scratchpad="shared")
    names = "q_buffer_bytes + k_buffer_bytes + v_buffer_bytes + other_buffer_bytes"
    with pytest.raises(ValueError, match=re.escape(f"{names} is 1919, it needs 1920")):
        choose(call(), replace(VITCOD, q_buffer_bytes=1916, **least), shared)
