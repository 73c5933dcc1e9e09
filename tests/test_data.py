"""The shipped data: small, licensed, and cut out of the whole data by the script beside it."""

from __future__ import annotations

import json
import runpy

import numpy as np
import pytest
from golden_data import SHIPPED, WHOLE, cases, locate

from sievit.workload import AttentionMask


def test_it_is_small():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*")) < 1.1e6


def test_every_file_is_described_and_the_licence_is_beside_the_masks():
    text = (SHIPPED / "README.md").read_text()
    for file in SHIPPED.rglob("*.np[yz]"):
        assert file.stem in text
    folder = SHIPPED / "vitcod-deit-tiny-masks"
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert "GATECH-EIC/ViTCoD" in (folder / "NOTICE.txt").read_text()


def test_a_published_mask_is_read_whole_or_packed(golden):
    pruned = np.load(golden("vitcod-deit-tiny-masks/info_0.95.npy"))
    packed = AttentionMask.load(SHIPPED / "vitcod-deit-tiny-masks" / "info_0.95.npz")
    assert np.array_equal(~pruned, np.stack(packed.keep))


def test_cases_of_a_file_that_is_nowhere():
    assert locate("golden/none.npz") is None
    with pytest.raises(FileNotFoundError, match=r"golden/none\.npz"):
        cases("golden/none.npz")


@pytest.mark.skipif(not WHOLE.exists(), reason="a comparison with the whole data, not shipped")
def test_the_script_makes_the_shipped_data_again(tmp_path):
    runpy.run_path(str(SHIPPED / "make_data.py"))["make"](WHOLE, tmp_path)
    for file in (file for file in tmp_path.rglob("*") if file.is_file()):
        shipped = SHIPPED / file.relative_to(tmp_path)
        if file.suffix == ".npz":
            assert_equal_arrays(file, shipped)
        else:
            assert file.read_bytes() == shipped.read_bytes()


def assert_equal_arrays(first, second):
    with np.load(first) as one, np.load(second) as other:
        assert one.files == other.files
        for name in one.files:
            if one[name].dtype == np.float64:  # a recorded map may differ by its last bits
                assert np.allclose(one[name], other[name], rtol=1e-9, atol=1e-12), name
            else:
                assert np.array_equal(one[name], other[name]), name


def test_json_is_a_part_of_the_whole():
    name = "golden/efficientvit_state_shapes.json"
    shipped = json.loads((SHIPPED / name).read_text())
    whole = json.loads(locate(name).read_text())
    assert shipped == {case: whole[case] for case in shipped}
