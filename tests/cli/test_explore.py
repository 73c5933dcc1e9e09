"""`sievit explore`: axes of model and machine, resumed, its files, one clear line for bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from sievit.accel import explore, grid, presets
from sievit.cli import app
from sievit.cli.tables.fronts import front_table, sensitivity_table
from sievit.models import create, trace
from sievit.studies.variants import masks_by_chance, variants
from sievit.workload import AttentionMask

SMALL = ["deit_tiny", "--image-size", "64", "--global-threshold", "10", "--jobs", "1"]


def run(*arguments):
    return CliRunner().invoke(app, ["explore", *map(str, arguments)], env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def dense():
    return trace(create("deit_tiny"), 64)


@pytest.fixture(scope="module")
def axes(tmp_path_factory):
    """(folder, arguments, output) of an exploration along axes of the model and of the machine."""
    folder = tmp_path_factory.mktemp("axes")
    arguments = [
        *SMALL,
        *("--sparsity", "0.5,0.75", "--latent-heads", "none,2,5", "--lines", "8,0,16"),
        *("--qkv-buffer", "0.5,53", "--bandwidth", "38.4", "--set", "v_banks=8,16"),
        *("--results", folder / "deep" / "r.jsonl", "--json", folder / "e.json"),
        *("--plots", folder / "plots"),
    ]
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return folder, arguments, done.output


def test_axes_of_model_and_machine_are_told_in_lines_of_80(axes):
    output = axes[2]
    assert max(map(len, output.splitlines())) <= 80
    assert "synthetic masks (seed 0)" in output
    assert "48 points: 32 simulated, 16 failed." in output
    assert "lines must be an integer in 1..65536, got 0" in " ".join(output.split())
    assert "latent_heads must be an integer in 1.." in " ".join(output.split())
    assert "each machine has 320 of the codec" in " ".join(output.split())


def test_axes_of_model_and_machine_are_written(axes, dense):
    folder = axes[0]
    names = sorted(p.name for p in (folder / "plots").iterdir())
    assert names == ["front.png", "sensitivity.png"]
    assert (folder / "deep" / "r.jsonl").read_bytes().count(b"\n") == 32
    data = json.loads((folder / "e.json").read_text())
    assert len(data["points"]) == 48
    assert len(data["refused"]) == 2
    assert set(data["sensitivity"]["seconds"]) == {
        "sparsity", "latent_heads", "lines", "q, k, v_buffer_bytes", "v_banks"
    }  # fmt: skip
    expected = _expected(dense)
    by_key = {(p.workload, json.dumps(dict(p.labels))): p.figures for p in expected.points}
    assert len(by_key) == 48
    for point in data["points"]:
        assert point["figures"] == by_key[point["workload"], json.dumps(point["labels"])]


def test_a_second_run_takes_what_is_written(axes):
    folder, arguments, _ = axes
    results = folder / "deep" / "r.jsonl"
    text = results.read_bytes()
    again = run(*arguments)
    assert "32 simulated (32 of them" in again.output
    assert results.read_bytes() == text


def _expected(dense):
    """The same exploration, without the command."""
    from dataclasses import replace

    masks = masks_by_chance(dense, (0.5, 0.75), 1)
    made = variants(
        replace(dense, name="deit_tiny"), masks, ((None, 1), (2, 1), (5, 1)), 10, axis="sparsity"
    )
    machines = grid(
        {
            "lines": (8, 0, 16),
            "q_buffer_bytes+k_buffer_bytes+v_buffer_bytes": (512, 53 * 1024),
            "dram_bytes_per_s": (38_400_000_000,),
            "v_banks": (8, 16),
        }
    )
    return explore(made.workloads, machines, jobs=1, labels=made.labels)


def test_masks_of_files_and_a_list_of_machines(tmp_path, dense):
    shapes = [(op.heads, op.queries, op.keys) for op in dense.attention]
    generator = np.random.default_rng(0)
    for name, kept in (("a", 0.3), ("b", 0.6)):
        layers = tuple(generator.random(shape) < kept for shape in shapes)
        AttentionMask(layers).save(tmp_path / f"{name}.npz")
    listed = tmp_path / "machines.toml"
    listed.write_text('[[configuration]]\nlines = 8\n[[configuration]]\nassignment = "best"\n')
    made = tmp_path / "e.json"
    masks = ["--mask", tmp_path / "a.npz", "--mask", tmp_path / "b.npz"]
    done = run(*SMALL, *masks, "--configurations", listed, "--results", tmp_path / "r.jsonl",
               "--json", made, "--attention")  # fmt: skip
    assert done.exit_code == 0, done.output
    data = json.loads(made.read_text())
    assert data["objectives"] == ["attention_seconds", "attention_energy_pj", "area_mm2"]
    labels = [(point["labels"], point["error"] is None) for point in data["points"]]
    codec = {"latent_heads": None, "groups": 1}
    assert labels == [
        ({"mask": mask, **codec, **changes}, fine)
        for mask in ("a.npz", "b.npz")
        for changes, fine in (({"lines": 8}, True), ({"assignment": "best"}, False))
    ]


def test_masks_learned_once_for_all_sparsities(tmp_path, monkeypatch):
    import sievit.pipeline.sparsifier

    averaged = []
    average = sievit.pipeline.sparsifier.average_attention
    monkeypatch.setattr(
        sievit.pipeline.sparsifier,
        "average_attention",
        lambda *a, **k: averaged.append(1) or average(*a, **k),
    )
    done = run(*SMALL, "--sparsity", "0.4,0.6", "--weights", "random", "--learn-crops", 2,
               "--results", tmp_path / "r.jsonl")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "learned from photos" in done.output
    assert len(averaged) == 1


def test_quiet_and_dense(tmp_path):
    done = run(*SMALL, "--results", tmp_path / "r.jsonl", "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    line = json.loads((tmp_path / "r.jsonl").read_text())
    assert line["hardware"]["lines"] == 64
    assert line["figures"]["attention_cycles"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lines", "8,x"], "--lines takes whole numbers, as 32,64, got '8,x'"),
        (["--sparsity", "0.5,1.0"], "--sparsity takes shares in [0, 1)"),
        (["--q-buffer", "0.0001"], "--q-buffer takes KB"),
        (["--bandwidth", "inf"], "--bandwidth takes GB/s"),
        (["--latent-heads", "some"], "--latent-heads takes 'none' and numbers"),
        (["--set", "lines"], "--set wants FIELD=V1,V2"),
        (["--set", "linez=3"], "no such field: linez; fields are name, clock_hz"),
        (["--set", "lines=3", "--lines", "4"], "--set lines is given twice"),
        (["--q-buffer", "4", "--qkv-buffer", "4"], "q_buffer_bytes would be set twice"),
        (["--simulator", "vitcot"], "vitcod"),
        (["--profile", "x"], "aladdin-28nm"),
        (["--hardware", "x"], "--hardware must be one of"),
        (["--mask", "m.npz", "--sparsity", "0.5"], "give either --mask or --sparsity"),
        (["--mask", "missing.npz"], "missing.npz"),
        (["--configurations", "missing.toml"], "missing.toml"),
        (["--lines", "0,-1"], "nothing could be simulated; the first reason: lines must be"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    done = run(*SMALL, *arguments, "--quiet", "--results", "r.jsonl")
    assert done.exit_code == 1
    (line,) = done.output.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_a_mask_that_does_not_fit(tmp_path):
    AttentionMask((np.ones((3, 5, 5), bool),) * 12).save(tmp_path / "m.npz")
    done = run(*SMALL, "--mask", tmp_path / "m.npz", "--results", tmp_path / "r.jsonl", "--quiet")
    assert done.exit_code == 1
    assert "layer 0 of deit_tiny is (heads, queries, keys) = (3, 17, 17)" in done.output


def test_a_results_file_of_something_else(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("precious\n")
    done = run(*SMALL, "--results", path, "--quiet")
    assert done.exit_code == 1
    assert "holds something else" in done.output
    assert path.read_text() == "precious\n"


def test_a_damaged_results_file_is_kept_and_said(tmp_path):
    path = tmp_path / "r.jsonl"
    run(*SMALL, "--lines", "4,8", "--results", path, "--quiet")
    damaged = path.read_bytes().replace(b'"cycles": ', b'"cycles": 9', 1)
    path.write_bytes(damaged)
    done = run(*SMALL, "--lines", "4,8", "--results", path, "--quiet")
    assert done.exit_code == 0
    assert "damaged (line 1)" in " ".join(done.output.split())
    assert (tmp_path / "r.jsonl.damaged-1").read_bytes() == damaged
    assert path.read_bytes().count(b"\n") == 2


def test_tables_of_many_axes_and_long_fronts(dense):
    machines = grid({"lines": tuple(range(1, 31)), "dense_dataflow": ("os", "ws")})
    found = explore({"w": dense}, machines, jobs=1, simulator="systolic", base=presets["vitcod"])
    objectives = ("seconds", "area_mm2")
    front = front_table(found, objectives)
    assert front.row_count == min(len(found.front(objectives)), 24)
    assert (front.caption is None) == (len(found.front(objectives)) <= 24)
    assert sensitivity_table(found, objectives).row_count == 32
