"""Machines of equal MACs in all: the search against every cut, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sievit.accel import Hardware, OpCost, compare, presets, simulate
from sievit.accel.equal_macs import with_equal_macs
from sievit.accel.report.silicon import uses_codec
from sievit.accel.simulators.registry import SIMULATORS
from sievit.pipeline.networks import model_workload
from sievit.workload import (
    Attention,
    AttentionMask,
    Gemm,
    HeadCodec,
    Workload,
    polarize_head,
)

VITCOD = presets["vitcod"]
CODED = {"vitcod", "vitcod_no_reorder"}
TOTAL = 128


def network(codec: HeadCodec | None = HeadCodec(4, 2), seed: int = 0, n: int = 56) -> Workload:
    """A projection and attention over 4 heads of n tokens and 16 dimensions, 80 % pruned."""
    keep = np.random.default_rng(seed).random((4, n, n)) < 0.2
    keep[:, :, 0] = True
    masks = tuple(polarize_head(head, 0.5) for head in keep)
    call = Attention("attn", 4, n, n, 16, 16, masks=masks, codec=codec)
    return Workload("small", (Gemm("qkv", n, 64, 192), call, Gemm("proj", n, 64, 64)))


def cycles(workload: Workload, hardware: Hardware) -> int:
    """Of attention, and what products wait for the encoder."""
    made = simulate(workload, hardware)
    waits = 0
    for op in made.ops:
        others = [value for name, value in op.busy.items() if name != "encoder"]
        waits += max(op.busy.get("encoder", 0) - max(others), 0)
    return made.attention_cycles + waits


@pytest.mark.parametrize("seed", range(2))
def test_the_search_against_every_cut(seed):
    workload = network(seed=seed)
    every = {}
    for lines in range(1, (TOTAL - 2) // 8 + 1):
        rest = TOTAL - 8 * lines
        for encoder in range(1, min(rest, 12)):
            cut = replace(VITCOD, lines=lines, encoder_macs=encoder, decoder_macs=rest - encoder)
            every[cut] = cycles(workload, cut)
    found = with_equal_macs(workload, VITCOD, "vitcod", TOTAL)
    assert cycles(workload, found) <= 1.02 * min(every.values())
    assert min(every.values()) < 0.8 * max(every.values())  # where to cut matters


def test_no_machine_has_more_than_the_total_and_each_uses_what_it_can():
    workload = network()
    for name, entry in SIMULATORS.items():
        cut = with_equal_macs(workload, VITCOD, name, TOTAL)
        assert TOTAL - 8 < cut.total_macs <= TOTAL, name
        assert (cut.codec_macs > 0) == (name in CODED), name
        report = entry(workload, cut)
        assert uses_codec(report) == (name in CODED), name
        same = replace(
            cut, **{f: getattr(VITCOD, f) for f in ("lines", "encoder_macs", "decoder_macs")}
        )
        assert same == VITCOD, name


def test_a_machine_without_codec_is_not_changed_by_a_total_of_its_lines():
    workload = network()
    names = ("systolic", "sanger", "spatten", "vitcod_plain", "vitcod_no_codec")
    for one, other in zip(
        compare(workload, VITCOD, names),
        compare(workload, VITCOD, names, equal="macs"),
        strict=True,
    ):
        assert other.hardware == replace(VITCOD, encoder_macs=0, decoder_macs=0)
        assert (one.cycles, one.attention_cycles) == (other.cycles, other.attention_cycles)


def test_more_macs_than_those_of_the_lines_become_lines():
    (made,) = compare(network(n=208), VITCOD, ("systolic",), equal="macs", total_macs=832)
    assert (made.hardware.lines, made.hardware.macs_per_line) == (104, 8)
    assert made.hardware.total_macs == 832


def test_lines_that_only_slow_a_machine_down_are_not_forced_on_it(monkeypatch):
    spatten = SIMULATORS["spatten"]
    slower = replace(
        spatten,
        costs=lambda workload, hardware, *rest: (
            replace(
                op, cycles=op.cycles * hardware.lines, phases={"all": op.cycles * hardware.lines}
            )
            for op in spatten.costs(workload, hardware, *rest)
        ),
    )
    monkeypatch.setitem(SIMULATORS, "spatten", slower)
    cut = with_equal_macs(network(), VITCOD, "spatten", 832)
    assert cut.lines == VITCOD.lines


@pytest.mark.parametrize("best", [1, 2, 29, 37, 50, 63])
def test_the_search_goes_down_to_single_lines(monkeypatch, best):
    """A cost with one valley over the lines: its bottom is found, wherever it is."""

    def valley(workload, hardware, *_):
        cycles = 1000 + 100 * abs(hardware.lines - best)
        yield OpCost("attn", "attention", cycles, {"all": cycles}, 1, 1, codec_macs=1)

    monkeypatch.setitem(SIMULATORS, "vitcod", replace(SIMULATORS["vitcod"], costs=valley))
    assert with_equal_macs(network(), VITCOD, "vitcod", 512).lines == best


def test_the_search_is_the_same_every_time():
    cuts = {with_equal_macs(network(), VITCOD, "vitcod", TOTAL) for _ in range(2)}
    assert len(cuts) == 1


def test_the_encoder_of_the_cut_delays_no_product():
    workload = network()
    cut = with_equal_macs(workload, VITCOD, "vitcod", TOTAL)
    assert cycles(workload, cut) == simulate(workload, cut).attention_cycles
    assert cut.encoder_macs < VITCOD.encoder_macs


def test_the_published_mask_at_512_macs_in_all(golden):
    mask = AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy"))
    workload = model_workload("deit_tiny", mask, HeadCodec(3, 2), global_threshold=0.5)
    (made,) = compare(workload, VITCOD, ("vitcod",), equal="macs")
    assert made.hardware.total_macs == 512
    assert made.attention_cycles <= 45_000


def test_what_is_refused():
    workload = network()
    with pytest.raises(ValueError, match="total_macs must be an integer >= 10 for 'vitcod'"):
        with_equal_macs(workload, VITCOD, "vitcod", 9)
    with pytest.raises(ValueError, match=r"an integer >= 8 for 'systolic' .*, got 7"):
        with_equal_macs(workload, VITCOD, "systolic", 7)
    with pytest.raises(ValueError, match="got True"):
        with_equal_macs(workload, VITCOD, "systolic", True)
    with pytest.raises(ValueError, match="equal must be one of lines, macs, got 'area'"):
        compare(workload, VITCOD, equal="area")
    with pytest.raises(ValueError, match="total_macs goes with equal='macs', got 512"):
        compare(workload, VITCOD, total_macs=512)


@pytest.mark.parametrize("missing", ["encoder_macs", "decoder_macs"])
def test_a_machine_without_codec_macs_runs_no_codec(missing):
    hardware = replace(VITCOD, **{missing: 0})
    with pytest.raises(ValueError, match=f"'vitcod' has {missing} 0"):
        simulate(network(), hardware)
    plain = network(codec=None)
    assert simulate(plain, hardware).cycles == simulate(plain, VITCOD).cycles
