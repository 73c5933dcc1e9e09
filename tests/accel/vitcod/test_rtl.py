"""The MAC lines in Verilog, run by Icarus: the same cycles, the same integers.

The Verilog (accel/vitcod/rtl) has the lines, the arbiters of all banks, IdxBuf, both key
registers, two sets of accumulators, the pipeline and the lists of rows; it gets the schedule and
the data, and runs all stages of a program (heads, windows, tiles of queries and of keys) one
after the other, each in the cycle in which the one before it has ended. DRAM and softmax are
made ideal for the comparison: the DRAM fills each buffer as fast as its write ports allow, and
when a row's probabilities are there is told to the Verilog. All of that is a machine of the
engine, not a second model of it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_laws import OLD, expected_entries, made_run, stage_pieces, stages_of
from naive_index import stage_index, unit_bytes

import sievit.accel
from sievit.accel.arithmetic import FixedPoint, HeadMap
from sievit.accel.hardware import Hardware
from sievit.accel.schedule import ASSIGNMENTS, UserMapping
from sievit.accel.vitcod.program import SDDMM, SPMM, K, Q, V
from sievit.workload import Attention, AttentionMask, HeadCodec, polarize_head

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


def write_hex(path, values, bits=64):
    mask = (1 << bits) - 1
    path.write_text("\n".join(f"{int(value) & mask:x}" for value in values) + "\n")


def packed(vectors, words):
    """int8 [tokens, dim] as 64-bit words, padded with zeros."""
    padded = np.zeros((len(vectors), words * 8), dtype=np.int8)
    padded[:, : vectors.shape[1]] = vectors
    return padded.view(np.uint64).ravel()


COUNTED = {
    SDDMM: {"operand_reads": "query_reads", "operand_words": "query_words",
            "key_reads": "key_reads", "key_words": "key_words", "index_reads": "index_reads"},
    SPMM: {"operand_reads": "value_reads", "operand_words": "value_words",
           "index_reads": "index_reads", "drained": "drained_words"},
}  # fmt: skip
"""The Verilog's counts, and what the engine calls them."""


class Case:
    """A program of the engine with numbers: what the Verilog is given, and what it must give.

    q, k, v   int8 [windows, heads, tokens, dim], each head's tokens in its own order
    weights   [windows, heads, queries, keys], likewise; 0 where pruned
    """

    def __init__(self, masks, hardware, dim, schedule, windows=1, seed=0, room=0, codec=None):
        rng, mask = np.random.default_rng(seed), masks[0]
        self.op = Attention(
            "call", len(masks), mask.queries, mask.keys, dim, dim,
            windows=windows, masks=tuple(masks), codec=codec,
        )  # fmt: skip
        shapes = [(windows, len(masks), n, dim) for n in (mask.queries, mask.keys, mask.keys)]
        self.data = {
            channel: rng.integers(-128, 128, shape).astype(np.int8)
            for channel, shape in zip((Q, K, V), shapes, strict=True)
        }
        if codec:
            self.draw_latents(rng, codec, windows, dim)
        kept = np.stack([head.reordered() for head in masks])
        self.weights = rng.integers(0, 256, (windows, *kept.shape)) * kept
        self.run = made_run(self.op, hardware, windows, None, schedule, room)
        self.stages = list(stages_of(self.run))

    def draw_latents(self, rng, codec, windows, dim):
        """Latents int8 [windows, latent heads, tokens, dim] in their original order, a decoder
        each of Q and K, and the heads that they give."""
        self.latents, self.decoders = {}, {}
        inside = codec.latent_heads // codec.groups
        for side, tokens in ((Q, self.op.queries), (K, self.op.keys)):
            shape = (windows, codec.latent_heads, tokens, dim)
            self.latents[side] = rng.integers(-128, 128, shape).astype(np.int8)
            self.decoders[side] = HeadMap(
                rng.integers(-127, 128, (codec.heads, inside)),
                rng.integers(-1000, 1000, codec.heads),
                FixedPoint.of(rng.uniform(0.002, 0.02, codec.heads), 16),
                np.ones(codec.heads),
                codec.groups,
                127,
            )
            made = self.decoders[side](self.latents[side].astype(np.int64)).astype(np.int8)
            for head in range(codec.heads):
                order = self.order(head, side)
                self.data[side][:, head] = made[:, head, order]

    def order(self, head, side):
        mask = self.op.masks[head]
        return mask.query_order if side == Q else mask.key_order

    def tokens(self, channel):
        """int8 [tokens, dim] of a channel, chunk after chunk as they come."""
        program, found = self.run.program, []
        for transfer in program.transfers[slice(*program.channel_first[channel : channel + 2])]:
            _, window, head, rows, keys, _ = self.stages[transfer["need"]]
            mine = keys
            if channel == Q:
                whole = self.run.mapping.whole_queries
                mine = slice(0, self.op.queries) if whole else rows
            found.append(self.data[channel][window, head, mine])
        return np.concatenate(found)

    def wanted(self, number):
        """The stage's scores as (row, key, value), or its partial output [rows, dim]."""
        stage, window, head, rows, keys, _ = self.stages[number]
        if stage["kind"] == SDDMM:
            q, k = (self.data[side][window, head].astype(np.int64) for side in (Q, K))
            scores = q[rows] @ k[keys].T
            places = np.nonzero(expected_entries(self.op, head)[rows, keys])
            return list(zip(*places, scores[places], strict=True))
        values = self.data[V][window, head, keys].astype(np.int64)
        return self.weights[window, head, rows, keys] @ values


