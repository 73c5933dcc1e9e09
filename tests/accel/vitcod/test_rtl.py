"""The MAC lines in Verilog, run by Icarus: the same cycles, the same integers.

The Verilog (accel/vitcod/rtl) has the lines, the arbiters of all banks, IdxBuf, both key registers,
two sets of accumulators and the pipeline; it gets the schedule and the data. DRAM and softmax
are made ideal for the comparison: the DRAM fills each buffer as fast as its write ports
allow, and between the scores and the values of a call lie the scores of a second one, so
that no row waits for its probabilities. All of that is a machine of the engine, not a second
model of it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import sievit.accel
from sievit.accel.hardware import Hardware
from sievit.accel.schedule import ASSIGNMENTS, DEFAULT, Schedule
from sievit.accel.vitcod import engine
from sievit.accel.vitcod.mapper import choose
from sievit.accel.vitcod.program import SDDMM, SPMM, build
from sievit.accel.vitcod.registers import STALLS
from sievit.workload import Attention, AttentionMask, polarize_head

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


def write_hex(path, values, bits=64):
    mask = (1 << bits) - 1
    path.write_text("\n".join(f"{int(value) & mask:x}" for value in values) + "\n")


def packed(vectors, words):
    """int8 [tokens, dim] as 64-bit words, padded with zeros."""
    padded = np.zeros((len(vectors), words * 8), dtype=np.int8)
    padded[:, : vectors.shape[1]] = vectors
    return padded.view(np.uint64).ravel()


def write_schedule(folder, program, plan):
    """The plan's pieces and index stream, numbered from 0."""
    first, last = program.line_piece[plan, [0, -1]]
    entry, end = program.line_entry[plan, [0, -1]]
    pieces, entries = program.pieces[first:last], program.entries[entry:end]
    dense = pieces["round"] < 0
    columns = {
        "piece_vector": pieces["vector"],
        "piece_first": np.where(dense, pieces["first"], 0),
        "piece_length": pieces["length"],
        "piece_round": np.where(dense, 0, pieces["round"]),
        "piece_dense": dense,
        "line_piece": program.line_piece[plan] - first,
        "line_entry": program.line_entry[plan] - entry,
        "entry_place": entries["arrival"],
        "stream": entries["operand"][np.argsort(entries["arrival"])],
    }
    for name, values in columns.items():
        write_hex(folder / f"{name}.hex", values if len(values) else [0])
    return len(entries)


