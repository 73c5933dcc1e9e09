"""The run-time study on small networks: what it times, fits, leaves out and draws."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from sievit.cli import app
from sievit.models.scaling import BASES, Counts, count, fit_line, scale
from sievit.studies.runtime import RuntimeStudy, TimedNetwork, plot_runtime, runtime_study

TINY = replace(BASES["efficientnet_b0"], depths=(1,) * 7, image_size=32)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(BASES, "efficientnet_b0", TINY)


def network(base: str, flops: float, seconds: float) -> TimedNetwork:
    counts = Counts(flops, 3 * flops + 1, flops**2)
    times = (seconds + 1, seconds, 2 * seconds)
    return TimedNetwork(base, "d", 1.0, 8, counts, times, -2 * seconds)


def test_lines_by_hand():
    networks = tuple(network("a" if i < 3 else "b", i + 1.0, 5 + 2 * (i + 1)) for i in range(5))
    study = RuntimeStudy(networks, 7, 1, 1, 1, "vitcod", "vitcod", 0)
    line = study.fits()["measured"]["flops"]
    assert (line.slope, line.intercept, line.r) == pytest.approx((2, 5, 1))
    assert study.fits()["simulated"]["params"].r == pytest.approx(-1)
    squares = [float(i * i) for i in range(1, 6)]
    assert study.fits()["measured"]["activations"] == fit_line(squares, [7, 9, 11, 13, 15])
    assert study.bases == ("a",)
    assert set(study.to_dict()["fits"]) == {"all", "a"}


def test_a_study_times_and_simulates_every_scaled_network(tiny):
    shares = []
    threads = torch.get_num_threads()
    study = runtime_study(
        ("efficientnet_b0",), ("d", "w", "wg"), (2,), repeats=2, threads=1, progress=shares.append
    )
    # an EfficientNet's groups stay: w and wg are one network
    assert len(study.networks) == study.planned == 3
    assert {n.kind for n in study.networks} == {"none", "d", "w"}
    for n in study.networks:
        config = TINY if n.kind == "none" else scale(TINY, n.kind, n.factor)
        assert n.counts == count(config)
        assert len(n.times) == study.rounds == 2
        assert 0 < n.seconds == min(n.times)
        assert n.simulated_seconds > 0
    assert shares[-1] == 1
    assert torch.get_num_threads() == threads


def test_what_is_left_out_is_said():
    with pytest.raises(ValueError, match="0 s were enough for 0 networks, 3 are needed"):
        runtime_study(("efficientnet_b0",), seconds=0)
    with pytest.raises(ValueError, match=r"can be scaled: efficientnet_b0, .*; got 'deit_tiny'"):
        runtime_study(("deit_tiny",))


def test_the_command_prints_every_r_and_writes_all(tiny, tmp_path):
    out, picture = tmp_path / "study.json", tmp_path / "study.png"
    arguments = ["zoo", "efficientnet_b0", "--runtime-study", "--repeats", "1", "--batch", "1"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(out), "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    stored = json.loads(out.read_text())
    assert f"{len(stored['networks'])} of {stored['planned']} networks" in done.stdout
    r = stored["fits"]["all"]["simulated"]["activations"]["r"]
    assert f"{r:.3f}" in done.stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_picture_is_drawn(tmp_path):
    networks = tuple(network("ab"[i % 2], i + 1.0, i + 2.0) for i in range(4))
    study = RuntimeStudy(networks, 4, 1, 1, 1, "vitcod", "vitcod", 0)
    plot_runtime(study, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 5000