def write_stage(case, number, alive, tokens, folder):
    """The hex files of a stage; returns its fields of the test bench's table. ``alive``: bytes
    that units under way hold in IdxBuf."""
    run, (stage, window, head, rows, keys, opens) = case.run, case.stages[number]
    program, kind, plan = run.program, int(stage["kind"]), int(stage["plan"])
    folder.mkdir()
    (first, last), (entry, _) = program.line_piece[plan, [0, -1]], program.line_entry[plan, [0, -1]]
    pieces = program.pieces[first:last]
    dense = pieces["round"] < 0
    mine = [piece[:3] for piece in stage_pieces(run, stage, head, rows, keys) if not piece[3]]
    held, stream = stage_index(run.mapping, kind, head, rows, keys, mine)
    whole = -(-np.cumsum([bits for *_, bits in stream] or [0]) // 8)
    line_entry, operands = program.line_entry[plan] - entry, {}
    for line, _, found in mine:
        operands.setdefault(line, []).extend(found)
    place = np.zeros(len(stream), dtype=np.int64)
    for order, (line, entry_of_line, _) in enumerate(stream):
        place[line_entry[line] + entry_of_line] = order
    units = program.unit_row[stage["unit"] : stage["unit"] + 2]
    weights = np.zeros((rows.stop - rows.start, tokens), dtype=np.int64)
    weights[:, : keys.stop - keys.start] = case.weights[window, head, rows, keys]
    columns = {
        "piece_vector": pieces["vector"],
        "piece_first": np.where(dense, pieces["first"], 0),
        "piece_length": pieces["length"],
        "piece_round": np.where(dense, 0, pieces["round"]),
        "piece_dense": dense,
        "piece_place": np.where(dense, 0, pieces["place"]),
        "line_piece": program.line_piece[plan] - first,
        "line_entry": line_entry,
        "entry_place": place,
        "stream": [operands[line][entry_of_line] for line, entry_of_line, _ in stream],
        "whole": whole if stream else [],
        "frees": np.diff(whole, prepend=0) if stream else [],
        "row_ready": run.trace.row_ready[slice(*units)],
        "list_first": program.row_lists[slice(*units)],
        "weight": weights.ravel(),
    }
    for name, values in columns.items():
        write_hex(folder / f"{name}.hex", values if len(values) else [0])
    outputs = 0 if kind == SDDMM else (rows.stop - rows.start) * run.mapping.key_words * 8
    return [
        kind == SPMM, stage["unit"] % 2, stage["operand_token"], stage["vector_token"],
        int(whole[-1]), run.hardware.index_buffer_bytes - held - alive, outputs,
        rows.stop - rows.start, opens,
    ]  # fmt: skip


def write_program(case, tokens, folder):
    """The whole program: its stages, and the tokens of Q, K and V as they come."""
    run, table = case.run, []
    ends = {int(stage["unit"]): n for n, stage in enumerate(run.program.stages)}
    begins = {int(stage["unit"]): n for n, (stage, *_, opens) in enumerate(case.stages) if opens}
    for number in range(len(case.stages)):
        alive = sum(
            unit_bytes(run.mapping, *case.stages[begins[unit]][2:4])
            for unit in begins
            if begins[unit] <= number <= ends[unit]
        )
        table += write_stage(case, number, alive, tokens, folder / str(number))
    write_hex(folder / "stages.hex", table)
    for channel, name in ((Q, "q"), (K, "k"), (V, "v")):
        write_hex(folder / f"{name}.hex", packed(case.tokens(channel), run.mapping.key_words))


def write_decoder(case, tokens, folder):
    """What the decoder is given; returns its arguments."""
    run, op, mapping = case.run, case.op, case.run.mapping
    inside, both = op.codec.latent_heads // op.codec.groups, op.keys + op.queries
    latents = [
        packed(case.latents[side][window, block * inside + latent], mapping.key_words)
        for window in range(op.windows)
        for block in range(op.codec.groups)
        for latent in range(inside)
        for side in (K, Q)
    ]
    words = np.stack(latents).reshape(-1, inside, 2, op.queries, mapping.key_words)
    # [blocks, latents, keys then queries, words] -> token after token
    words = words.reshape(-1, inside, both, mapping.key_words).swapaxes(1, 2)
    write_hex(folder / "latent.hex", words.ravel())
    tables = {name: np.zeros((2, 256), dtype=np.int64) for name in CHUNK_TABLES}
    latent_of, counts = np.zeros((2, tokens), dtype=np.int64), []
    for row, side in enumerate((Q, K)):
        chunks = run.program.transfers[slice(*run.program.channel_first[side : side + 2])]
        counts.append(len(chunks))
        for number, chunk in enumerate(chunks):
            _, window, head, rows, keys, _ = case.stages[chunk["need"]]
            whole = slice(0, op.queries) if mapping.whole_queries else rows
            tile, first = (whole, op.keys) if side == Q else (keys, 0)
            block = window * op.codec.groups + head * op.codec.groups // op.heads
            begin = int(chunk["token"])
            found = case.order(head, side)[tile] + block * both + first
            latent_of[row, begin : begin + len(found)] = found
            values = (chunk["tokens"], chunk["room"], chunk["need"], chunk["release"], head)
            for name, value in zip(CHUNK_TABLES, values, strict=True):
                tables[name][row, number] = value
    for name, table in tables.items():
        write_hex(folder / f"chunk_{name}.hex", table.ravel())
    write_hex(folder / "latent_of.hex", latent_of.ravel())
    write_hex(folder / "chunks.hex", counts)
    made = np.zeros((4, 2, 16 * inside), dtype=np.int64)
    for row, side in enumerate((Q, K)):
        decoder = case.decoders[side]
        made[0, row, : decoder.weight.size] = decoder.weight.ravel()
        for number, values in enumerate(
            (decoder.bias, decoder.rescale.multiplier, decoder.rescale.shift), 1
        ):
            made[number, row, : op.heads] = values
    for name, values in zip(("weight", "bias", "multiplier", "shift"), made, strict=True):
        width = 16 * inside if name == "weight" else 16
        write_hex(folder / f"decoder_{name}.hex", values[:, :width].ravel(), 32)
    blocks = op.windows * op.codec.groups
    return {
        "resident": 1,
        "latent_port": run.hardware.latent_banks * run.hardware.word_bytes,
        "latent_kept": mapping.kept.latents * both,
        "latent_all": blocks * both,
        "latent_bytes": inside * op.key_dim,
        "cost": inside * op.key_dim,
        "rate": mapping.decoder_rate,
        "q_room": mapping.cut.q,
        "k_room": mapping.cut.k,
    }


CHUNK_TABLES = ("tokens", "room", "need", "release", "head")


def simulate_rtl(case, compiled, folder):
    """(first cycle, scores as (row, vector, value), outputs, counts) of each stage in Verilog."""
    run, hardware = case.run, case.run.hardware
    counts = [len(case.tokens(channel)) for channel in (Q, K, V)]
    tokens = next(size for size in (64, 256, 1024) if size >= max(counts))
    write_program(case, tokens, folder)
    kept, word = run.mapping.kept, hardware.word_bytes
    arguments = {
        "folder": folder,
        "stages": len(case.stages),
        "lists": int(run.mapping.one_stream),
        "sort": int(hardware.sorted_lists),
        "token_bytes": case.op.key_dim,
    }
    banks, firsts = (hardware.q_banks, hardware.k_banks, hardware.v_banks), kept[:3]
    for side, ports, chunks, count, channel in zip("qkv", banks, firsts, counts, (Q, K, V),
                                                   strict=True):  # fmt: skip
        first = run.program.channel_first[channel]
        here = run.program.transfers["tokens"][first : first + chunks].sum()
        arguments |= {f"{side}_port": ports * word, f"{side}_kept": here, f"{side}_all": count}
    latents = 1
    if run.mapping.resident_latents:
        arguments |= write_decoder(case, tokens, folder)
        latents = run.mapping.latent_heads
    program_file = compiled(
        LATENTS=latents,
        LINES=hardware.lines,
        WORDS=run.mapping.key_words,
        OPERAND_BANKS=hardware.q_banks,
        KEY_BANKS=hardware.k_banks,
        OUTPUT_BANKS=hardware.output_banks,
        INDEX_PORTS=hardware.index_entries_per_cycle,
        PIECES=2048,
        ENTRIES=8192,
        TOKENS=tokens,
    )
    given = [f"+{name}={value}" for name, value in arguments.items()]
    done = subprocess.run(
        ["vvp", "-n", program_file, *given], capture_output=True, text=True, check=True, timeout=120
    )
    assert "endless" not in done.stdout, done.stdout[-2000:] + done.stderr
    return stages_printed(done.stdout)


def stages_printed(text):
    found = []
    for line in text.splitlines():
        name, *numbers = line.split()
        if name == "stage":
            found.append((int(numbers[1]), [], [], {}))
        elif name == "score":
            found[-1][1].append(tuple(map(int, numbers)))
        elif name == "output":
            found[-1][2].append(int(numbers[1]))
        elif len(numbers) == 1 and numbers[0].isdigit():
            found[-1][3][name] = int(numbers[0])
    return found


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
