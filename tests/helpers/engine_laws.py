"""The laws of the cycle engine: what is conserved and what bounds it, one function a law."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from naive_index import keys_of, stage_index, tiles_of, unit_bytes

from sievit.accel.hardware import Hardware
from sievit.accel.schedule import DEFAULT, Schedule
from sievit.accel.vitcod.builder import build
from sievit.accel.vitcod.coded import with_index_held
from sievit.accel.vitcod.core import engine
from sievit.accel.vitcod.core.registers import STALLS
from sievit.accel.vitcod.estimate import kept_bytes
from sievit.accel.vitcod.mapper import choose
from sievit.accel.vitcod.pattern import SDDMM
from sievit.accel.vitcod.program import CODEC, INDEX, LATENT, STORE, K, Q, V
from sievit.accel.vitcod.regions import NOTHING
from sievit.workload import Attention

OLD = Schedule(
    objective="cycles",
    scratchpad="fixed",
    on_chip="nothing",
    latents="fill",
    index_streams=2,
    index_encoding="absolute",
    mappings_stepped=1,
    sparser_percent=100,
    key_loads="all",
    index_loads="each_instance",
)
"""Four rigid buffers, everything loaded for each call, an index for each product: the machine
as far as ViTCoD's text gives it."""


@dataclass(frozen=True)
class Run:
    """One attention call on one machine, from the mapping to the trace."""

    op: Attention
    hardware: Hardware
    instances: int
    mapping: Any
    program: Any
    counts: Any
    trace: Any

    def got(self, name: str) -> int:
        return self.trace.count(name)

    @property
    def computed(self) -> int:
        """Scores that the machine should compute."""
        heads = range(self.op.heads)
        return self.instances * sum(int(expected_entries(self.op, h).sum()) for h in heads)

    @property
    def sparser(self) -> int:
        """Kept entries outside the dense blocks."""
        return self.instances * sum(mask.sparser_kept for mask in self.op.masks or ())


def made_run(op, hardware, instances=1, mapping=None, schedule=DEFAULT, on_chip_bytes=0) -> Run:
    mapping = mapping or choose(op, hardware, schedule, instances, on_chip_bytes)
    mapping = with_index_held(mapping, instances)
    program, counts = build(mapping, instances)
    trace = engine.run(program, mapping)
    return Run(op, hardware, instances, mapping, program, counts, trace)


def stages_of(run):
    """(stage, instance, head, rows, keys, opens the unit) of each; keys by their places among
    those of the unit."""
    units, begun = list(run.mapping.units(run.instances)), Counter()
    for stage in run.program.stages:
        number, kind = int(stage["unit"]), int(stage["kind"])
        keys = tiles_of(run.mapping, *units[number][1:])[begun[number, kind]]
        begun[number, kind] += 1
        yield stage, *units[number], keys, kind == SDDMM and begun[number, kind] == 1


def list_slots(run, stage, head, rows, keys):
    """Key, inside the tile, that stands at each place of the lists of a unit once each row's
    keys are in order. The places of other tiles are left out."""
    first = int(run.program.unit_row[stage["unit"]])
    expected = expected_entries(run.op, head)
    dense = run.op.masks[head].num_global
    slots = {}
    place_of = {key: place for place, key in enumerate(keys_of(run.mapping, head, rows))}
    for row in range(rows.start, rows.stop):
        begin = int(run.program.row_lists[first + row - rows.start])
        mine = (place_of[key] for key in np.flatnonzero(expected[row]) if key >= dense)
        for place, key in enumerate(mine, begin):
            if keys.start <= key < keys.stop:
                slots[place] = row - rows.start, int(key) - keys.start
    return slots


def stage_pieces(run, stage, head, rows, keys):
    """(line, vector, operands, whether of the denser engine) of each piece; where SpMM reads
    lists, what it finds at the piece's places."""
    program, plan = run.program, int(stage["plan"])
    listed = stage["kind"] != SDDMM and run.mapping.schedule.index_streams == 1
    slots = list_slots(run, stage, head, rows, keys) if listed and run.op.masks else {}
    for piece in program.pieces[program.line_piece[plan, 0] : program.line_piece[plan, -1]]:
        line, vector, count = int(piece["line"]), int(piece["vector"]), int(piece["length"])
        operands, dense = list(range(piece["first"], piece["first"] + count)), piece["round"] < 0
        if listed and not dense:
            found = [slots[place] for place in range(piece["place"], piece["place"] + count)]
            assert {row for row, _ in found} == {vector}
            operands = [key for _, key in found]
        elif not dense:
            operands = program.entries["operand"][operands].tolist()
        yield line, vector, operands, bool(dense)


