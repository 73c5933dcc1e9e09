"""The laws of the cycle engine: what is conserved and what bounds it, one function a law."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from sievit.accel.hardware import Hardware
from sievit.accel.schedule import DEFAULT
from sievit.accel.vitcod import engine
from sievit.accel.vitcod.mapper import choose
from sievit.accel.vitcod.program import CODEC, INDEX, SDDMM, STORE, K, Q, V, build
from sievit.accel.vitcod.registers import STALLS
from sievit.workload import Attention


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


def made_run(op, hardware, schedule=DEFAULT, instances=1, mapping=None) -> Run:
    mapping = mapping or choose(op, hardware, schedule)
    program, counts = build(mapping, instances)
    trace = engine.run(program, mapping)
    return Run(op, hardware, instances, mapping, program, counts, trace)


def computed_entries(op, mapping, program):
    """(instance, head, kind) -> how often each entry [queries, keys] is computed."""
    units = list(mapping.units(1 + max(int(u) for u in program.stages["unit"]) // op.heads))
    tile_of = Counter()
    done = {}
    for stage in program.stages:
        kind, number, plan = int(stage["kind"]), int(stage["unit"]), int(stage["plan"])
        instance, head, rows = units[number]
        keys = mapping.key_tiles[tile_of[number, kind]]
        tile_of[number, kind] += 1
        table = done.setdefault(
            (instance, head, kind), np.zeros((op.queries, op.keys), dtype=np.int64)
        )
        for piece in program.pieces[program.line_piece[plan, 0] : program.line_piece[plan, -1]]:
            operands = np.arange(piece["first"], piece["first"] + piece["length"])
            if piece["round"] >= 0:
                operands = program.entries["operand"][operands]
            if kind == SDDMM:
                table[rows.start + operands, keys.start + piece["vector"]] += 1
            else:
                table[rows.start + piece["vector"], keys.start + operands] += 1
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


def every_index_is_read_once_a_product(run: Run) -> None:
    assert run.got("index_reads") == run.counts.entries == 2 * run.sparser


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


# Bytes: all transfers are done; no less than the distinct data, the output exactly once.


def every_transfer_is_done_within_the_bandwidth(run: Run) -> None:
    rate = run.hardware.dram_bytes_per_cycle
    units = run.got("dram_units")
    assert units == int(run.program.transfers["bytes"].sum()) * rate.denominator
    assert run.got("cycles") * rate.numerator >= units


def queries_and_keys_are_loaded_at_least_once(run: Run) -> None:
    ratio = run.op.codec.ratio if run.op.codec else 1
    vectors = run.instances * run.op.heads * run.op.key_dim * ratio
    assert run.program.dram_bytes(Q) >= vectors * run.op.queries
    assert run.program.dram_bytes(K) >= vectors * run.op.keys


def values_are_loaded_at_least_once(run: Run) -> None:
    least = run.instances * run.op.heads * run.op.keys * run.op.value_dim
    assert run.program.dram_bytes(V) >= least


def the_output_is_stored_once(run: Run) -> None:
    output = run.instances * run.op.heads * run.op.queries * run.op.value_dim
    assert run.program.dram_bytes(STORE) == output


def indices_and_bitmaps_are_loaded(run: Run) -> None:
    masks = run.op.masks or ()
    bitmap = sum(m.global_keep.size // 8 for m in masks if not m.global_keep.all())
    least = 2 * run.sparser * run.mapping.entry_bytes + run.instances * bitmap
    assert run.program.dram_bytes(INDEX) == run.counts.index_dram_bytes >= least


def a_bias_is_loaded_at_most_once_an_instance(run: Run) -> None:
    codec = run.mapping.codec_bytes if run.op.codec else 0
    loaded = (run.program.dram_bytes(CODEC) - codec) / run.hardware.score_bytes
    assert run.op.bias_params <= loaded <= run.op.bias_params * run.instances


def every_loaded_token_is_decoded_within_the_rate(run: Run) -> None:
    loaded = run.program.dram_bytes(Q) + run.program.dram_bytes(K)
    tokens = loaded // run.mapping.token_bytes
    assert run.got("decoder_macs") == tokens * run.mapping.decode_macs
    assert run.got("decoder_cycles") * run.mapping.decoder_rate >= run.got("decoder_macs")


LAWS = (
    every_kept_entry_is_a_score,
    every_score_takes_its_words,
    every_sparser_score_was_forwarded_or_waited,
    every_index_is_read_once_a_product,
    every_piece_drains_its_row,
    a_read_serves_at_least_one_line_and_at_most_all,
    every_line_cycle_has_one_cause,
    every_cycle_has_one_phase,
    stages_follow_each_other,
    busy_lines_do_the_work_and_no_more,
    no_part_is_busy_longer_than_the_call,
    softmax_is_bound_by_its_lanes,
    every_transfer_is_done_within_the_bandwidth,
    queries_and_keys_are_loaded_at_least_once,
    values_are_loaded_at_least_once,
    the_output_is_stored_once,
    indices_and_bitmaps_are_loaded,
    a_bias_is_loaded_at_most_once_an_instance,
    every_loaded_token_is_decoded_within_the_rate,
)
