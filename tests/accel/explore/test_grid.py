"""Configurations as a grid and as files."""

from __future__ import annotations

import pytest
from explored import SMALL, tiny_workload

from sievit.accel.explore.grid import load_configurations
from sievit.accel.explore.sweep import explore


def test_lists_of_configurations(tmp_path):
    toml = tmp_path / "c.toml"
    toml.write_text(
        '[grid]\nlines = [4, 8]\n"q_banks+k_banks" = [2]\n'
        '[[configuration]]\nname = "x"\nlines = 0\n'
    )
    both = (
        {"lines": 4, "q_banks": 2, "k_banks": 2},
        {"lines": 8, "q_banks": 2, "k_banks": 2},
        {"name": "x", "lines": 0},
    )
    assert load_configurations(toml) == both
    found = explore({"a": tiny_workload()}, both, base=SMALL, jobs=1)
    assert [point.error is None for point in found.points] == [True, True, False]
    listed = tmp_path / "c.json"
    listed.write_text('[{"lines": 4}, {"lines": 8}]')
    assert load_configurations(listed) == ({"lines": 4}, {"lines": 8})
    for text in (
        "lines = 3",
        "[grid",
        "grid = 3",
        "configuration = [3]",
        "",
        "[grid]\nlinez = [1]",
    ):
        toml.write_text(text)
        with pytest.raises(ValueError, match=r"c\.toml: not a list of configurations"):
            load_configurations(toml)
