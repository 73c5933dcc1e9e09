"""Figures of the published mask (DeiT-Tiny, 94.7 %), pinned: the schedule of before and today's.

What they rest on: the twin (`test_engine`), the laws (`test_laws`), the RTL (`test_rtl`).
"""

from __future__ import annotations

import pytest
from engine_laws import OLD

from sievit.accel.cache import LruCache
from sievit.accel.hardware import presets
from sievit.accel.schedule import Schedule
from sievit.accel.vitcod import coded
from sievit.accel.vitcod.mapping import Mapping
from sievit.accel.vitcod.run import run_attention
from sievit.workload import Attention, AttentionMask, HeadCodec, polarize_head

PLAIN, CODED = None, HeadCodec(3, 2)


@pytest.fixture(scope="module")
def layers(golden):
    mask = AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy"))
    return [tuple(polarize_head(keep, 0.5) for keep in layer) for layer in mask.keep]


def figures(layers, machine, schedule, codec, room=0):
    """(cycles, DRAM bytes) of all layers."""
    cycles = moved = 0
    for masks in layers:
        op = Attention("layer", 3, 197, 197, 64, 64, masks=masks, codec=codec)
        run = run_attention(op, presets[machine], 1, schedule, room)
        cycles += run.cycles
        moved += int(run.program.transfers["bytes"].sum())
    return cycles, moved


@pytest.mark.parametrize(
    ("machine", "codec", "cycles", "moved"),
    [
        ("vitcod", PLAIN, 33_264, 1_961_561),
        ("vitcod", CODED, 35_548, 2_668_041),
        ("vitcod_ddr4", PLAIN, 34_055, 1_961_561),
        ("vitcod_ddr4", CODED, 36_494, 2_668_041),
    ],
)
def test_the_schedule_of_before(layers, machine, codec, cycles, moved, monkeypatch):
    """To the cycle, but for the address of each score beside its entry, which nobody loaded."""
    entries = sum(mask.sparser_kept for masks in layers for mask in masks)
    found = figures(layers, machine, OLD, codec)
    assert found[1] == moved + 2 * entries
    assert cycles <= found[0] < 1.02 * cycles
    monkeypatch.setattr(Mapping, "address_bytes", 0)
    monkeypatch.setattr(coded, "CODED", LruCache(2**20))
    assert figures(layers, machine, OLD, codec) == (cycles, moved)


@pytest.mark.parametrize(
    ("codec", "how", "room", "cycles", "moved"),
    [
        (PLAIN, {"on_chip": "nothing"}, 0, 32_633, 1_893_292),
        (CODED, {"on_chip": "nothing"}, 0, 35_545, 1_590_104),
        (PLAIN, {}, 100_000, 32_207, 765_316),
        (CODED, {}, 100_000, 32_588, 531_820),
        (CODED, {"latents": "fill"}, 100_000, 36_719, 1_136_149),
    ],
)
def test_the_schedule_of_today(layers, codec, how, room, cycles, moved):
    """``room``: bytes that a projection may leave on chip."""
    assert figures(layers, "vitcod", Schedule(**how), codec, room) == (cycles, moved)
