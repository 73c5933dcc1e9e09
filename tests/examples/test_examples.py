"""The three examples run, on small input, and say what they are there to say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sievit.workload import AttentionMask

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mask_path(tmp_path) -> str:
    """A sparse mask for DeiT-Tiny: a few global keys and a little chance."""
    generator = np.random.default_rng(0)
    keep = generator.random((12, 3, 197, 197)) < 0.02
    keep[:, :, 0] = keep[:, :, :, :3] = True
    AttentionMask(tuple(keep)).save(tmp_path / "mask.npz")
    return str(tmp_path / "mask.npz")


def test_sparsify_a_pretrained_vit(tmp_path, monkeypatch, capsys):
    example = load("sparsify_a_pretrained_vit")
    from sievit.models import create

    def small(*_args, **_more):
        torch.manual_seed(0)
        return create("vit_tiny", image_size=32, patch_size=8, dim=32, depth=2, heads=4)

    monkeypatch.setattr(example, "create", small)
    generator = np.random.default_rng(0)
    for index in range(4):
        pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    with pytest.warns(UserWarning, match="cannot be reached"):  # 90 % of 17 tokens
        example.main(str(tmp_path), size=32)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 photos to learn from, 1 to judge on"
    assert [line[:3] for line in lines[1:]] == ["50%", "70%", "90%"]


def test_simulate_configurations(mask_path, capsys):
    load("simulate_configurations").main(mask_path)
    lines = capsys.readouterr().out.splitlines()
    cycles = {
        line.split(":")[0].strip(): int(line.split("attention")[1].split()[0].replace(",", ""))
        for line in lines[1:]
    }
    assert len(cycles) == 5
    assert cycles["half the lines"] > cycles["as published"]


def test_the_stand_in_mask_fits_its_model():
    example = load("simulate_configurations")
    from sievit.models import create, trace

    workload = trace(create("deit_tiny"))
    mask = example.local_mask(workload)
    assert mask.shapes == ((3, 197, 197),) * 12
    assert 0.8 < mask.sparsity < 0.95


def test_compare_data_movement(mask_path, capsys):
    load("compare_data_movement").main(mask_path)
    output = capsys.readouterr().out
    assert "codec 3 -> 2 heads" in output
    assert all(f"{tensor}:" in output for tensor in ("Q", "K", "V", "index", "output"))


def test_compare_processors(mask_path, monkeypatch, capsys):
    example = load("compare_processors")
    timed = example.timed_here
    monkeypatch.setattr(example, "timed_here", lambda *a, **more: timed(*a, **more, passes=1))
    example.main(mask_path)
    lines = capsys.readouterr().out.splitlines()
    assert "of attention pruned by the mask given" in lines[0]
    for basis, count in (("measured here", 8), ("measured log", 2), ("modelled", 24)):
        assert sum(line.endswith(f"({basis})") for line in lines) == count
    assert all("batch" in line for line in lines[5:])
