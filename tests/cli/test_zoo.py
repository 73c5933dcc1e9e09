"""`sievit zoo`: what it lists, counts, measures and refuses."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sievit.cli import app
from sievit.models import complexity, create, names


def run(*arguments):
    return CliRunner().invoke(app, ["zoo", *map(str, arguments)])


def test_without_a_name_it_lists():
    done = run()
    assert done.exit_code == 0
    assert done.output.split() == names()


def test_costs_of_several_are_a_row_each_and_exact_in_json(tmp_path):
    out, picture = tmp_path / "costs.json", tmp_path / "costs.png"
    done = run("deit_tiny", "levit_128*", "--cache", "2MB", "--json", out, "--plot", picture)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    rows = [line.split() for line in done.stdout.splitlines() if "224" in line]
    assert [row[0] for row in rows] == ["deit_tiny", "levit_128", "levit_128s"]
    assert rows[0][2:6] == ["5.72", "1.25", "1.07", "4.12"]
    stored = json.loads(out.read_text())
    assert "torch" in stored["versions"]
    expected = complexity(create("levit_128"), 224, cache_bytes=2_000_000)
    model = stored["models"][1]
    assert model["total"]["macs"] == expected.macs == 405_321_728
    assert model["total"]["bytes_with_cache"] == expected.total.bytes_with_cache
    assert model["macs_without_attention"] == 364_390_400
    assert model["image_size"] == [224, 224]
    assert "layers" not in model
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_one_model_is_shown_to_the_unit_and_by_layer(tmp_path):
    done = run("efficientvit_m0")
    assert "79,193,600" in done.stdout
    assert "76,845,696 of 79,193,600 MACs are not inside attention." in done.stdout
    out, picture = tmp_path / "layers.json", tmp_path / "layers.png"
    done = run("levit_128s", "--layers", "--json", out, "--plot", picture, "--element-bytes", 1)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    (model,) = json.loads(out.read_text())["models"]
    expected = complexity(create("levit_128s"), 224, 1)
    assert [layer["name"] for layer in model["layers"]] == [x.name for x in expected.layers]
    assert model["layers"][0]["bytes_no_cache"] == 2 * 5_419_008 + 16 * 112 * 112
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_another_image_size_builds_what_is_built_for_one():
    done = run("efficientvit_m0", "--image-size", "384")
    expected = complexity(create("efficientvit_m0", image_size=384), 384)
    assert f"{expected.macs:,}" in done.stdout
    done = run("convnext_tiny", "--image-size", "192x256")
    assert "convnext_tiny at 192x256" in done.stdout


def test_the_profile_says_what_is_memory_bound(tmp_path):
    out = tmp_path / "profile.json"
    command = ("--profile", "flash_internimage_t", "--image-size", 64, "--batch", 1)
    done = run(*command, "--repeats", 1, "--threads", 1, "--json", out)
    assert done.exit_code == 0, done.output
    assert "batch 1, 1 thread" in done.stdout
    assert "Memory-bound (reshape, add, copy, normalisation)" in done.stdout
    assert "0.56 .. 9.8" in done.stdout
    assert "36.9%" in done.stdout
    stored = json.loads(out.read_text())
    kinds = stored["profile"]["kinds"]
    share = sum(kinds[kind]["share"] for kind in ("reshape", "add", "copy", "normalisation"))
    assert stored["profile"]["memory_bound_share"] == pytest.approx(share)
    assert sum(kind["share"] for kind in kinds.values()) == pytest.approx(1)
    assert "sievit::deform_conv" in stored["profile"]["operations"]  # as it runs, not the reference
    assert len(stored["sampling"]) == 30
    assert stored["cost"]["layers"][0]["name"] == "patch_embed.conv1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deit_tyni",), "no model is called 'deit_tyni'; near names: deit_tiny"),
        (("levit_128s", "--image-size", "192x256"), "square images, got 192 x 256"),
        (("deit_tiny", "--image-size", "225"), "multiples of the patch size 16, got 225 x 225"),
        (("deit_tiny", "--image-size", "big"), "as 224 or 192x256, got 'big'"),
        (("deit_tiny", "--cache", "1.5b"), "as 65536, 320kB or 2MB, got '1.5b'"),
        (("--profile", "deit_tiny", "levit_128"), "--profile takes one model"),
        (("--profile", "deit"), "no model is called 'deit'"),
        (("--json", "x.json"), "need models to count"),
    ],
)
def test_what_it_cannot_do_is_one_line(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 1
    assert message in " ".join(done.stderr.split())
    assert len(done.stderr.splitlines()) == 1
