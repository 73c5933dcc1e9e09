"""The published figures beside ours: every one there, its parts by hand, files and tables."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from statistics import fmean

import pytest
from rich.console import Console

from sievit.accel import presets, simulate
from sievit.accel.report.energy import PROFILES, area, energy
from sievit.accel.report.roofline import DEVICES, MEASURED, roofline, speedup
from sievit.cli.tables.paper import paper_tables, plot_factors
from sievit.studies.paper import OWN, PaperStudy, case_of_mask, cases_by_chance, compare_with_paper
from sievit.studies.paper_rows import Case, Row, Run, rows
from sievit.studies.published import HEADLINES, Published
from sievit.workload import AttentionMask

VITCOD = presets["vitcod"]


@pytest.fixture(scope="module")
def cases() -> tuple[Case, ...]:
    return cases_by_chance(("deit_tiny", "levit_128"), (0.8, 0.9))


@pytest.fixture(scope="module")
def study(cases) -> PaperStudy:
    return compare_with_paper(cases, measure=False)


def of(study: PaperStudy, key: str) -> list[Row]:
    return [row for row in study.rows if row.figure.key == key]


def test_every_published_figure_has_its_rows(study):
    assert list(dict.fromkeys(row.figure.key for row in study.rows)) == list(HEADLINES)
    for row in study.rows:
        assert row.figure is HEADLINES[row.figure.key]
        assert row.ours > 0
        assert row.basis in ("simulated", "modelled", "measured log", "profile")
        assert row.why.endswith(".")
        assert row.why.count(". ") == 0  # one sentence
        named = "batch" in row.against or "profile" in row.against
        assert named, row.against
    assert all("2 models, 90%" in row.over for row in of(study, "sanger_90"))
    assert all("80% 90%" in row.over for row in of(study, "sanger_mean"))


def test_masks_by_chance_have_the_sparsity_asked_for(cases):
    for case in cases:
        kept = sum(op.kept for op in case.workload.attention)
        entries = sum(op.entries for op in case.workload.attention)
        assert 1 - kept / entries == pytest.approx(case.sparsity, abs=1e-3)
    codecs = {op.codec and (op.codec.heads, op.codec.latent_heads)
              for op in cases[-1].workload.attention}  # fmt: skip
    assert codecs == {(4, 2), (8, 4), (12, 6), None}  # LeViT's subsampling has none


def test_factors_over_machines_by_hand(study, cases):
    top = [case.workload for case in cases if case.sparsity == 0.9]

    def cycles(workload, simulator):
        return simulate(workload, VITCOD, simulator).attention_cycles

    for key, slower in (
        ("sanger_90", "sanger"),
        ("spatten_90", "spatten"),
        ("pruning_90", "vitcod_dense"),
        ("reordering_90", "vitcod_no_reorder"),
    ):
        factor = fmean(cycles(work, slower) / cycles(work, "vitcod") for work in top)
        assert of(study, key)[0].ours == pytest.approx(factor)
        assert of(study, key)[0].released is None
    bare = fmean(cycles(work, "sanger") / cycles(work, "vitcod_no_codec") for work in top)
    assert of(study, "sanger_90")[1].ours == pytest.approx(bare)


def test_factors_over_processors_by_hand(study, cases):
    tiny, levit = (case.workload for case in cases if case.sparsity == 0.9)
    device = DEVICES["jetson-xavier-nx"]
    modelled, logged, copies = of(study, "edge_90")
    ours = [speedup(simulate(w, VITCOD), roofline(w, device)).factor for w in (tiny, levit)]
    assert modelled.ours == pytest.approx(fmean(ours))
    script = speedup(simulate(tiny, VITCOD, "released"), roofline(tiny, device)).factor
    assert modelled.released == pytest.approx(script)  # it refuses LeViT
    assert logged.ours == pytest.approx(
        speedup(simulate(tiny, VITCOD), MEASURED["jetson-tx2"]).factor
    )
    assert logged.over == "deit_tiny, 90%"
    assert copies.against.startswith("jetson-xavier-nx, eager attention, fp32, batch 2 (modelled)")
    share = replace(VITCOD, dram_bytes_per_s=int(device.memory_bytes_per_s / 2))
    seconds = [simulate(w, share).attention_seconds / 2 for w in (tiny, levit)]
    theirs = [roofline(w, device, batch=2).attention_seconds / 2 for w in (tiny, levit)]
    assert copies.ours == pytest.approx(fmean(b / a for a, b in zip(seconds, theirs, strict=True)))
    network = of(study, "edge_network")
    assert network[1].ours == pytest.approx(
        MEASURED["jetson-tx2"].seconds_per_image / simulate(tiny, VITCOD).seconds
    )


def test_shares_of_data_movement_by_hand(study, cases):
    top = [simulate(c.workload, VITCOD, "vitcod_no_codec") for c in cases if c.sparsity == 0.9]
    waited = [
        sum(r.phases().get(name, 0) for name in ("load", "decode", "store")) / r.attention_cycles
        for r in top
    ]
    assert of(study, "movement_plain")[5].ours == pytest.approx(fmean(waited))
    plain, coded = of(study, "movement_plain")[0], of(study, "movement_codec")[0]
    assert 0 < coded.released < plain.released < 1
    blocks = [row for row in of(study, "movement_codec") if "small blocks" in row.against]
    assert len(blocks) == 3
    own = [simulate(c.workload, VITCOD, schedule=OWN) for c in cases if c.sparsity == 0.9]
    assert coded.ours == pytest.approx(
        fmean(sum(op.busy["DRAM"] for op in r.attention) / r.attention_cycles for r in own)
    )


LOP = PROFILES["horowitz-28nm-lop"]


def test_area_and_power_by_hand(study, cases):
    assert of(study, "area")[0].ours == pytest.approx(area(VITCOD).total_mm2)
    coded = [simulate(c.workload, VITCOD) for c in cases if c.sparsity == 0.9]
    milliwatts = []
    for report in coded:
        spent = energy(report, LOP)
        chip = spent.total_pj() - spent.components_pj()["DRAM"]
        milliwatts.append(chip * 1e-12 / report.attention_seconds * 1e3)
    assert of(study, "power")[1].ours == pytest.approx(fmean(milliwatts))


def test_energy_against_sanger_by_hand(study, cases):
    ratios = [
        energy(simulate(c.workload, VITCOD, "sanger"), LOP).total_pj()
        / energy(simulate(c.workload, VITCOD, own), LOP).total_pj()
        for own in ("vitcod", "vitcod_no_codec")
        for c in cases
        if c.sparsity == 0.9
    ]
    with_dram = [row.ours for row in of(study, "energy_sanger")][3:5]
    assert with_dram == pytest.approx([fmean(ratios[:2]), fmean(ratios[2:])])
    chip = of(study, "energy_sanger")[5]
    assert "DRAM left out" in chip.against
    assert chip.ours > with_dram[0]


def test_a_clock_here_is_named(cases):
    tiny = cases[1]
    reports = dict.fromkeys(
        ("vitcod", "vitcod_no_codec", "vitcod_no_reorder", "vitcod_dense", "sanger", "spatten"),
        simulate(tiny.workload, VITCOD),
    )
    here = replace(MEASURED["jetson-tx2"], origin="here", device="this one", batch=1)
    made = rows([Run(tiny, reports, reports, None, "refused")], VITCOD, {"deit_tiny": here})
    (row,) = (r for r in made if r.figure.key == "cpu_90" and r.basis == "measured here")
    assert "this one" in row.against
    assert row.ours == pytest.approx(speedup(reports["vitcod"], here).factor)
    assert row.released is None
    assert not any(r.figure.key.endswith("_mean") for r in made)  # one sparsity has no mean


def test_the_published_mask_starts_its_ladder_at_the_published_figure(golden):
    mask = AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy"))
    case = case_of_mask("deit_tiny", mask)
    study = compare_with_paper([case], masks="published", measure=False)
    assert study.ladder.rungs[0].cycles == 9492
    ours = simulate(case.workload, VITCOD).attention_cycles
    assert study.ladder.rungs[-1].cycles == ours == study.cases[0]["attention_cycles"]["vitcod"]
    assert study.cases[0]["attention_cycles"]["released"] == 9492
    assert study.cases[0]["network_cycles"]["released"] == 2_052_648
    assert of(study, "cpu_90")[0].over == "deit_tiny, 94.7%"
    assert not of(study, "cpu_mean")


def test_the_published_order_of_data_movement_and_its_shares_are_reproduced(golden):
    """By ViTCoD's own schedule on its released mask: a review has ViTCoD without codec move more
    than Sanger, and Sanger more than ViTCoD; the paper has data movement fall from 50 % of
    latency to 28 %."""
    mask = AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy"))
    study = compare_with_paper([case_of_mask("deit_tiny", mask)], measure=False)
    moved = study.movement[0]["dram_bytes"]
    assert moved["vitcod_no_codec"] > moved["sanger"] > moved["vitcod"]
    plain, coded = of(study, "movement_plain")[0], of(study, "movement_codec")[0]
    assert plain.ours == pytest.approx(plain.figure.value, abs=0.02)
    assert coded.ours == pytest.approx(coded.figure.value, abs=0.02)


def test_a_mask_that_the_script_refuses_has_no_ladder(cases):
    levit = cases[-1]
    study = compare_with_paper([levit], measure=False)
    assert study.ladder is None
    assert "the released script knows one window" in study.ladder_note
    assert study.cases[0]["released_refuses"]
    assert of(study, "cpu_90")[0].released is None
    assert "No ladder" in printed(study)


def printed(study: PaperStudy, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(paper_tables(study))
    return console.file.getvalue()


def test_files_and_tables_have_it_all(study, tmp_path):
    stored = json.loads(json.dumps(study.to_dict(), allow_nan=False))
    assert [row["key"] for row in stored["figures"]] == [row.figure.key for row in study.rows]
    assert stored["ladder"]["rungs"][-1]["cycles"] == study.ladder.rungs[-1].cycles
    assert {case["model"] for case in stored["cases"]} == {"deit_tiny", "levit_128"}
    text = printed(study)
    assert max(map(len, text.splitlines())) <= 80
    plain = " ".join(text.split())
    for figure in HEADLINES.values():
        assert figure.text in plain
    assert "235x" in plain
    assert "the released script" in plain
    plot_factors(study, tmp_path / "paper.png")
    assert (tmp_path / "paper.png").read_bytes().startswith(b"\x89PNG")


def test_facts_say_where_they_were_read():
    with pytest.raises(ValueError, match="read must be one of paper, notes, unconfirmed, got 'x'"):
        Published("key", "text", 1.0, "x", "x")
