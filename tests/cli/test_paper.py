"""`sievit compare --paper`: what it prints, writes and refuses."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sievit.cli import app
from sievit.studies.published import HEADLINES

SMALL = ("--image-size", "64")


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "80"})


def test_over_the_users_mask(mask_file, tmp_path):
    out = tmp_path / "new" / "paper.json"
    done = run("compare", "deit_tiny", "--paper", "--mask", mask_file, *SMALL, "--json", out,
               "--plots", tmp_path / "plots", "--no-measure")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    for words in ("mask.npz", "attention over Sanger, 90 %", "235x", "No ladder.", "measured log"):
        assert words in done.output
    stored = json.loads(out.read_text())
    keys = {row["key"] for row in stored["figures"]}
    assert keys == {key for key in HEADLINES if not key.endswith("_mean")}
    assert stored["versions"]["numpy"]
    assert (tmp_path / "plots" / "paper.png").stat().st_size > 10_000


def test_published_masks_need_no_model(golden):
    path = golden("vitcod-deit-tiny-masks/info_0.95.npy")
    done = run("compare", "--paper", "--mask", path, "--no-measure")
    assert done.exit_code == 0, done.output
    assert "9,492" in done.output
    assert "deit_tiny, 94.7%" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deit_small", "--paper"), "--paper over deit_small needs --mask FILE"),
        (("--paper", "--hardware", "tpu"), "--hardware must be one of"),
    ],
)
def test_what_it_refuses_is_one_line(arguments, message):
    done = run("compare", *arguments)
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())


def test_a_mask_that_does_not_fit_is_refused(mask_file):
    done = run("compare", "deit_small", "--paper", "--mask", mask_file, *SMALL)
    assert done.exit_code == 1
    assert "layer 0 of" in done.output
