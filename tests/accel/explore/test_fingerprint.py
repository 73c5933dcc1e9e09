"""Fingerprints of what a result was computed from."""

from __future__ import annotations

import numpy as np
import pytest
from explored import tiny_workload

from sievit.accel import explore as explore_face
from sievit.accel.explore.fingerprint import code_fingerprint, fingerprint
from sievit.accel.explore.sweep import explore
from sievit.accel.report.profiles import PROFILES
from sievit.workload import Elementwise, HeadCodec


def test_digests():
    assert fingerprint(tiny_workload().ops) == fingerprint(tiny_workload("other name").ops)
    seen = {
        fingerprint(tiny_workload().ops),
        fingerprint(tiny_workload(kept=0.4).ops),
        fingerprint(tiny_workload(codec=HeadCodec(2, 1)).ops),
        fingerprint((*tiny_workload().ops, Elementwise("n", "add", 3, 3))),
        fingerprint(tiny_workload().ops[:3]),
        fingerprint(PROFILES["aladdin-28nm"]),
        fingerprint(PROFILES["horowitz-28nm"]),
    }
    assert len(seen) == 7
    assert fingerprint((np.int64(3), 2.0, None)) == fingerprint([3, 2.0, None])
    assert len(code_fingerprint()) == 32
    assert explore_face is explore
    with pytest.raises(TypeError, match="no digest of a object"):
        fingerprint(object())