def computed_entries(run):
    """(instance, head, kind) -> how often each entry [queries, keys] is computed."""
    done, shape = {}, (run.op.queries, run.op.keys)
    for stage, instance, head, rows, keys, _ in stages_of(run):
        kind = int(stage["kind"])
        table = done.setdefault((instance, head, kind), np.zeros(shape, dtype=np.int64))
        names = keys_of(run.mapping, head, rows)
        for _, vector, operands, _ in stage_pieces(run, stage, head, rows, keys):
            for operand in operands:
                row, key = (operand, vector) if kind == SDDMM else (vector, operand)
                table[rows.start + row, names[keys.start + key]] += 1
    return done


def expected_entries(op, head):
    """What the machine should compute of a head: the whole dense block, the kept rest."""
    if op.masks is None:
        return np.ones((op.queries, op.keys), dtype=np.int64)
    expected = op.masks[head].reordered()
    expected[:, : op.masks[head].num_global] = True
    return expected.astype(np.int64)


# What is computed.


def every_kept_entry_is_a_score(run: Run) -> None:
    assert run.counts.scores == run.computed


def every_score_takes_its_words(run: Run) -> None:
    assert run.got("query_words") == run.computed * run.mapping.key_words
    assert run.got("value_words") == run.computed * run.mapping.value_words


def every_sparser_score_was_forwarded_or_waited(run: Run) -> None:
    assert run.got("forwarded") + run.got("waited") == run.sparser


def every_index_is_read_once_a_stream(run: Run) -> None:
    streams = run.mapping.schedule.index_streams
    assert run.got("index_reads") == run.counts.entries == streams * run.sparser


def every_key_of_a_list_is_written_once(run: Run) -> None:
    assert run.counts.listed == (2 - run.mapping.schedule.index_streams) * run.sparser


def every_piece_drains_its_row(run: Run) -> None:
    assert run.got("drained_words") == run.counts.pieces * run.mapping.value_words


def a_read_serves_at_least_one_line_and_at_most_all(run: Run) -> None:
    for side in ("key", "query", "value"):
        words = run.got(f"{side}_words")
        assert words / run.hardware.lines <= run.got(f"{side}_reads") <= words


# Time.


def every_line_cycle_has_one_cause(run: Run) -> None:
    spans = run.trace.stage_times[:, 1] - run.trace.stage_times[:, 0]
    assert run.trace.stage_stalls.sum(axis=1).tolist() == (run.hardware.lines * spans).tolist()


def every_cycle_has_one_phase(run: Run) -> None:
    times, phases = run.trace.stage_times, run.trace.stage_phases
    assert phases.sum() == run.got("cycles") == times[-1, 1] + run.got("tail_cycles")
    assert phases[:-1].sum(axis=1).tolist() == (times[:, 1] - times[:, 0]).tolist()


def stages_follow_each_other(run: Run) -> None:
    times = run.trace.stage_times
    assert times[0, 0] == 0
    assert times[1:, 0].tolist() == times[:-1, 1].tolist()


def busy_lines_do_the_work_and_no_more(run: Run) -> None:
    busy = int(run.trace.stage_stalls[:, STALLS.index("busy")].sum())
    work = run.computed * (run.mapping.key_words + run.mapping.value_words)
    assert busy == work <= run.hardware.lines * run.got("cycles")


def no_part_is_busy_longer_than_the_call(run: Run) -> None:
    for resource in ("dram_cycles", "softmax_cycles", "decoder_cycles"):
        assert run.got(resource) <= run.got("cycles")


def softmax_is_bound_by_its_lanes(run: Run) -> None:
    assert run.got("softmax_cycles") * run.hardware.softmax_lanes >= run.computed


# Bytes: all transfers are done, and each tensor moves what its formula says.


def every_transfer_is_done_within_the_bandwidth(run: Run) -> None:
    rate = run.hardware.dram_bytes_per_cycle
    units = run.got("dram_units")
    assert units == int(run.program.transfers["bytes"].sum()) * rate.denominator
    assert run.got("cycles") * rate.numerator >= units


def used_keys(run: Run) -> int:
    """Of all units of an instance, those loaded again for other queries counted again."""
    mapping = run.mapping
    tiles = [(head, rows) for head in range(run.op.heads) for rows in mapping.query_tiles]
    return sum(len(keys_of(mapping, *unit)) for unit in tiles)


def loads_of(run: Run) -> dict[int, int]:
    """Bytes of Q, K, V and latents that a call with nothing on chip loads."""
    op, mapping, width = run.op, run.mapping, run.hardware.operand_bytes
    tiles, in_tiles = len(mapping.query_tiles), len(mapping.key_tiles) > 1
    token, blocks = op.heads * op.key_dim, 1  # of Q or K, all heads
    if op.codec:
        token, blocks = op.codec.latent_heads * op.key_dim, op.codec.groups
    passes = op.heads // (mapping.group * blocks) if op.codec else 1
    by_rows = tiles > 1 and mapping.group > 1 and not mapping.whole_queries
    values = op.keys * op.heads * (tiles if in_tiles or by_rows else 1)
    keys = passes * op.keys * token
    if tiles > 1 and in_tiles:
        values = used_keys(run)
        keys = values * op.key_dim
        if op.codec:
            keys *= op.codec.latent_heads // op.codec.groups
    again = len(mapping.key_tiles) if mapping.schedule.query_loads == "per_key_tile" else 1
    loads = {
        Q: passes * op.queries * token * (1 if op.codec else again),
        K: keys,
        V: values * op.value_dim,
        LATENT: 0,
    }
    if mapping.resident_latents:
        loads |= {Q: 0, K: 0, LATENT: (op.queries + op.keys) * token}
    return {channel: run.instances * size * width for channel, size in loads.items()}


