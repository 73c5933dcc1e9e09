"""The ladder from the released script to the machine: both ends, and what each rung changes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from sievit.accel import presets, simulate
from sievit.accel.explore.grid import Configuration, configured
from sievit.accel.schedule import Schedule
from sievit.studies import ladder
from sievit.studies.ladder import FAULTS, Script, climb
from sievit.workload import Attention, AttentionMask, HeadCodec, Workload, polarize_head

VITCOD = presets["vitcod"]


def network(keep: np.ndarray, codec: HeadCodec | None = None) -> Workload:
    """One attention call a layer of ``keep`` [layers, heads, tokens, tokens]."""
    ops = tuple(
        Attention(
            f"blocks.{index}",
            len(layer),
            *layer.shape[1:],
            64,
            64,
            masks=tuple(polarize_head(head) for head in layer),
            codec=codec,
        )
        for index, layer in enumerate(keep)
    )
    return Workload("made", ops)


@pytest.fixture(scope="module")
def published(golden) -> Workload:
    mask = AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy"))
    return network(np.stack(mask.keep), HeadCodec(3, 2))


@pytest.fixture(scope="module")
def small() -> Workload:
    keep = np.random.default_rng(0).random((2, 3, 80, 80)) < 0.1
    keep[..., :5] = keep[..., 0, :] = True
    return network(keep, HeadCodec(3, 2))


def without_codec(workload: Workload) -> Workload:
    return replace(workload, ops=tuple(replace(op, codec=None) for op in workload.ops))


def test_a_memory_of_banks_and_rows_has_a_rung_of_its_own(small):
    hardware = presets["vitcod_ddr4"]
    made = climb(small, hardware)
    last = [rung for rung in made.rungs if rung.model == "engine"][-1]
    assert last.changed == {"dram_model": "ddr4"}
    assert made.rungs[-1].cycles == simulate(small, hardware).attention_cycles
    assert not any("dram_model" in rung.changed for rung in climb(small).rungs)


@pytest.mark.parametrize(("codec", "first"), [(True, 9492), (False, 14_220)])
def test_from_the_published_figure_to_ours(published, codec, first):
    workload = published if codec else without_codec(published)
    made = climb(workload)
    assert made.rungs[0].cycles == first
    assert made.rungs[-1].cycles == simulate(workload).attention_cycles
    assert sum(made.differences) == made.rungs[-1].cycles
    assert len(made.differences) == len(made.rungs)


NONE = {"blocks." + str(index): 0 for index in range(12)}


@pytest.mark.parametrize(
    ("switches", "cycles"),
    [
        ((), 9492),
        (("first_head",), 10_458),
        (("square_array",), 42_455),
        (("first_head", "square_array"), 50_722),
        (("layers_overlap",), 11_247),
        (("whole_transfers",), 9437),  # computing then takes longer than loading
    ],
)
def test_faults_of_the_script_have_their_known_size(published, switches, cycles):
    """Found by changing the script itself, one fault at a time."""
    script = replace(Script(), **dict.fromkeys(switches, False))
    assert script.cycles(published, VITCOD, NONE) == cycles


def test_loads_of_the_script_have_their_known_size(published):
    exact = Script(whole_transfers=False)
    ops = published.attention
    gibi = sum(exact._loading(op, VITCOD, 0) for op in ops)
    deci = sum(replace(exact, gibibytes=False)._loading(op, VITCOD, 0) for op in ops)
    assert (round(gibi), round(deci)) == (6423, 6896)
    full = replace(exact, gibibytes=True)
    output = sum(op.heads * op.queries * op.value_dim for op in ops)
    assert output == 453_888
    more = sum(full._loading(op, VITCOD, output // 12) for op in ops)
    assert round(more - gibi) == 2752


def test_without_a_switch_the_formulas_are_the_released_ones():
    generator = np.random.default_rng(3)
    for tokens, heads, dense in ((70, 2, 4), (90, 6, 20), (64, 1, 2)):
        keep = generator.random((3, heads, tokens, tokens)) < 0.2
        keep[..., :dense] = True
        workload = network(keep, HeadCodec(heads, max(heads // 2, 1)))
        released = simulate(workload, VITCOD, "released").attention_cycles
        assert Script().cycles(workload, VITCOD, NONE) == released


def all_ideal() -> Configuration:
    own = ladder._published(Schedule())
    ideals = ladder._ideals(VITCOD, own.assignment)
    return configured(VITCOD, {k: v for _, part in ideals for k, v in part.items()}, own)


def test_each_rung_changes_what_it_names_and_nothing_else(small):
    made = climb(small)
    script, machine = Script(), None
    moved = ladder._bytes_beside(small, Configuration(VITCOD))
    for rung in made.rungs[1:]:
        if rung.model == "formulas":
            changed = replace(script, **rung.changed)
            before, after = asdict(script), asdict(changed)
            assert {k for k in before if before[k] != after[k]} == set(rung.changed)
            assert changed.cycles(small, VITCOD, moved) == rung.cycles
            script = changed
        elif not rung.changed:
            machine = all_ideal()
        else:
            machine = configured(machine.hardware, rung.changed, machine.schedule)
            target = Schedule() if rung.model == "schedule" else ladder._published(Schedule())
            given = {**vars(VITCOD), **vars(target)}
            assert all(given[name] == value for name, value in rung.changed.items())
        if machine is not None:
            hardware, schedule, _ = machine
            assert simulate(small, hardware, schedule=schedule).attention_cycles == rung.cycles
    assert machine == Configuration(VITCOD)
    assert set(asdict(script).values()) == {False}
    assert [rung.cause for rung in made.rungs[1:9]] == [cause for cause, _ in FAULTS]


def test_ideal_parts_are_ideal(small):
    """No line waits for a bank, an entry takes its one cycle, and the ends cost nothing."""
    hardware, schedule, _ = all_ideal()
    stalls = simulate(small, hardware, schedule=schedule).stalls()
    real = simulate(small, replace(VITCOD, index_entries_per_cycle=1)).stalls()
    costs = {"Q bank", "V bank", "last results", "new split of the lines"}
    assert costs <= set(real)
    assert not costs & set(stalls)
    assert stalls.get("index port", 0) < real["index port"]


def test_a_mask_that_the_script_cannot_run_is_refused():
    keep = np.random.default_rng(0).random((1, 2, 60, 60)) < 0.1
    with pytest.raises(ValueError, match=r"divides by zero at blocks\.0: 0 global keys"):
        climb(network(keep))


def test_a_ladder_is_ready_for_json(small):
    stored = json.loads(json.dumps(climb(small).to_dict()))
    assert sum(rung["difference"] for rung in stored["rungs"]) == stored["rungs"][-1]["cycles"]
