"""The command: the README's main line on a small input, and one clear line for bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from sievit.cli import app
from sievit.cli.settings import READ
from sievit.models import create
from sievit.pipeline.settings import Settings
from sievit.pipeline.train import TrainSettings
from sievit.sparsify import RULES
from sievit.workload import AttentionMask

SMALL = [
    *("--model", "deit_tiny", "--weights", "random", "--image-size", "64"),
    *("--learn-crops", "3"),
]
FAST = [*SMALL, "--batch-size", "2", "--judge-crops", "2", "--steps", "1", "--codec-steps", "1"]


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(4):
        pixels = generator.integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def test_the_main_command_on_a_small_input(photos, tmp_path):
    command = [sys.executable, "-m", "sievit.cli", "codesign", *FAST]
    command += ["--images", photos, "--out", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "learned mask + codec, recovered" in done.stdout
    assert "vitcod_no_codec" in done.stdout
    assert "averaging attention" in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["photos"]["judged_on"] == ["3.png"]


def test_quiet_prints_nothing(photos, tmp_path):
    done = run("codesign", *FAST, "--images", photos, "--out", tmp_path / "out", "--quiet",
               "--no-plots", "--no-codec", "--theta", "0.9")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.output.strip() == ""
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "attachments.safetensors",
        "model.safetensors",
        "report.json",
    ]


def test_masks_then_simulate(photos, tmp_path):
    mask, report = tmp_path / "mask.npz", tmp_path / "report.json"
    done = run("masks", mask, *SMALL, "--images", photos, "--sparsity", "0.5")
    assert done.exit_code == 0, done.output
    assert "pruned" in done.output
    assert AttentionMask.load(mask).sparsity == pytest.approx(0.5, abs=0.02)
    done = run("simulate", "--model", "deit_tiny", "--mask", mask, "--image-size", "64",
               "--latent-heads", "2", "--simulator", "vitcod", "--json", report)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(report.read_text())["vitcod"]["attention"]["cycles"] > 0


def test_masks_within_simulated_cycles(photos, tmp_path):
    mask, report = tmp_path / "mask.npz", tmp_path / "report.json"
    done = run("masks", mask, *SMALL, "--images", photos, "--cycles", "4000")
    assert done.exit_code == 0, done.output
    assert "simulated cycles of attention" in done.output
    done = run("simulate", "--model", "deit_tiny", "--mask", mask, "--image-size", "64",
               "--simulator", "vitcod_no_codec", "--json", report)  # fmt: skip
    assert done.exit_code == 0, done.output
    cycles = json.loads(report.read_text())["vitcod_no_codec"]["attention"]["cycles"]
    assert AttentionMask.load(mask).global_threshold == "all"
    assert 0.9 * 4000 <= cycles <= 4000
    done = run("masks", mask, *SMALL, "--images", photos, "--cycles", "4000", "--theta", "0.9")
    assert done.exit_code == 1
    wanted = "give one of --sparsity, --theta, --cycles, --tile-entries; got --theta 0.9 and"
    assert wanted in " ".join(done.output.split())
    done = run("masks", mask, *SMALL, "--images", photos, "--cycles", "10")
    assert done.exit_code == 1
    assert "always kept alone cost" in " ".join(done.output.split())


def test_masks_within_entries_of_tiles(photos, tmp_path):
    mask = tmp_path / "mask.npz"
    small = ("masks", mask, *SMALL, "--images", photos)
    done = run(*small, "--tile-entries", "17000", "--tile", "16")
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "of 19,584 entries in tiles of 16 queries" in said
    assert (
        0.9 * 17000
        <= int(re.search(r"([\d,]+) of [\d,]+ entries", said)[1].replace(",", ""))
        <= 17000
    )
    bad = {
        "tile must be one of 16, 32, 64, got 24": ("--tile-entries", "6000", "--tile", "24"),
        "goes with --sparsity or --theta": ("--tile-entries", "0", "--granularity", "32x1"),
        "is queries x keys, as 32x1, got '32'": ("--granularity", "32"),
    }
    for words, options in bad.items():
        done = run(*small, *options)
        assert done.exit_code == 1
        assert words in " ".join(done.output.split())


def test_masks_in_blocks(photos, tmp_path):
    mask = tmp_path / "mask.npz"
    done = run("masks", mask, *SMALL, "--images", photos, "--sparsity", "0.5",
               "--granularity", "4x1")  # fmt: skip
    assert done.exit_code == 0, done.output
    for layer in AttentionMask.load(mask).keep:
        free = layer[:, 1:, 1:]
        assert (free.reshape(len(free), -1, 4, free.shape[-1]).sum(2) % 4 == 0).all()


def test_the_grid_of_the_window_rule_need_not_be_square(photos, tmp_path):
    mask = tmp_path / "mask.npz"
    arguments = ["masks", mask, *SMALL, "--images", photos, "--rule", "window", "--sparsity", 0.5]
    assert run(*arguments).exit_code == 0
    square = AttentionMask.load(mask)
    assert run(*arguments, "--grid", "2x8").exit_code == 0
    wide = AttentionMask.load(mask)
    for one, other in zip(square.keep, wide.keep, strict=True):
        assert (one.sum(-1) == other.sum(-1)).all()
    assert wide.digest != square.digest


def test_codesign_within_a_budget_says_so_in_its_report(photos, tmp_path):
    done = run("codesign", *FAST, "--images", photos, "--out", tmp_path, "--no-plots", "--no-int8",
               "--no-codec", "--cycles", "4000")  # fmt: skip
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "report.json").read_text())["settings"]
    assert {settings["sparsity"], settings["theta"]} == {None}
    assert (settings["cycles"], settings["global_threshold"]) == (4000.0, "all")


PHOTOS = {"images", "limit", "normalization", "weights"}
MACHINE = {"model", "mask", "image_size", "global_threshold", "batch", "hardware", "profile",
           "fields", "json_out", "plots", "quiet", "help", "latent_heads", "simulator"}  # fmt: skip
WITHOUT_FIELD = {
    "codesign": PHOTOS | {"model", "judge_images", "hardware", "out", "plots", "quiet", "help"},
    "masks": PHOTOS | {"model", "hardware", "out", "quiet", "help"},
    "train": PHOTOS
    | {"model", "judge_images", "hardware", "out", "mask", "device", "quiet", "help"},
    "simulate": MACHINE | {"heads", "output", "trace"},
    "compare": MACHINE | {"against", "equal", "total_macs", "output", "trace", "paper", "measure"},
}
"""Options whose default is not that of a field of the settings: "auto" of --normalization asks
where the weights are from, and what a mask file says goes before any default."""


def options_of(command: str):
    made = typer.main.get_command(app).commands[command]
    return {option.name: option for option in made.get_params(typer.Context(made))}


@pytest.mark.parametrize("command", WITHOUT_FIELD)
def test_defaults_are_those_of_the_settings(command):
    settings = TrainSettings if command == "train" else Settings
    usual = {field.name: field.default for field in fields(settings)}
    options = options_of(command)
    checked = set(options) - WITHOUT_FIELD[command]
    assert "groups" in checked or command == "masks"
    assert checked <= set(usual)
    for name in checked:
        default = options[name].default
        if name in READ:
            default = READ[name](None if default is None else str(default))
        assert default == usual[name], name


@pytest.mark.parametrize("command", ["codesign", "masks", "train"])
def test_the_help_names_every_rule(command):
    said = options_of(command)["rule"].help
    assert all(name in said for name in RULES)
    assert "{" not in said


def test_help_over_the_commands_loads_no_torch():
    code = "import sys, sievit.cli as c\ntry: c.app(['--help'])\nexcept SystemExit: pass\n"
    command = [sys.executable, "-c", code + "print('torch' in sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_zoo_lists_names():
    assert "deit_tiny" in run("zoo", "deit*").output.split()
    assert run("zoo", "nothing*").exit_code == 1


def bad_inputs(folder: Path) -> dict[str, tuple[list, list[str]]]:
    """name -> (arguments, words of the error line)"""
    (folder / "empty").mkdir()
    (folder / "corrupt.safetensors").write_bytes(b"\x10\x00garbage")
    (folder / "corrupt.pth").write_bytes(b"garbage")
    (folder / "corrupt.onnx").write_bytes(b"garbage")
    (folder / "file").write_text("a file where a folder should be")
    torch.save(create("deit_small").state_dict(), folder / "small.pth")
    np.savez(folder / "nomask.npz", a=np.zeros(3))
    AttentionMask((np.ones((3, 9, 9), bool),) * 12).save(folder / "mask9.npz")
    run_it = ["codesign", "--model", "deit_tiny", "--out", folder / "out", "--weights"]
    ready = [*run_it, "random"]
    budget = ["masks", folder / "m.npz", "--cycles", "1000"]
    alone = ["masks", folder / "m.npz"]
    return {
        "rule and budget": ([*budget, "--rule", "ratio"], ["--rule ratio", "budget --cycles"]),
        "threshold and budget": (
            [*ready, "--cycles", "1000", "--global-threshold", "7"], ["cycles", "'all', got 7"]
        ),
        "grid and rule": ([*ready, "--grid", "4x4"], ["--grid 4x4", "--rule window"]),
        "grid": ([*ready, "--rule", "window", "--grid", "16"], ["rows x columns", "'16'"]),
        "tile": ([*alone, "--tile", "16"], ["--tile 16", "--tile-entries"]),
        "hardware of no cycles": ([*alone, "--hardware", "vitcod"], ["--hardware", "--cycles"]),
        "training's": (["train", "--theta", "0.9", "--cycles", "9"], ["--theta 0.9 and --cycles"]),
        "theta and mask": (
            ["train", "--mask", folder / "mask9.npz", "--theta", "0.8"], ["--mask or --theta"]
        ),
        "rule and mask": (
            ["train", "--mask", folder / "mask9.npz", "--rule", "ratio"],
            ["--mask or --rule", "ratio"],
        ),
        "missing weights": ([*run_it, folder / "none.pth"], ["none.pth"]),
        "corrupt safetensors": ([*run_it, folder / "corrupt.safetensors"], ["corrupt.safeten"]),
        "corrupt pth": ([*run_it, folder / "corrupt.pth"], ["corrupt.pth"]),
        "corrupt onnx": ([*run_it, folder / "corrupt.onnx"], ["corrupt.onnx"]),
        "another architecture": (
            [*run_it, folder / "small.pth"],
            ["does not fit deit_tiny", "cls_token", "[1, 1, 384]"],
        ),
        "no weights named": (["codesign", "--model", "deit_tiny"], ["--weights"]),
        "unknown model": (["codesign", "--model", "deit_tyni", "--weights", "random"],
                          ["deit_tyni", "deit_tiny"]),
        "timm absent or hub unreachable": ([*run_it, "timm:no_such_model"], ["timm"]),
        "empty folder": ([*ready, "--images", folder / "empty"], ["empty", "holds no file"]),
        "missing folder": ([*ready, "--images", folder / "gone"], ["gone", "does not exist"]),
        "sparsity": ([*ready, "--sparsity", "1.2"], ["1.2", "[0, 1)"]),
        "theta": ([*ready, "--theta", "0"], ["0.0", "(0, 1]"]),
        "both": (
            [*ready, "--theta", "0.5", "--sparsity", "0.5"], ["--sparsity 0.5 and --theta 0.5"]
        ),
        "min kept": ([*ready, "--min-kept", "many"], ["many"]),
        "hardware": ([*ready, "--hardware", "tpu"], ["tpu", "vitcod"]),
        "image size": ([*ready, "--image-size", "100"], ["100", "patch size 16"]),
        "out is a file": ([*ready[:-3], folder / "file", "--weights", "random"], ["file"]),
        "mask of another token count": (
            ["simulate", "--model", "deit_tiny", "--mask", folder / "mask9.npz"],
            ["(3, 197, 197)", "(3, 9, 9)"],
        ),
        "not a mask": (["simulate", "--mask", folder / "nomask.npz"], ["nomask.npz"]),
        "latent heads": (["simulate", "--model", "deit_tiny", "--latent-heads", "9"], ["9"]),
        "simulator": (["simulate", "--model", "deit_tiny", "--simulator", "abacus"], ["abacus"]),
    }  # fmt: skip


def test_bad_input_is_one_clear_line(tmp_path):
    for name, (arguments, words) in bad_inputs(tmp_path).items():
        done = run(*arguments)
        assert done.exit_code == 1, (name, done.output)
        lines = [line for line in done.output.splitlines() if not line.startswith("warning")]
        lines = [line for line in lines if " left " not in line and line.strip()]
        assert len(lines) == 1, (name, done.output)
        assert lines[0].startswith("error: "), (name, lines)
        assert all(word in lines[0] for word in words), (name, lines)
        assert not (tmp_path / "out" / "report.json").exists(), name
    assert not list((tmp_path / "out").glob("*")), "nothing half-written"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_permission(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    done = run("codesign", *FAST, "--out", locked / "out")
    assert done.exit_code == 1
    assert "locked" in done.output


def test_usage_errors_exit_with_two():
    assert run("codesign", "--no-such-option").exit_code == 2
