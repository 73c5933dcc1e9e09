"""The operator's traffic against the figures of the DCNv4 paper."""

from __future__ import annotations

import pytest

from sievit.models.costs.accesses import no_cache, unlimited_cache
from sievit.models.costs.dcn_traffic import (
    DCNV4_CHANNELS,
    sampling_flops,
    sampling_traffic,
    thread_accesses,
)
from sievit.workload import Deform, Gemm, Workload

SIDE, CHANNELS, GROUPS = 56, 128, 8  # 16 channels a group
OP = Deform("dcn", CHANNELS, GROUPS, samples=9, in_size=(SIDE, SIDE), points=SIDE * SIDE)
HWC, HWG = SIDE * SIDE * CHANNELS, SIDE * SIDE * GROUPS


def test_published_counts():
    assert sampling_flops(OP) == 36 * HWC
    assert thread_accesses(OP) == 64 * HWC == no_cache(OP)
    assert unlimited_cache(OP) == 2 * HWC + 27 * HWG
    assert unlimited_cache(OP) / HWC == pytest.approx(3.69, abs=0.005)
    assert sampling_flops(OP) / thread_accesses(OP) == pytest.approx(0.56, abs=0.005)
    assert sampling_flops(OP) / unlimited_cache(OP) == pytest.approx(9.8, abs=0.05)


def test_sharing_a_reading_divides_offsets_and_weights_alone():
    values = 37 * HWC  # corners and the result
    shared = [thread_accesses(OP, channels) - values for channels in (1, 2, 4, 8, 16)]
    assert shared == [27 * HWC // channels for channels in (1, 2, 4, 8, 16)]
    assert shared[-1] == 27 * HWG
    saved = 1 - thread_accesses(OP, DCNV4_CHANNELS) / thread_accesses(OP)
    assert saved == pytest.approx(27 / 64 * 7 / 8)


def test_counts_by_walking_over_the_threads():
    op = Deform("dcn", channels=4, groups=2, samples=3, in_size=(2, 5), points=6)
    accesses = 0
    for _point in range(6):
        for _group in range(2):
            for _thread in range(1):
                accesses += 3 * 3  # offsets and weights
                for _channel in range(2):
                    accesses += 3 * 4 + 1
    assert thread_accesses(op, 2) == accesses


def test_uneven_sharing_is_named():
    with pytest.raises(ValueError, match="must divide the 16 channels of a group, got 3"):
        thread_accesses(OP, 3)


def test_every_operator_of_a_network_is_listed():
    odd = Deform("odd", channels=12, groups=4, samples=9, in_size=(2, 2), points=4)
    first, second = sampling_traffic(Workload("net", (OP, Gemm("fc", 1, 2, 3), odd)))
    assert (first.dcnv3, first.unlimited) == (64 * HWC, 2 * HWC + 27 * HWG)
    assert first.dcnv4 == 37 * HWC + 27 * HWC // 8
    assert first.saved == pytest.approx(27 / 64 * 7 / 8)
    assert first.intensities == pytest.approx((0.5625, 9.76), abs=0.01)
    assert (second.dcnv4, second.saved) == (None, None)
    assert second.to_dict()["name"] == "odd"
