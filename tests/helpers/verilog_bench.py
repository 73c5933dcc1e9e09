"""A program of the engine with numbers, and the test bench in Verilog that runs it."""

from __future__ import annotations

import subprocess

import numpy as np
from engine_laws import expected_entries, made_run, stage_pieces, stages_of
from naive_index import stage_index, unit_bytes

from sievit.accel.arithmetic import FixedPoint, HeadMap
from sievit.accel.vitcod.pattern import SDDMM, SPMM
from sievit.accel.vitcod.program import K, Q, V
from sievit.workload import Attention


def write_hex(path, values, bits=64):
    mask = (1 << bits) - 1
    path.write_text("\n".join(f"{int(value) & mask:x}" for value in values) + "\n")


def packed(vectors, words):
    """int8 [tokens, dim] as 64-bit words, padded with zeros."""
    padded = np.zeros((len(vectors), words * 8), dtype=np.int8)
    padded[:, : vectors.shape[1]] = vectors
    return padded.view(np.uint64).ravel()


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


CHUNK_TABLES = ("tokens", "room", "need", "release", "head")


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
