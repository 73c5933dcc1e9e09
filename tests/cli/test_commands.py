"""The command: the README's main line on a small input, and one clear line for bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sievit.cli import app
from sievit.models import create
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
               "--global-threshold", "all", "--simulator", "vitcod_no_codec",
               "--json", report)  # fmt: skip
    assert done.exit_code == 0, done.output
    cycles = json.loads(report.read_text())["vitcod_no_codec"]["attention"]["cycles"]
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
        "--tile must be one of 16, 32, 64, got 24": ("--tile-entries", "6000", "--tile", "24"),
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
    return {
        "rule and budget": ([*budget, "--rule", "ratio"], ["--rule ratio", "budget"]),
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
        "both": ([*ready, "--theta", "0.5", "--sparsity", "0.5"], ["sparsity=0.5, theta=0.5"]),
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