def what_is_kept_is_not_loaded(run: Run) -> None:
    """And everything else is, as often as it leaves its buffer."""
    q, k, v = kept_bytes(run.mapping)
    kept = {Q: q, K: k, V: v, LATENT: 0}
    if run.mapping.resident_latents:
        kept |= {Q: 0, K: 0, LATENT: q + k}
    for channel, size in loads_of(run).items():
        assert run.program.dram_bytes(channel) == size - kept[channel] >= 0


def what_is_kept_is_loaded_where_nothing_is(run: Run) -> None:
    without, _ = build(replace(run.mapping, kept=NOTHING), run.instances)
    for channel, size in loads_of(run).items():
        assert without.dram_bytes(channel) == size


def the_output_is_stored_once(run: Run) -> None:
    output = run.instances * run.op.heads * run.op.queries * run.op.value_dim
    assert run.program.dram_bytes(STORE) == output


def the_index_is_loaded_entry_by_entry(run: Run) -> None:
    """What each unit and each stage hold, and the stream in whole bytes."""
    loaded = bits = read = 0
    places = {}
    for stage, _, head, rows, keys, opens in stages_of(run):
        pieces = stage_pieces(run, stage, head, rows, keys)
        mine = [(line, vector, operands) for line, vector, operands, dense in pieces if not dense]
        kind = int(stage["kind"])
        held, stream = stage_index(run.mapping, kind, head, rows, keys, mine)
        streamed = sum(size for *_, size in stream)
        before = held + (unit_bytes(run.mapping, head, rows) if opens else 0)
        name = (head, rows.start, keys.start, kind)
        if not (run.mapping.index_held and name in places):
            places[name] = loaded + before
            loaded += before + -(-streamed // 8)
        assert stage["index_bytes"] == places[name]
        read, bits = read + before + -(-streamed // 8), bits + streamed
    assert run.program.dram_bytes(INDEX) == loaded
    assert run.counts.stream_bits == bits
    assert run.counts.index_bytes == read


def a_bias_is_loaded_at_most_once_an_instance(run: Run) -> None:
    codec = run.mapping.codec_bytes if run.op.codec else 0
    loaded = (run.program.dram_bytes(CODEC) - codec) / run.hardware.score_bytes
    assert run.op.bias_params <= loaded <= run.op.bias_params * run.instances


def every_head_of_every_token_is_decoded_once(run: Run) -> None:
    """heads * latents * dim MACs a token of Q and of K, in a codec block the block's; within
    the decoder's rate."""
    op, mapping, macs = run.op, run.mapping, 0
    if op.codec:
        latents = op.codec.latent_heads // op.codec.groups
        keys = op.heads * op.keys
        if len(mapping.query_tiles) > 1 and len(mapping.key_tiles) > 1:
            keys = used_keys(run)
        macs = run.instances * latents * op.key_dim * (op.heads * op.queries + keys)
    assert run.got("decoder_macs") == macs
    assert run.got("decoder_cycles") * mapping.decoder_rate >= macs
    assert mapping.decoder_rate <= max(run.hardware.decoder_macs, 1)
    if op.codec:
        for side in (Q, K):
            times = run.trace.decoded_at[side, : run.program.tokens(side)]
            assert (times > 0).all()
            assert (np.diff(times) >= 0).all()


LAWS = (
    every_kept_entry_is_a_score,
    every_score_takes_its_words,
    every_sparser_score_was_forwarded_or_waited,
    every_index_is_read_once_a_stream,
    every_key_of_a_list_is_written_once,
    every_piece_drains_its_row,
    a_read_serves_at_least_one_line_and_at_most_all,
    every_line_cycle_has_one_cause,
    every_cycle_has_one_phase,
    stages_follow_each_other,
    busy_lines_do_the_work_and_no_more,
    no_part_is_busy_longer_than_the_call,
    softmax_is_bound_by_its_lanes,
    every_transfer_is_done_within_the_bandwidth,
    what_is_kept_is_not_loaded,
    what_is_kept_is_loaded_where_nothing_is,
    the_output_is_stored_once,
    the_index_is_loaded_entry_by_entry,
    a_bias_is_loaded_at_most_once_an_instance,
    every_head_of_every_token_is_decoded_once,
)
