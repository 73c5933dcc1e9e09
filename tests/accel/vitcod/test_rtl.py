"""The MAC lines in Verilog, run by Icarus: the same cycles, the same integers.

The Verilog (accel/vitcod/rtl) has the lines, the arbiters of all banks, IdxBuf, both key
registers, two sets of accumulators, the pipeline, the lists of rows and the decoder of resident
latents. It gets the schedule and the data, and runs all stages of a program (heads, windows,
tiles of queries and of keys) one after the other, each in the cycle in which the one before it
has ended. DRAM and softmax are made ideal for the comparison: the DRAM fills each buffer as fast
as its write ports allow, and when a row's probabilities are there is told to the Verilog. All of
that is a machine of the engine, not a second model of it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_laws import OLD
from verilog_bench import Case, simulate_rtl

import sievit.accel
from sievit.accel.hardware import Hardware
from sievit.accel.schedule import ASSIGNMENTS, UserMapping
from sievit.accel.vitcod.pattern import SDDMM, SPMM
from sievit.workload import AttentionMask, HeadCodec, polarize_head

pytestmark = pytest.mark.skipif(
    not (shutil.which("iverilog") and shutil.which("vvp")),
    reason="needs Icarus Verilog (iverilog, vvp)",
)

SOURCES = sorted((Path(sievit.accel.__file__).parent / "vitcod" / "rtl").glob("*.v"))

IDEAL = Hardware(
    name="ideal memory",
    dram_bytes_per_s=500_000_000 * 10**6,
    dram_latency_cycles=0,
    softmax_lanes=10**6,
    softmax_latency_cycles=0,
    reconfigure_cycles=0,
    pipeline_cycles=4,  # the Verilog's
    q_buffer_bytes=2**20,
    k_buffer_bytes=2**20,
    v_buffer_bytes=2**20,
    output_buffer_bytes=2**24,
)

FIXED = OLD
"""Buffers of the hardware's own sizes: nothing is ever waited for but what ports bring."""

