"""Traces of addresses for the tests of the DDR4 model: a stream, random lines, two halves."""

from __future__ import annotations

import numpy as np

from sievit.accel.dram.ddr4 import DRAM_TIMINGS

DDR4 = DRAM_TIMINGS["ddr4_2400"]
LINES = np.arange(40_000)
BANK_STRIDE = 8192 * 32  # the next row of the same bank, in either map

ROWS, GROUPS = "rows_interleaved", "groups_interleaved"
RANDOM = np.random.default_rng(0).integers(0, 2**27, 40_000) * 64  # over 8 GiB
HALVES = LINES // 2 * 64 + LINES % 2 * 20_000 * 64  # read the first half, write the second
