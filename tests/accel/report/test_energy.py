"""Energy and area: hand-computed sums, the interpolation, and profiles from a file."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from sievit.accel import OpCost, Report, Traffic, presets, simulate
from sievit.accel.report import gates
from sievit.accel.report.energy import PROFILES, area, energy, load_profile
from sievit.accel.report.profiles import CACTI_HP, CACTI_LOP, EnergyProfile
from sievit.workload import Attention, Gemm, Unknown, Workload

VITCOD = presets["vitcod"]
ALADDIN = PROFILES["aladdin-28nm"]
ROWS = (
    Traffic("Q", "dram", 1000, 0),
    Traffic("output", "dram", 0, 500),
    Traffic("Q", "buffer", 3000, 1000),
    Traffic("output", "buffer", 500, 700),
    Traffic("Q", "lines", 6000, 0),
)


def report(*ops: OpCost, simulator: str = "by hand", **fields) -> Report:
    return Report(simulator, "two ops", VITCOD, 1, ops, **fields)


def attention(**fields) -> OpCost:
    made = OpCost("attn", "attention", 100, {"all": 100}, 10_000, 9_000, ROWS)
    return replace(made, **fields)


def table(size_kb: int, node: int):
    return next(r for r in CACTI_HP if (r.size_bytes, r.node_nm) == (size_kb * 1024, node))


def test_every_component_by_hand():
    spent = energy(report(attention()), ALADDIN).ops[0].components_pj
    small, large = [table(53, n) for n in (22, 32)], [table(108, n) for n in (22, 32)]

    def at_28(rows, name):
        first, second = (getattr(row, name) for row in rows)
        return first + 0.6 * (second - first)

    sram = 3000 * at_28(small, "read_pj") + 1000 * at_28(small, "write_pj")
    sram += 500 * at_28(large, "read_pj") + 700 * at_28(large, "write_pj")
    assert spent["MAC"] == pytest.approx(10_000 * 0.59)
    assert spent["DRAM"] == pytest.approx(1500 * 8 * 13.7)
    assert spent["SRAM"] == pytest.approx(sram / 8)
    assert spent["registers"] == pytest.approx(6000 * 0.043)
    leakage_mw = sum(
        ALADDIN.sram_leakage_mw(size * 1024) for size in (53, 53, 53, 20, 108, 33)
    )  # mW x s = 1e9 pJ
    assert spent["SRAM leakage"] == pytest.approx(leakage_mw * 100 / 500e6 * 1e9)


@pytest.mark.parametrize("row", CACTI_HP + CACTI_LOP)
def test_the_table_is_met_at_its_own_points(row):
    rows = CACTI_HP if row in CACTI_HP else CACTI_LOP
    profile = replace(ALADDIN, node_nm=row.node_nm, sram=rows)
    assert profile.sram_read_pj(row.size_bytes) * 8 == pytest.approx(row.read_pj)
    assert profile.sram_write_pj(row.size_bytes) * 8 == pytest.approx(row.write_pj)
    assert profile.sram_area_mm2(row.size_bytes) == pytest.approx(row.area_mm2)


def test_between_sizes_energy_goes_by_the_logarithm_and_area_by_size():
    profile = replace(ALADDIN, node_nm=45)
    middle = math.isqrt(2048 * 8192)
    assert profile.sram_read_pj(middle) * 8 == pytest.approx((2.67 + 6.05) / 2)
    assert profile.sram_area_mm2(5 * 1024) == pytest.approx((0.0084 + 0.029) / 2)
    assert profile.sram_read_pj(100) == profile.sram_read_pj(2048)
    sizes = [1024 * 2**i for i in range(14)]
    for value in (profile.sram_read_pj, profile.sram_area_mm2):
        found = [value(size) for size in sizes]
        assert found == sorted(found)


def test_the_two_mac_tables_differ_by_their_published_ratio():
    ratio = 1.15 / 0.3
    for node in ("28nm", "45nm"):
        a, h = PROFILES[f"aladdin-{node}"], PROFILES[f"horowitz-{node}"]
        assert a.mac_pj / h.mac_pj == pytest.approx(ratio)
        without = [energy(report(attention()), p).components_pj() for p in (a, h)]
        assert {k: v for k, v in without[0].items() if k != "MAC"} == {
            k: v for k, v in without[1].items() if k != "MAC"
        }


def test_every_profile_names_a_source_for_each_figure_and_carries_its_name():
    for name, profile in PROFILES.items():
        assert energy(report(attention()), profile).profile == name == profile.name
    with pytest.raises(ValueError, match="no source for mac_pj"):
        replace(ALADDIN, sources={k: v for k, v in ALADDIN.sources.items() if k != "mac_pj"})
    with pytest.raises(ValueError, match=r"node_nm is 7, the SRAM table has 22, 32, 45"):
        replace(ALADDIN, node_nm=7)


def test_what_is_left_out_is_listed():
    made = attention(traffic=(Traffic("V", "dram", 8, 0),), busy={"softmax": 10})
    listed = energy(report(made, unknown=("odd",), simulator="thin"), ALADDIN).not_charged
    text = "\n".join(listed)
    assert "softmax unit: the profile has no figure" in text
    assert "SRAM bytes of V in attention operations: simulator thin does not count them" in text
    assert "line register bytes of all operands" in text
    assert "odd: its MACs are not known" in text
    assert "vector unit" not in text
    bare = energy(report(attention(macs=0, kept_macs=0, traffic=())), ALADDIN)
    assert "MACs and all bytes of all tensors in attention operations" in bare.not_charged[0]
    lop = energy(report(attention()), PROFILES["horowitz-28nm-lop"])
    assert "SRAM leakage: the profile has no figure" in lop.not_charged
    assert "SRAM leakage" not in lop.components_pj()


def test_a_softmax_figure_is_charged_when_a_source_is_given():
    sources = dict(ALADDIN.sources) | {"softmax_pj": "measured on the test bench"}
    profile = replace(ALADDIN, softmax_pj=2.0, sources=sources)
    made = energy(report(attention(busy={"softmax": 10})), profile)
    assert made.components_pj()["softmax"] == 10 * VITCOD.softmax_lanes * 2.0
    assert not any("softmax" in line for line in made.not_charged)


def test_a_whole_network_sums_its_operations():
    ops = (
        Gemm("qkv", 16, 32, 96),
        Attention("attn", 2, 16, 16, 16, 16),
        Unknown("odd", "fft", 10, 10),
    )
    made = energy(simulate(Workload("small", ops), VITCOD, "systolic"), ALADDIN)
    assert made.total_pj(attention_only=False) == pytest.approx(sum(o.total_pj for o in made.ops))
    assert made.total_pj() == made.ops[1].total_pj
    assert 0 < made.total_pj() < made.total_pj(attention_only=False)
    assert made.ops[0].components_pj["MAC"] == pytest.approx(16 * 32 * 96 * 0.59)
    watts = made.ops[1].total_pj * 1e-12 / made.ops[1].seconds
    assert made.mean_milliwatts() == pytest.approx(1000 * watts)
    stored = json.loads(json.dumps(made.to_dict()))
    assert stored["profile"] == "aladdin-28nm"
    assert stored["network"]["total_pj"] == made.total_pj(attention_only=False)
    assert len(stored["ops"]) == 3


GATE_28NM_UM2 = 0.798 * 28 * 28 / 45 / 45
"""NAND2_X1 of the NanGate 45 nm library."""


def test_area_of_the_published_machine():
    made = area(VITCOD, ALADDIN)
    parts = made.parts_mm2
    assert parts["MAC lines"] == pytest.approx(512 * 369e-6)
    assert parts["encoder"] + parts["decoder"] == pytest.approx(320 * 369e-6)
    assert parts["q buffer"] == pytest.approx(0.047 + 0.6 * (0.099 - 0.047))
    # a line: two sets of 64 accumulators of 32 bits and of 64 keys of 8, and 1,060 bits more
    stored = 2 * 64 * (32 + 8)
    assert stored + 1060 == 6180  # flip-flops of a line, as Yosys counts them
    line = 8.0 * 6180 + 4.0 * stored
    assert parts["line registers"] == pytest.approx(64 * line * GATE_28NM_UM2 * 1e-6)
    # to each line a word of 64 bits of 32 + 32 banks, and one of 32; to each bank the address
    # of a line (53 KB in words of 8 bytes over 32 banks: 212) and 8 sums (108 KB: 108 words)
    reads = 64 * 64 * (63 + 31)
    taken = 3 * 32 * 63 * 8 + 32 * 63 * (7 + 8 * 32)
    assert parts["crossbars"] == pytest.approx(2.3 * (reads + taken) * GATE_28NM_UM2 * 1e-6)
    cells = 832 * 369e-6 + parts["line registers"] + parts["crossbars"]
    assert parts["wires"] == pytest.approx(cells * 3 / 7)
    assert made.total_mm2 == pytest.approx(sum(parts.values()))
    assert made.estimated == ("line registers", "crossbars", "wires")
    assert made.estimated_mm2 == pytest.approx(sum(parts[name] for name in made.estimated))
    assert json.loads(json.dumps(made.to_dict()))["not_charged"]


def test_area_in_words_says_what_is_estimated():
    made = area(VITCOD, ALADDIN)
    published, estimated = made.words.split("; ")
    assert f"{made.total_mm2:.2f} mm2: buffers 0.48, MAC lines 0.19" in published
    assert published.endswith("from published figures")
    assert estimated.startswith("line registers ")
    assert estimated.endswith("estimated")


def test_area_grows_with_what_is_built():
    made = area(VITCOD, ALADDIN)
    for name, part in {
        "lines": "line registers",
        "macs_per_line": "crossbars",
        "accumulator_bytes": "line registers",
        "q_banks": "crossbars",
        "k_banks": "crossbars",
        "v_banks": "crossbars",
        "output_banks": "crossbars",
        "v_buffer_bytes": "v buffer",
        "decoder_macs": "decoder",
    }.items():
        more = area(replace(VITCOD, **{name: 2 * getattr(VITCOD, name)}), ALADDIN)
        assert more.parts_mm2[part] > made.parts_mm2[part], name
        assert more.total_mm2 > made.total_mm2, name
    none = area(replace(VITCOD, encoder_macs=0, decoder_macs=0), ALADDIN)
    assert not {"encoder", "decoder"} & set(none.parts_mm2)


def test_the_preset_of_64_banks_has_a_wider_crossbar_and_nothing_else():
    narrow, wide = (area(presets[name], ALADDIN) for name in ("vitcod", "vitcod_64_banks"))
    changed = {name for name, size in wide.parts_mm2.items() if size != narrow.parts_mm2[name]}
    assert changed == {"crossbars", "wires"}
    assert wide.parts_mm2["crossbars"] == pytest.approx(2 * narrow.parts_mm2["crossbars"], rel=0.03)


@pytest.mark.skipif(shutil.which("yosys") is None, reason="Yosys is not installed")
def test_the_flip_flops_of_a_line_are_those_of_its_verilog(tmp_path):
    source = Path(gates.__file__).parents[1] / "vitcod" / "rtl" / "mac_line.v"
    steps = "proc; opt; memory -nomap; memory_map; opt; techmap; opt -fast"
    found = tmp_path / "cells.txt"
    script = f"chparam -set WORDS 8 mac_line; hierarchy -top mac_line; {steps}"
    command = f"read_verilog {source}; {script}; tee -o {found} stat"
    subprocess.run(["yosys", "-q", "-p", command], check=True, capture_output=True)
    cells = [line.split() for line in found.read_text().splitlines() if "DFF" in line]
    counted = sum(int(count) for _, count in cells)
    pipeline = gates.PIPELINE_BITS + 8 * gates.PIPELINE_BITS_A_MAC
    assert counted == pytest.approx(gates.stored_bits(VITCOD) + pipeline, rel=0.02)


OWN = """
name = "mine"
base = "aladdin-28nm"
mac_pj = 0.2
[sources]
mac_pj = "post-layout, our flow"
"""


def test_a_users_own_profile(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(OWN)
    mine = load_profile(path)
    assert (mine.name, mine.mac_pj, mine.register_pj_per_byte) == ("mine", 0.2, 0.043)
    assert mine.sources["mac_pj"] == "post-layout, our flow"
    path.write_text(
        'name = "alone"\nnode_nm = 16\nmac_pj = 0.1\ndram_pj_per_bit = 4\n'
        "[[sram]]\nsize_bytes = 4096\nread_pj = 0.5\nwrite_pj = 0.6\narea_mm2 = 0.001\n"
        '[sources]\nmac_pj = "a"\ndram_pj_per_bit = "b"\nsram = "c"\n'
    )
    alone = load_profile(path)
    assert alone.sram_read_pj(4096) == 0.5 / 8 == alone.sram_read_pj(1 << 20)
    assert (
        "line registers: the profile has no figure"
        in energy(report(attention()), alone).not_charged
    )
    left_out = area(VITCOD, alone).not_charged
    assert "MACs: the profile has no figure" in left_out
    assert "line registers, crossbars, wires: the profile has no figure" in left_out
    assert area(VITCOD, alone).estimated == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OWN.replace("0.2", "-1"), "mac_pj must be a positive number, got -1"),
        (OWN.replace("0.2", '"low"'), "mac_pj must be a positive number, got 'low'"),
        (OWN.replace("0.2", "nan"), "mac_pj must be a positive number, got nan"),
        (OWN.replace("0.2", "true"), "mac_pj must be a positive number, got True"),
        (OWN.replace("mac_pj = 0.2", "mac_pJ = 0.2"), "unknown mac_pJ"),
        (OWN.replace('"aladdin-28nm"', '"aladdin-7nm"'), "got 'aladdin-7nm'"),
        (OWN.replace('name = "mine"', ""), "name must differ from the base's"),
        (OWN.split("[sources]")[0], "no source for mac_pj"),
        (OWN.replace('mac_pj = "post', 'other = "post'), "no source for mac_pj"),
        (OWN + "[[sram]]\nsize_bytes = 0\nread_pj = 1\nwrite_pj = 1\narea_mm2 = 1\n", "size_bytes"),
        ("mac_pj = ", "Invalid value"),
        ('name = "bare"', "missing"),
    ],
)
def test_a_bad_profile_is_refused_with_its_value(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad.toml: not an energy profile") as caught:
        load_profile(path)
    assert message in str(caught.value)


def test_profiles_check_themselves():
    with pytest.raises(ValueError, match="name must be"):
        EnergyProfile("", 28, 1.0, 1.0, ALADDIN.sources)
