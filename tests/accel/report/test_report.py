"""Machines side by side: speed-ups, and pictures that are written whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sievit.accel import compare, presets, record, simulate, speedups
from sievit.accel.trace import plots
from sievit.workload import Attention, Gemm, HeadCodec, Unknown, Workload, polarize_head

VITCOD = presets["vitcod"]
NAMES = ("systolic", "sanger", "spatten", "vitcod_no_codec", "vitcod")


def workload() -> Workload:
    generator = np.random.default_rng(5)
    masks = []
    for _ in range(2):
        keep = generator.random((32, 32)) < 0.15
        keep[0] = keep[:, 0] = True
        masks.append(polarize_head(keep, 16))
    call = Attention("attn", 2, 32, 32, 16, 16, masks=tuple(masks), codec=HeadCodec(2, 1))
    return Workload("small", (Gemm("qkv", 32, 32, 96), call, replace(call, name="again")))


@pytest.fixture(scope="module")
def reports():
    return dict(zip(NAMES, compare(workload(), simulators=NAMES), strict=True))


def test_speedups_name_both_sides_part_and_batch(reports):
    made = speedups(reports, "sanger")
    assert len(made) == 2 * len(NAMES)
    for row in made:
        name = row.subject.split(",")[0]
        attribute = "attention_cycles" if row.part == "attention" else "cycles"
        ratio = getattr(reports["sanger"], attribute) / getattr(reports[name], attribute)
        assert row.factor == pytest.approx(ratio)
        assert row.against == "sanger, batch 1 (simulated)"
    assert str(made[0]).endswith(
        "systolic, batch 1 (simulated) against sanger, batch 1 (simulated)"
    )
    with pytest.raises(ValueError, match=r"against must be one of systolic, .* got 'abacus'"):
        speedups(reports, "abacus")
    other = reports | {"vitcod": simulate(workload(), batch=2)}
    with pytest.raises(ValueError, match="vitcod runs small at batch 2, systolic runs small at"):
        speedups(other, "systolic")


def test_the_codecs_macs_are_not_the_lines(reports):
    coded, plain = (reports[name].attention[0] for name in ("vitcod", "vitcod_no_codec"))
    assert coded.codec_macs == 2 * HeadCodec(2, 1).macs(32, 16)
    assert coded.line_macs == plain.macs == plain.line_macs
    assert all(report.utilization() <= 1 for report in reports.values())
    encoded = reports["vitcod"].ops[0]
    assert encoded.codec_macs == coded.codec_macs
    assert encoded.line_macs == reports["vitcod_no_codec"].ops[0].macs


def test_codec_weights_are_counted_at_both_levels(reports):
    rows = reports["vitcod"].traffic(attention_only=False)
    moved = {row.level: row for row in rows if row.tensor == "codec weights"}
    assert moved["dram"].read_bytes == moved["buffer"].written_bytes == moved["buffer"].read_bytes


def pictures(reports, folder):
    timeline = record(workload(), VITCOD)
    return {
        "phases": lambda path: plots.plot_phases(reports, path),
        "traffic": lambda path: plots.plot_traffic(reports, path),
        "speedups": lambda path: plots.plot_speedups(reports, "sanger", path),
        "roofline": lambda path: plots.plot_roofline(reports, path),
        "utilization": lambda path: plots.plot_utilization(timeline, path),
        "network": lambda path: plots.plot_utilization(timeline, path, attention_only=False),
    }


def test_pictures_are_drawn_and_differ(reports, tmp_path):
    seen = set()
    for name, draw in pictures(reports, tmp_path).items():
        path = tmp_path / "new" / f"{name}.png"
        draw(path)
        with Image.open(path) as picture:
            assert picture.size[0] > 900
            pixels = np.asarray(picture.convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
        seen.add(pixels.tobytes())
    assert len(seen) == 6
    assert len(list((tmp_path / "new").iterdir())) == 6


def test_the_roofs_are_those_of_the_most_lines(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, _: drawn.append(figure))
    few = replace(VITCOD, lines=40, encoder_macs=32, decoder_macs=160)
    machines = {"vitcod": simulate(workload(), few), "systolic": simulate(workload(), VITCOD)}
    plots.plot_roofline(machines, tmp_path / "roofline.png")
    axes = drawn[0].axes[0]
    assert "under the roofs of the most lines (64)" in axes.get_title()
    assert any(text.get_text().startswith("256 billion MACs") for text in axes.texts)


def test_pictures_of_a_machine_without_known_work(tmp_path):
    """Unknown operations and closed forms have points or bars where figures are known."""
    odd = Workload("odd", (Unknown("fft", "fft", 100, 100), *workload().ops))
    made = {"systolic": simulate(odd, VITCOD, "systolic")}
    plots.plot_roofline(made, tmp_path / "roofline.png")
    plots.plot_speedups(made, "systolic", tmp_path / "speedups.png")
    timeline = record(odd, VITCOD, "systolic")
    plots.plot_utilization(timeline, tmp_path / "time.png", attention_only=False)
    assert len(list(tmp_path.iterdir())) == 3


def test_utilization_stays_under_the_peak():
    timeline = record(workload(), VITCOD)
    edges, seams, shares = plots._shares(timeline, attention_only=True)
    assert edges[-1] == timeline.report.attention_cycles == seams[-1]
    cycles = np.diff(edges)
    for track in ("denser lines", "sparser lines", "softmax"):
        assert shares[track].max() <= 1
        assert (shares[track] * cycles).sum() * timeline.peak(track)[0] == pytest.approx(
            timeline.work(track)
        )


def test_no_two_parts_of_a_picture_look_alike():
    names = ["sddmm", "MAC lines", "vector", "DRAM latency", "DRAM beyond vector", "pack", "x"]
    for colours in (plots.PHASE_COLOURS, plots.TENSOR_COLOURS):
        given = plots._with_others(colours, names)
        assert set(given) == set(colours) | set(names)
        assert len(set(given.values())) == len(given)
