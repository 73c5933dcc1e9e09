"""The studies in examples/ run on small input, and what they share does what it says."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is the extra 'studies'")
STUDIES = Path(__file__).resolve().parents[2] / "examples" / "studies"


@pytest.fixture
def study(monkeypatch):
    """Import a script as it is run: with its folder on the path."""
    monkeypatch.syspath_prepend(str(STUDIES))

    def load(name: str):
        for loaded in (name, "judging", "rows"):
            sys.modules.pop(loaded, None)
        return importlib.import_module(name)

    return load


def test_rows_are_kept_as_they_come(study, tmp_path):
    rows = study("rows")
    out = rows.Rows(tmp_path / "found.json")
    out.add("first", {"x": 1})
    again = rows.Rows(tmp_path / "found.json")
    assert "first" in again
    assert "second" not in again
    assert json.loads((tmp_path / "found.json").read_text())["seed"] == 0


def test_paired_differences_by_hand(study):
    changed = np.array([True] * 60 + [False] * 40)
    dense = np.array([True] * 70 + [False] * 30)
    found = study("judging").paired(changed, dense)
    assert found["accuracy"] == pytest.approx(0.6)
    assert found["standard_error"] == pytest.approx((0.24 / 99) ** 0.5)
    assert found["difference"] == pytest.approx(-0.1)
    # ten of a hundred differ: standard error .03
    assert found["low"] == pytest.approx(-0.16, abs=0.011)
    assert found["high"] == pytest.approx(-0.05, abs=0.011)


def test_a_network_from_scratch_goes_through_the_recipe(study):
    script = study("from_scratch")
    found = script.run(seed=0, sparsity=0.9, steps=(3, 2, 2), batch=16)
    stages = [name for name in found if name != "sparsity"]
    assert stages[0] == "dense"
    assert stages[-1] == "codec and mask, tuned"
    assert {len(found[name]) for name in stages} == {599}
    assert 0.85 < found["sparsity"] < 0.91


def test_jittered_images_keep_their_digit(study):
    script = study("from_scratch")
    data = script.split(1)
    images, labels = next(script.jittered(data, 32, seed=0))
    assert images.shape == (32, 3, 32, 32)
    away = torch.cdist(images[:, 0].flatten(1), script.enlarged(data.learn)[:, 0].flatten(1))
    nearest = data.learn_labels[away.argmin(dim=1)]
    assert (nearest == labels).sum() >= 20  # turned and moved, most are still nearest to their like


def test_overlap_leaves_out_what_is_always_kept(study):
    from sievit.workload import AttentionMask

    one, other = np.zeros((2, 1, 5, 5), bool)
    for keep in (one, other):
        keep[:, 0] = keep[:, :, 0] = True
    one[0, 1, 2] = one[0, 3, 3] = other[0, 3, 3] = other[0, 4, 1] = True
    found = study("mask_stability").overlap(AttentionMask((one,)), AttentionMask((other,)))
    assert found == pytest.approx(1 / 3)