MACHINES = {
    "4 lines": {"lines": 4, "q_banks": 4, "k_banks": 4, "v_banks": 4, "output_banks": 4},
    "one line": {"lines": 1, "q_banks": 1, "k_banks": 1, "v_banks": 1, "output_banks": 1},
    "many lines, few banks": {"lines": 9, "q_banks": 3, "k_banks": 2, "v_banks": 3,
                              "output_banks": 2, "index_entries_per_cycle": 2},
    "little IdxBuf": {"lines": 6, "q_banks": 8, "k_banks": 8, "v_banks": 8, "output_banks": 4,
                      "index_buffer_bytes": 150, "index_entries_per_cycle": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function: parameters of the test bench -> the program to run, made once each."""
    made = {}

    def compile_(**parameters):
        key = tuple(sorted(parameters.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("rtl") / "array.vvp"
            flags = [f"-Ptestbench.{name}={value}" for name, value in key]
            command = ["iverilog", "-g2012", "-s", "testbench", *flags, "-o", made[key], *SOURCES]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        return made[key]

    return compile_


COUNTED = {
    SDDMM: {"operand_reads": "query_reads", "operand_words": "query_words",
            "key_reads": "key_reads", "key_words": "key_words", "index_reads": "index_reads"},
    SPMM: {"operand_reads": "value_reads", "operand_words": "value_words",
           "index_reads": "index_reads", "drained": "drained_words"},
}  # fmt: skip
"""The Verilog's counts, and what the engine calls them."""


def compare(case, compiled, folder):
    """All products of a case in Verilog, against the engine and plain integers."""
    trace, totals = case.run.trace, Counter()
    made = simulate_rtl(case, compiled, folder)
    assert len(made) == len(case.stages)
    for number, (begin, scores, outputs, got) in enumerate(made):
        times = [begin, begin + got["cycles"]]
        assert times == trace.stage_times[number].tolist(), f"stage {number}"
        kind = int(case.stages[number][0]["kind"])
        if kind == SDDMM:
            assert sorted(scores) == sorted(case.wanted(number))
        else:
            wanted = case.wanted(number)
            padded = np.array(outputs, dtype=np.int64).reshape(len(wanted), -1)
            assert np.array_equal(padded[:, : case.op.value_dim], wanted)
        for name, counted in COUNTED[kind].items():
            totals[counted] += got[name]
    assert totals == {name: trace.count(name) for name in totals}
    if case.run.mapping.resident_latents:
        assert made[-1][3]["decoder_macs"] == trace.count("decoder_macs")


def random_mask(seed):
    """Up to 16 x 16, a quarter of them rectangular; global keys, full rows, empty rows."""
    rng = np.random.default_rng(seed)
    queries = int(rng.integers(1, 17))
    keys = queries if seed % 4 else int(rng.integers(1, 17))
    keep = rng.random((queries, keys)) < rng.choice([0.1, 0.3, 0.8])
    keep[rng.integers(queries)] |= rng.random(keys) < 0.9
    if seed % 3:
        keep[:, rng.integers(keys)] = True
    keep[0, 0] = True
    return polarize_head(keep, int(rng.choice([queries // 2, queries - 1, queries])))


HOW = {
    "two streams": (True, FIXED),
    "lists as written": (False, replace(FIXED, index_streams=1, index_encoding="relative")),
    "sorted lists": (True, replace(FIXED, index_streams=1, index_encoding="relative")),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("policy", ASSIGNMENTS)
@pytest.mark.parametrize("machine", MACHINES)
def test_small_random_masks(machine, policy, how, compiled, tmp_path):
    """3 masks, two windows, four products each."""
    number = list(MACHINES).index(machine) * 3 + ASSIGNMENTS.index(policy)
    sorted_lists, schedule = HOW[how]
    hardware = replace(IDEAL, **MACHINES[machine], sorted_lists=sorted_lists)
    schedule = replace(schedule, assignment=policy)
    for seed in range(3 * number, 3 * number + 3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        masks = [random_mask(seed)]
        compare(Case(masks, hardware, (8, 16, 12)[seed % 3], schedule, 2, seed), compiled, folder)


def tiled_masks(seed, heads, size, tile):
    """Heads that differ, with something kept in every tile."""
    rng = np.random.default_rng(seed)
    keep = rng.random((heads, size, size)) < rng.choice([0.2, 0.5])
    keep[:, ::tile, ::tile] = True
    keep[:, :, rng.integers(size)] = True
    return [polarize_head(head, size // 2) for head in keep]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("policy", ASSIGNMENTS)
@pytest.mark.parametrize("tiles", [(None, None), (6, None), (5, 7), (None, 6)])
def test_heads_and_tiles_in_one_program(tiles, policy, how, compiled, tmp_path):
    """Three heads; tiles of queries, of keys, of both; some chunks on chip from the beginning,
    and a softmax unit that is waited for."""
    seed = 3 * ASSIGNMENTS.index(policy) + list(HOW).index(how)
    sorted_lists, schedule = HOW[how]
    mapping = UserMapping(1, *tiles, whole_queries=bool(seed % 2), ahead=bool(seed % 4))
    schedule = replace(schedule, assignment=policy, mapping=mapping, on_chip="fitting")
    machine = MACHINES[list(MACHINES)[seed % len(MACHINES)]]
    hardware = replace(
        IDEAL, **machine, sorted_lists=sorted_lists, softmax_lanes=2, softmax_latency_cycles=9
    )
    hardware = replace(hardware, index_buffer_bytes=max(hardware.index_buffer_bytes, 400))
    masks = tiled_masks(seed, 3, 14, min(tile or 14 for tile in tiles))
    compare(Case(masks, hardware, 16, schedule, 1, seed, room=500), compiled, tmp_path)


@pytest.mark.parametrize("decoder_macs", [3, 16, 200])
@pytest.mark.parametrize("codec", [HeadCodec(4, 2), HeadCodec(4, 4, groups=2)])
@pytest.mark.parametrize("policy", ASSIGNMENTS)
def test_heads_are_decoded_from_resident_latents(policy, codec, decoder_macs, compiled, tmp_path):
    """Four heads, two windows; the room of two heads, and a decoder that lines wait for."""
    seed = ASSIGNMENTS.index(policy) + 3 * codec.groups + decoder_macs
    mapping = UserMapping(1, (7, None)[seed % 2], whole_queries=bool(seed % 3),
                          resident_latents=True)  # fmt: skip
    schedule = replace(FIXED, assignment=policy, mapping=mapping, on_chip="fitting")
    room = {"q_buffer_bytes": 2 * 14 * 16, "k_buffer_bytes": 2 * 14 * 16}
    hardware = replace(
        IDEAL, **MACHINES["4 lines"], **room, decoder_macs=decoder_macs, latent_banks=1 + seed % 4
    )
    masks = tiled_masks(seed, 4, 14, 7)
    room = (0, 10**6)[seed % 2]
    case = Case(masks, hardware, 16, schedule, 2, seed, room, codec)
    assert case.run.mapping.resident_latents
    compare(case, compiled, tmp_path)


@pytest.fixture(scope="module")
def deit_masks(golden):
    return AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy")).keep


BANKS = {"q_banks": 32, "k_banks": 32, "v_banks": 32, "output_banks": 32}


@pytest.mark.parametrize("policy", ASSIGNMENTS)
@pytest.mark.parametrize("how", HOW)
def test_crops_of_real_heads(how, policy, deit_masks, compiled, tmp_path):
    """The first 64 tokens of DeiT-Tiny heads on 16 lines, all three in one program: the full
    row and column are in."""
    sorted_lists, schedule = HOW[how]
    masks = [polarize_head(keep[:64, :64], 0.3) for keep in deit_masks[10]]
    hardware = replace(IDEAL, lines=16, **BANKS, sorted_lists=sorted_lists)
    schedule = replace(schedule, assignment=policy)
    compare(Case(masks, hardware, 64, schedule), compiled, tmp_path)


@pytest.mark.parametrize("how", HOW)
def test_whole_real_heads_on_the_published_array(how, deit_masks, compiled, tmp_path):
    """Two heads of 197 tokens, 64 dimensions, 64 lines."""
    sorted_lists, schedule = HOW[how]
    masks = [polarize_head(keep, 0.5) for keep in deit_masks[7][1:]]
    hardware = replace(IDEAL, lines=64, **BANKS, sorted_lists=sorted_lists)
    compare(Case(masks, hardware, 64, schedule), compiled, tmp_path)
