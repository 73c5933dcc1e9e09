"""What every entry of the registry must be: found, said in words, checked, run."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, fields, replace

import numpy as np
import pytest

from sievit.accel import Schedule, compare, presets, record, simulate
from sievit.accel.explore.grid import PARAMETERS
from sievit.accel.simulators.registry import SIMULATORS
from sievit.accel.simulators.sanger import Sanger
from sievit.accel.simulators.simulator import PARTS, Simulator, without_parts
from sievit.accel.simulators.spatten import Spatten
from sievit.accel.simulators.systolic import Systolic
from sievit.workload import Attention, HeadCodec, Workload, polarize_head

VITCOD = presets["vitcod"]


def workload(codec=HeadCodec(2, 1)):
    keep = np.random.default_rng(0).random((2, 70, 70)) < 0.3
    keep[:, :, 0] = True
    masks = tuple(polarize_head(head, 50) for head in keep)
    return Workload("w", (Attention("call", 2, 70, 70, 16, 16, masks=masks, codec=codec),))


@pytest.mark.parametrize("name", SIMULATORS)
def test_every_entry_runs_and_says_what_it_is(name):
    entry = SIMULATORS[name]
    assert entry.name == name
    assert entry.words
    assert set(entry.without) <= set(PARTS)
    report = simulate(workload(), simulator=name)
    assert report.simulator == name
    assert report.schedule == Schedule()
    assert report.cycles > 0
    same = simulate(workload(), simulator=name, parameters=replace(entry.parameters))
    assert same.ops == report.ops == entry(workload(), VITCOD).ops
    assert same.to_dict()["parameters"] == vars(entry.parameters)
    assert bool(report.attention[0].heads) == entry.stepped
    assert record(workload(), VITCOD, name).report == report
    for item in fields(entry.parameters):
        assert f"{name}.{item.name}" in PARAMETERS
        with pytest.raises(FrozenInstanceError):
            setattr(entry.parameters, item.name, 1)


@pytest.mark.parametrize("name", ["vitcod_plain", "vitcod_no_reorder"])
@pytest.mark.parametrize("threshold", [0.2, "all", "best"])
def test_no_threshold_makes_a_key_global_where_reordering_is_left_out(name, threshold):
    schedule = Schedule(global_threshold=threshold)
    made = simulate(workload(), VITCOD, name, schedule=schedule)
    assert {head.global_keys for head in made.attention[0].heads} == {0}
    assert made.global_thresholds == ("none",)
    assert made.schedule.global_threshold == "none"
    assert made.ops == simulate(workload(), VITCOD, name).ops
    assert record(workload(), VITCOD, name, schedule=schedule).report == made


@pytest.mark.parametrize("name", SIMULATORS)
def test_parameters_of_another_are_refused(name):
    other = Spatten() if name != "spatten" else Sanger()
    with pytest.raises(
        ValueError, match=f"parameters of '{name}' are a .* got {type(other).__name__}"
    ):
        simulate(workload(), simulator=name, parameters=other)


def test_parameters_are_reached():
    def cycles(simulator, parameters):
        return simulate(workload(), VITCOD, simulator, parameters=parameters)

    slow = cycles("sanger", Sanger(mask_bits_per_cycle=1)).attention[0]
    assert slow.busy["packing"] == 2 * 70 * 70
    four, eight = (cycles("sanger", Sanger(prediction_bits=bits)).attention[0] for bits in (4, 8))
    assert eight.phases["predict"] > four.phases["predict"]
    predicted = four.details["predicted_4bit_products"]
    assert eight.details["predicted_8bit_products"] == predicted
    assert eight.macs - eight.kept_macs == predicted == 4 * (four.macs - four.kept_macs)
    two = cycles("sanger", Sanger(mac_split="subword_parallel")).attention[0]
    assert predicted == 2 * (two.macs - two.kept_macs)
    assert eight.phases["predict"] > two.phases["predict"] > four.phases["predict"]
    method = Spatten(lsb_share=1.0)
    assert cycles("spatten", method).attention[0].details["queries_recomputed"] > 30
    assert cycles("systolic", Systolic("ws")).ops == simulate(workload(), VITCOD, "systolic_ws").ops
    one, other = compare(
        workload(), simulators=("spatten", "sanger"), parameters={"spatten": method}
    )
    assert (one.parameters, other.parameters) == (method, None)
    with pytest.raises(ValueError, match="parameters are of systolic, vitcod, got 'sanger'"):
        compare(workload(), parameters={"sanger": Sanger()})


@pytest.mark.parametrize("count", [0, True, 1.5])
@pytest.mark.parametrize("name", ["mask_bits_per_cycle", "units_held"])
def test_bad_counts_are_named(name, count):
    with pytest.raises(ValueError, match=f"{name} must be an integer in 1.* got {count}"):
        Sanger(**{name: count})


def test_bad_parameters_are_named():
    for bits in (0, True, 3, 16):
        with pytest.raises(ValueError, match=f"prediction_bits must be one of .* got {bits}"):
            Sanger(prediction_bits=bits)
    with pytest.raises(ValueError, match=r"mac_split must be one of bit_fusion, .* got 'booth'"):
        Sanger(mac_split="booth")
    with pytest.raises(ValueError, match="dataflow must be one of best, os, ws, is, got 'rs'"):
        Systolic("rs")


def test_parts_are_left_out():
    whole = workload()
    assert without_parts(whole, ()) is whole
    (op,) = without_parts(whole, ("codec", "reorder")).attention
    assert op.codec is None
    assert [mask.num_global for mask in op.masks] == [0, 0]
    assert all(
        np.array_equal(one.dense(), other.dense())
        for one, other in zip(op.masks, whole.attention[0].masks, strict=True)
    )
    assert without_parts(whole, ("masks",)).attention[0].masks is None


def test_a_bad_entry_is_refused_and_a_new_one_is_one_line(monkeypatch):
    @dataclass(frozen=True)
    class Own:
        share: float = 0.5

    def costs(work, hardware, schedule, batch, own):
        return SIMULATORS["systolic"].costs(work, hardware, schedule, batch, Systolic("is"))

    monkeypatch.setitem(SIMULATORS, "mine", Simulator("mine", costs, "mine", parameters=Own()))
    expected = simulate(workload(), simulator="systolic_is")
    assert simulate(workload(), simulator="mine", parameters=Own(0.1)).ops == expected.ops
    with pytest.raises(ValueError, match="without is of masks, codec, reorder, got 'heads'"):
        Simulator("mine", costs, "mine", without=("heads",))
    with pytest.raises(ValueError, match="parameters are a dataclass, got 3"):
        Simulator("mine", costs, "mine", parameters=3)