def simulate_rtl(program_file, folder, **plusargs):
    """(scores as (row, vector, value), outputs, counts) of one product in Verilog."""
    arguments = [f"+{name}={value}" for name, value in plusargs.items()]
    command = ["vvp", "-n", program_file, f"+folder={folder}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    scores, outputs, counts = [], [], {}
    for line in done.stdout.splitlines():
        name, *numbers = line.split()
        if name == "score":
            scores.append(tuple(map(int, numbers)))
        elif name == "output":
            outputs.append(int(numbers[1]))
        elif len(numbers) == 1 and numbers[0].isdigit():
            counts[name] = int(numbers[0])
    assert "cycles" in counts, done.stdout[-2000:] + done.stderr
    return scores, np.array(outputs, dtype=np.int64), counts


COUNTED = {
    SDDMM: {"operand_reads": "query_reads", "operand_words": "query_words",
            "key_reads": "key_reads", "key_words": "key_words", "index_reads": "index_reads"},
    SPMM: {"operand_reads": "value_reads", "operand_words": "value_words",
           "index_reads": "index_reads", "drained": "drained_words"},
}  # fmt: skip
"""The Verilog's counts, and what the engine calls them."""


@dataclass
class Case:
    """Two calls with one mask (so that scores of one lie before the values of the other)."""

    op: Attention
    hardware: Hardware
    schedule: Schedule
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    weights: np.ndarray  # [queries, keys], reordered; 0 where pruned

    @classmethod
    def of(cls, mask, hardware, dim, seed=0, schedule=DEFAULT):
        rng = np.random.default_rng(seed)
        tokens = (mask.queries, mask.keys, mask.keys)
        data = (rng.integers(-128, 128, (2 * n, dim)).astype(np.int8) for n in tokens)
        weights = rng.integers(0, 256, (mask.queries, mask.keys)) * mask.reordered()
        op = Attention("call", 1, mask.queries, mask.keys, dim, dim, windows=2, masks=(mask,))
        return cls(op, hardware, schedule, *data, weights)

    def computed(self):
        """bool [queries, keys]: the dense block and what is kept beside it."""
        entries = self.op.masks[0].reordered()
        entries[:, : self.op.masks[0].num_global] = True
        return entries

    def part(self, array, number):
        """The tokens of stage ``number``'s call."""
        half = len(array) // 2
        return array[half * (number % 2) : half * (number % 2 + 1)].astype(np.int64)


def compare(case, compiled, folder):
    """All four products of a case in Verilog, against the engine and plain integers."""
    mapping = choose(case.op, case.hardware, case.schedule)
    program, _ = build(mapping, 2)
    trace = engine.run(program, mapping)
    assert program.stages["kind"].tolist() == [SDDMM, SDDMM, SPMM, SPMM]
    assert trace.stage_stalls[:, STALLS.index("softmax")].sum() == 0
    totals = Counter()
    for number, stage in enumerate(program.stages):
        begin, end = trace.stage_times[number]
        scores, outputs, got = run_stage(case, mapping, program, number, begin, compiled, folder)
        assert got["cycles"] == end - begin, f"stage {number}"
        if stage["kind"] == SDDMM:
            wanted = case.part(case.q, number) @ case.part(case.k, number).T
            rows, keys = np.nonzero(case.computed())
            assert sorted(scores) == list(zip(rows, keys, wanted[rows, keys], strict=True))
        else:
            wanted = case.weights @ case.part(case.v, number)
            padded = outputs.reshape(len(wanted), -1)
            assert np.array_equal(padded[:, : case.op.value_dim], wanted)
        for name, counted in COUNTED[int(stage["kind"])].items():
            totals[counted] += got[name]
    assert totals == {name: trace.count(name) for name in totals}


def run_stage(case, mapping, program, number, begin, compiled, folder):
    """One stage of the program in Verilog."""
    op, hardware, stage = case.op, case.hardware, program.stages[number]
    scores, words = stage["kind"] == SDDMM, mapping.key_words
    folder = folder / str(number)
    folder.mkdir()
    entries = write_schedule(folder, program, int(stage["plan"]))
    write_hex(folder / "operand.hex", packed(case.q if scores else case.v, words))
    write_hex(folder / "key.hex", packed(case.k, words))
    tokens = 2 ** int(np.ceil(np.log2(2 * max(op.queries, op.keys))))
    table = np.zeros((op.queries, tokens), dtype=np.int64)
    table[:, : op.keys] = case.weights
    write_hex(folder / "weight.hex", table.ravel())
    # In IdxBuf beside the stream: where vectors begin, and the bitmaps of calls under way.
    bitmaps = (1, 2, 1, 0)[number] * mapping.bitmap_bytes(0, slice(0, op.queries))
    room = hardware.index_buffer_bytes - int(stage["index_frees"]) - bitmaps
    banks = hardware.q_banks if scores else hardware.v_banks
    program_file = compiled(
        LINES=hardware.lines,
        WORDS=words,
        OPERAND_BANKS=banks,
        KEY_BANKS=hardware.k_banks,
        OUTPUT_BANKS=hardware.output_banks,
        INDEX_PORTS=hardware.index_entries_per_cycle,
        PIECES=2048,
        ENTRIES=8192,
        TOKENS=tokens,
    )
    return simulate_rtl(
        program_file,
        folder,
        spmm=int(not scores),
        begin=begin,
        operands=2 * (op.queries if scores else op.keys),
        vectors=2 * op.keys,
        operand_base=stage["operand_token"],
        vector_base=stage["vector_token"],
        entries=entries,
        capacity=room // mapping.entry_bytes,
        operand_port=hardware.word_bytes * banks,
        key_port=hardware.word_bytes * hardware.k_banks,
        token_bytes=op.key_dim,
        outputs=0 if scores else op.queries * words * hardware.macs_per_line,
    )


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


@pytest.mark.parametrize("policy", ASSIGNMENTS)
@pytest.mark.parametrize("machine", MACHINES)
def test_small_random_masks(machine, policy, compiled, tmp_path):
    """5 masks, four products each."""
    number = list(MACHINES).index(machine) * 3 + ASSIGNMENTS.index(policy)
    hardware = replace(IDEAL, **MACHINES[machine])
    for seed in range(5 * number, 5 * number + 5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        dim, schedule = (8, 16, 12)[seed % 3], Schedule(assignment=policy)
        case = Case.of(random_mask(seed), hardware, dim, seed, schedule)
        compare(case, compiled, folder)


@pytest.fixture(scope="module")
def deit_masks(golden):
    return AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy")).keep


BANKS = {"q_banks": 32, "k_banks": 32, "v_banks": 32, "output_banks": 32}


@pytest.mark.parametrize("policy", ASSIGNMENTS)
@pytest.mark.parametrize(("layer", "head"), [(2, 0), (5, 2), (10, 1)])
def test_crops_of_real_heads(layer, head, policy, deit_masks, compiled, tmp_path):
    """The first 64 tokens of DeiT-Tiny heads on 16 lines: the full row and column are in."""
    keep = deit_masks[layer][head][:64, :64]
    hardware, schedule = replace(IDEAL, lines=16, **BANKS), Schedule(assignment=policy)
    case = Case.of(polarize_head(keep, 0.3), hardware, 64, schedule=schedule)
    compare(case, compiled, tmp_path)


def test_a_whole_real_head_on_the_published_array(deit_masks, compiled, tmp_path):
    """197 tokens, 64 dimensions, 64 lines."""
    mask = polarize_head(deit_masks[7][1])
    compare(Case.of(mask, replace(IDEAL, lines=64, **BANKS), 64), compiled, tmp_path)
