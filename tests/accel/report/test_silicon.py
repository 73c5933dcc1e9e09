"""MACs in words: the codec's beside the lines', and what the codec gains."""

from __future__ import annotations

from dataclasses import replace

from sievit.accel import OpCost, Report, Traffic, presets
from sievit.accel.report.silicon import (
    codec_note,
    codec_words,
    cut_words,
    equal_words,
    machines_words,
    macs_words,
)

VITCOD = presets["vitcod"]
PLAIN = replace(VITCOD, lines=104, encoder_macs=0, decoder_macs=0)


def report(cycles: int, size: int, decoded: int = 0, hardware=VITCOD) -> Report:
    rows = (Traffic("Q", "dram", size, 0),)
    op = OpCost("attn", "attention", cycles, {"all": cycles}, 100, 100, rows, codec_macs=decoded)
    return Report("vitcod", "one op", hardware, 1, (op,))


def test_the_codecs_macs_stand_beside_those_of_the_lines():
    assert macs_words(VITCOD) == "512 MACs + 320 of the codec"
    assert macs_words(VITCOD, codec=False) == "512 MACs"
    assert macs_words(PLAIN) == "832 MACs"
    assert cut_words(VITCOD) == (
        "512 MACs + 320 of the codec (64 x 8 in lines, encoder 64, decoder 256)"
    )
    assert cut_words(PLAIN) == "832 MACs (104 x 8 in lines)"


def test_machines_of_the_same_silicon_are_named_together():
    reports = {"a": report(9, 9), "b": report(9, 9, decoded=5), "c": report(9, 9)}
    assert machines_words(reports) == (
        "512 MACs (64 x 8 in lines): a, c. "
        "512 MACs + 320 of the codec (64 x 8 in lines, encoder 64, decoder 256): b."
    )
    assert equal_words(reports) == "512 MACs in lines"
    reports["d"] = report(9, 9, hardware=PLAIN)
    assert equal_words(reports) == "at most 832 MACs in all"


def test_no_gain_is_said_where_neither_cycles_nor_bytes_are_less():
    gains = "The codec gives no gain here: "
    assert codec_words(report(1000, 5000), report(1000, 5000)).startswith(gains)
    assert codec_words(report(1200, 4990), report(1000, 5000)).startswith(gains)
    assert codec_words(report(991, 6000), report(1000, 5000)).startswith(gains)
    less = codec_words(report(1100, 4000), report(1000, 5000))
    assert less == (
        "The codec changes cycles by +10.0% and bytes by -20.0%: 1,100 cycles of attention and "
        "4 kB of DRAM traffic with it, 1,000 and 5 kB without."
    )
    assert codec_words(report(900, 6000), report(1000, 5000)).startswith("The codec changes")


def test_the_note_needs_a_codec_at_work_and_the_machine_without_it():
    coded, plain = report(1000, 5000, decoded=7), report(1000, 5000)
    assert len(codec_note({"vitcod": coded, "vitcod_no_codec": plain})) == 1
    assert codec_note({"vitcod": plain, "vitcod_no_codec": plain}) == []
    assert codec_note({"vitcod": coded, "systolic": plain}) == []
