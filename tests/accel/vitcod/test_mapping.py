"""Tiles and groups: everything is covered once, everything fits, refusals say what is short."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from engine_laws import OLD

from sievit.accel.hardware import presets
from sievit.accel.schedule import DEFAULT, LATENTS, Schedule
from sievit.accel.vitcod.builder import build
from sievit.accel.vitcod.estimate import WorkOfTiles, busiest_line, estimate_cycles
from sievit.accel.vitcod.mapper import candidates, choose
from sievit.accel.vitcod.mapping import codec_side_bytes
from sievit.accel.vitcod.pattern import Pattern
from sievit.accel.vitcod.program import LATENT, K, Q, V
from sievit.accel.vitcod.run import run_attention
from sievit.accel.vitcod.simulate import attention_cost
from sievit.workload import Attention, HeadCodec, polarize_head

VITCOD = presets["vitcod"]


def sparse(tokens, heads, dim=64, density=0.1, codec=None, keys=None):
    keep = np.random.default_rng(tokens).random((tokens, keys or tokens)) < density
    keep[:, 0] = keep[0] = True
    masks = (polarize_head(keep, 0.5),) * heads
    return Attention("call", heads, tokens, keys or tokens, dim, dim, masks=masks, codec=codec)


CALLS = {
    "DeiT-Tiny": sparse(197, 3),
    "DeiT-Tiny, codec": sparse(197, 3, codec=HeadCodec(3, 2)),
    "DeiT-Base, codec": sparse(197, 12, codec=HeadCodec(12, 6)),
    "DeiT-Base, codec in groups": sparse(197, 12, codec=HeadCodec(12, 6, groups=3)),
    "more tokens than K holds": sparse(1025, 6),
    "LeViT": sparse(49, 4, dim=16, keys=196),
    "dense": Attention("call", 2, 300, 300, 64, 32),
    "one token": Attention("call", 1, 1, 1, 7, 9),
}


@pytest.mark.parametrize("op", CALLS.values(), ids=CALLS)
def test_units_and_tiles_cover_the_call_once(op):
    mapping = choose(op, VITCOD)
    times = np.zeros((2, op.heads, op.queries), dtype=int)
    for instance, head, rows in mapping.units(2):
        times[instance, head, rows] += 1
    assert (times == 1).all()
    keys = np.zeros(op.keys, dtype=int)
    for tile in mapping.key_tiles:
        keys[tile] += 1
    assert (keys == 1).all()


HOW = {"old": OLD, "default": DEFAULT, "resident": Schedule(latents="resident")}


@pytest.mark.parametrize("schedule", HOW.values(), ids=HOW)
@pytest.mark.parametrize("op", CALLS.values(), ids=CALLS)
def test_what_is_resident_fits(op, schedule):
    """Region by region, from the sizes alone."""
    mapping = choose(op, VITCOD, schedule, 1, 50_000)
    fixed = (VITCOD.q_buffer_bytes, VITCOD.k_buffer_bytes, VITCOD.v_buffer_bytes,
             VITCOD.other_buffer_bytes)  # fmt: skip
    if schedule is OLD:
        assert mapping.cut == fixed
    assert sum(mapping.cut) <= sum(fixed)
    word = VITCOD.word_bytes
    query, value = mapping.key_words * word, mapping.value_words * word
    tiles = (mapping.query_tile, op.queries), (mapping.key_tile, op.keys)
    queries, keys = (tile if tile in (1, whole) else 2 * tile for tile, whole in tiles)
    if mapping.whole_queries:
        queries = op.queries
    chunk = op.queries if mapping.whole_queries else mapping.query_tile
    chunks = (chunk, mapping.key_tile, mapping.key_tile)
    sizes = (mapping.group * query, mapping.group * query, value)
    for side, tokens in enumerate((queries, keys, keys)):
        assert tokens * sizes[side] <= mapping.cut[side]
        assert mapping.kept[side] * chunks[side] * sizes[side] <= mapping.cut[side]
    alive = 2 if mapping.ahead and op.heads * len(mapping.query_tiles) > 1 else 1
    scores = max(
        int(pattern.row_scores[tile].sum())
        for pattern in mapping.patterns
        for tile in mapping.query_tiles
    )
    sums = mapping.query_tile * mapping.value_words * VITCOD.macs_per_line * 4
    units = op.heads * len(mapping.query_tiles)
    regions = min(mapping.output_regions, units)
    assert alive * scores * 2 + regions * sums <= VITCOD.output_buffer_bytes
    if op.codec:
        latents = op.codec.latent_heads // op.codec.groups * query
        if schedule.latents == "resident":
            latents *= op.queries + op.keys
        assert mapping.resident_latents or mapping.staging_tokens >= 1
        assert mapping.codec_bytes + latents <= mapping.cut.rest


@pytest.mark.parametrize("op", CALLS.values(), ids=CALLS)
def test_no_chunk_is_larger_than_its_buffer(op):
    mapping = choose(op, VITCOD)
    program, _ = build(mapping, 1)
    for channel, size in enumerate(mapping.cut[:3]):
        first, last = program.channel_first[channel : channel + 2]
        assert program.transfers["room"][first:last].max() <= size


def test_a_codec_block_is_decoded_in_one_pass_where_it_fits():
    op = CALLS["DeiT-Tiny, codec"]
    mapping = choose(op, VITCOD, OLD)
    assert mapping.group == 3
    assert mapping.token_bytes == 2 * 64
    assert mapping.decode_macs == 3 * 2 * 64  # heads * latent_heads * d, once a token
    program, _ = build(mapping, 1)
    assert program.dram_bytes(0) == program.dram_bytes(1) == 197 * 2 * 64
    # 12 heads x 197 tokens x 64 B do not fit: the latents come once for each group.
    base = CALLS["DeiT-Base, codec"]
    mapping = next(mapping for mapping in candidates(base, VITCOD, OLD) if mapping.group == 4)
    program, _ = build(mapping, 1)
    assert program.dram_bytes(1) == 3 * 197 * 6 * 64
    # Blocks of 4 heads: each is decoded in one pass, and nothing is loaded twice.
    grouped = CALLS["DeiT-Base, codec in groups"]
    mapping = next(mapping for mapping in candidates(grouped, VITCOD, OLD) if mapping.group == 4)
    assert mapping.latent_heads == 2
    program, _ = build(mapping, 1)
    assert program.dram_bytes(1) == 197 * 6 * 64


def test_resident_latents_come_once_and_each_head_is_decoded_from_them():
    for name in ("DeiT-Tiny, codec", "DeiT-Base, codec in groups"):
        op = CALLS[name]
        mapping = choose(op, VITCOD, Schedule(latents="resident"))
        assert mapping.resident_latents
        assert mapping.group == 1
        assert mapping.decode_macs == op.codec.latent_heads // op.codec.groups * 64  # a head's
        program, _ = build(mapping, 2)
        assert program.dram_bytes(LATENT) == 2 * 2 * 197 * op.codec.latent_heads * 64
        assert program.dram_bytes(Q) == program.dram_bytes(K) == 0
        assert program.tokens(Q) == program.tokens(K) == 2 * op.heads * 197


@pytest.mark.parametrize(
    ("banks", "rate"),
    [
        ({}, 256),  # the decoder's own
        ({"latent_banks": 1}, 8),  # 128 MACs a token, whose latents take 16 reads of 8 bytes
        ({"q_banks": 1}, 16),  # ... and whose head takes 8 writes
        ({"latent_banks": 4, "k_banks": 1}, 16),
        ({"decoder_macs": 5, "latent_banks": 1}, 5),
    ],
)
def test_the_decoder_is_no_faster_than_the_ports_around_it(banks, rate):
    op, hardware = CALLS["DeiT-Tiny, codec"], replace(VITCOD, **banks)
    assert choose(op, hardware, Schedule(latents="resident")).decoder_rate == rate


def naive_kept(mapping, room, instances):
    """Chunks of K, Q and V in turn, head after head, as long as they fit."""
    op, word = mapping.op, VITCOD.word_bytes
    queries = [op.queries] if mapping.whole_queries else [mapping.query_tile] * len(
        mapping.query_tiles
    )  # fmt: skip
    keys = [mapping.key_tile] * len(mapping.key_tiles)
    row = {"k": mapping.key_words * word, "q": mapping.key_words * word}
    row["v"] = mapping.value_words * word
    chunks = {"k": keys, "q": queries, "v": keys}
    chunks = {side: sizes * op.heads * instances for side, sizes in chunks.items()}
    space = dict(zip("qkv", mapping.cut, strict=False))
    again = len(mapping.query_tiles) > 1 and len(mapping.key_tiles) > 1
    kept, going = {"k": 0, "q": 0, "v": 0}, True
    while going:
        going = False
        for side in "kqv":
            if kept[side] == len(chunks[side]) or (again and side != "q"):
                continue
            size = chunks[side][kept[side]] * row[side]
            if size <= min(room, space[side]):
                room, space[side], going = room - size, space[side] - size, True
                kept[side] += 1
    return kept["q"], kept["k"], kept["v"]


@pytest.mark.parametrize("room", [10_000, 40_000, 10**6])
@pytest.mark.parametrize("name", ["DeiT-Tiny", "more tokens than K holds", "LeViT", "dense"])
def test_what_stays_on_chip_is_the_first_heads_in_turn(name, room):
    for schedule in (DEFAULT, replace(DEFAULT, scratchpad="fixed")):
        for mapping in candidates(CALLS[name], VITCOD, schedule, 2, room)[:6]:
            assert mapping.kept[:3] == naive_kept(mapping, room, 2)
            assert mapping.kept.latents == 0
    nothing = replace(DEFAULT, on_chip="nothing")
    assert not any(choose(CALLS[name], VITCOD, nothing, 2, room).kept)


def test_latents_stay_on_chip_before_values_do():
    op, schedule = CALLS["DeiT-Tiny, codec"], Schedule(latents="resident")
    latents = 2 * 197 * 2 * 64
    assert choose(op, VITCOD, schedule, 1, latents - 1).kept.latents == 0
    mapping = choose(op, VITCOD, schedule, 1, latents)
    assert mapping.kept == (0, 0, 0, 1)
    mapping = choose(op, VITCOD, schedule, 1, latents + 197 * 64)
    assert mapping.kept == (0, 0, 1, 1)
    program, _ = build(mapping, 2)
    assert program.dram_bytes(LATENT) == latents  # of the second image
    assert program.dram_bytes(V) == 5 * 197 * 64


def test_codec_bytes_are_weights_and_biases_of_both_decoders():
    op = CALLS["DeiT-Base, codec in groups"]
    assert codec_side_bytes(op, VITCOD, decoder=True) == 12 * 6 // 3 + 12 * 4
    assert codec_side_bytes(op, VITCOD, decoder=False) == 12 * 6 // 3 + 6 * 4
    assert choose(op, VITCOD).codec_bytes == 2 * (24 + 48)
    assert codec_side_bytes(CALLS["dense"], VITCOD, decoder=True) == 0


def test_index_entries_are_as_wide_as_the_tokens_need():
    for name, bits in (("DeiT-Tiny", 8), ("more tokens than K holds", 16)):
        assert choose(CALLS[name], VITCOD, OLD).widths.entry_bits == bits
        assert choose(CALLS[name], VITCOD).widths.entry_bits == 8


def test_a_pattern_counts_what_the_machine_computes():
    keep = np.eye(6, dtype=bool)
    keep[:4, 2] = True
    pattern = Pattern.of(polarize_head(keep, 3))
    assert pattern.num_global == 1
    assert pattern.row_scores.sum() == 6 + 5
    assert pattern.masked
    assert not Pattern.of(polarize_head(np.ones((3, 3), dtype=bool), 0)).masked
    assert Pattern.dense(4, 5).row_scores.tolist() == [5] * 4


SHORT = {
    "q_buffer_bytes": 63,
    "k_buffer_bytes": 63,
    "v_buffer_bytes": 63,
    "index_buffer_bytes": 2,
    "output_buffer_bytes": 200,
    "other_buffer_bytes": 200,
}


@pytest.mark.parametrize("field", SHORT)
def test_a_buffer_too_small_for_one_pass_is_named(field):
    op = CALLS["DeiT-Tiny, codec"]
    hardware = replace(VITCOD, name="tight", **{field: SHORT[field]})
    with pytest.raises(ValueError, match=f"call does not fit the machine 'tight': .*{field}") as e:
        choose(op, hardware, OLD)
    assert f"{field} is {SHORT[field]}, one pass needs at least " in str(e.value)


@pytest.mark.parametrize("field", SHORT)
def test_what_the_refusal_asks_for_is_enough(field):
    op = CALLS["DeiT-Tiny, codec"]
    with pytest.raises(ValueError, match=field) as error:
        choose(op, replace(VITCOD, **{field: SHORT[field]}), OLD)
    needed = int(str(error.value).split("at least ")[1])
    assert choose(op, replace(VITCOD, **{field: needed}), OLD).op is op
    with pytest.raises(ValueError, match=field):
        choose(op, replace(VITCOD, **{field: needed - 1}), OLD)


@pytest.mark.parametrize("latents", LATENTS)
def test_a_scratchpad_too_small_for_one_pass_is_named_with_what_would_do(latents):
    op, schedule = CALLS["DeiT-Tiny, codec"], Schedule(latents=latents)

    def machine(space):
        return replace(VITCOD, q_buffer_bytes=space - 3, k_buffer_bytes=1, v_buffer_bytes=1,
                       other_buffer_bytes=1)  # fmt: skip

    names = "q_buffer_bytes + k_buffer_bytes + v_buffer_bytes + other_buffer_bytes"
    with pytest.raises(ValueError, match=re.escape(f"{names} is 100, one pass needs")) as error:
        choose(op, machine(100), schedule)
    needed = int(str(error.value).split("at least ")[1])
    assert choose(op, machine(needed), schedule).op is op
    with pytest.raises(ValueError, match=f"is {needed - 1}, one pass needs at least {needed}"):
        choose(op, machine(needed - 1), schedule)


# ---------------------------------------------------------------- the mapper


def test_estimated_lines_are_near_the_assignment():
    """The closed form of a split against the pieces that lines really get."""
    op = CALLS["DeiT-Tiny"]
    mapping = choose(op, VITCOD)
    program, _ = build(mapping, 1)
    taken = [0, 0]
    for stage in program.stages:
        plan = int(stage["plan"])
        first, last = program.line_piece[plan, [0, -1]]
        pieces = program.pieces[first:last]
        loads = np.bincount(pieces["line"], pieces["length"], VITCOD.lines)
        taken[stage["kind"]] += int(loads.max())
    work = WorkOfTiles(op, mapping.patterns, VITCOD.lines)
    assert work.cycles(mapping.query_tile) == pytest.approx(taken, rel=0.15)


def test_the_busiest_line_in_small():
    one = np.array([1])
    assert busiest_line(5 * one, 7 * one, 3 * one, 1).tolist() == [38]
    assert busiest_line(0 * one, 7 * one, 9 * one, 4).tolist() == [3]
    assert busiest_line(4 * one, 7 * one, 0 * one, 4).tolist() == [7]
    # 5 vectors of 7 on 3 of 4 lines: one each, then two with a line each; 7 entries on one
    assert busiest_line(5 * one, 7 * one, 7 * one, 4).tolist() == [14]


@pytest.mark.parametrize("name", [name for name in CALLS if "more tokens" not in name])
def test_the_first_candidate_is_near_the_fastest(name):
    op, fastest = CALLS[name], replace(DEFAULT, objective="cycles")
    made = candidates(op, VITCOD, fastest)
    work = WorkOfTiles(op, made[0].patterns, VITCOD.lines)
    estimates = [estimate_cycles(mapping, work) for mapping in made]
    assert estimates[0] <= 1.01 * min(estimates)
    fewer = [
        run_attention(op, VITCOD, 1, replace(fastest, mappings_stepped=count)).cycles
        for count in (1, 3, 99)
    ]
    assert fewer[0] >= fewer[1] >= fewer[2] > 0
    assert fewer[0] <= 1.1 * fewer[2]


def test_a_batch_takes_the_mapping_that_two_images_found_fastest():
    op, schedule = CALLS["DeiT-Tiny, codec"], Schedule(mappings_stepped=4)
    two, five = (run_attention(op, VITCOD, images, schedule) for images in (2, 5))
    assert two.mapping.query_tile == five.mapping.query_tile
    assert two.instances == 2
    assert five.instances == 5
    assert 2 * two.cycles < five.cycles < 2.6 * two.cycles


def test_passes_that_cannot_load_ahead_give_way_to_smaller_ones():
    """12 heads with a codec: 4 heads a pass fill the buffers, and each pass would wait for
    its own load and decoding."""
    base = CALLS["DeiT-Base, codec"]
    assert max(mapping.group for mapping in candidates(base, VITCOD, OLD)) == 4
    assert choose(base, VITCOD, OLD).group < 4


def test_a_learned_bias_is_loaded_once_where_it_fits_and_for_each_pass_where_it_does_not():
    op = replace(CALLS["LeViT"], bias_params=4 * 196, codec=HeadCodec(4, 2))
    mapping = choose(op, VITCOD, OLD)
    without = choose(replace(op, bias_params=0), VITCOD, OLD)
    assert mapping.bias_bytes == 4 * 196 * 2
    assert mapping.bias_stays
    assert mapping.staging_tokens < without.staging_tokens
    weights = mapping.codec_bytes
    program, _ = build(mapping, 3)
    assert program.dram_bytes(4) == weights + 4 * 196 * 2
    tight = replace(VITCOD, other_buffer_bytes=1200)
    mapping = choose(op, tight, OLD)
    assert not mapping.bias_stays
    program, _ = build(mapping, 3)
    assert program.dram_bytes(4) == weights + 3 * 4 * 196 * 2
    with pytest.raises(ValueError, match="other_buffer_bytes is 500, one pass needs at least"):
        choose(op, replace(VITCOD, other_buffer_bytes=500), OLD)


def test_a_learned_bias_is_in_the_traffic_and_costs_time():
    op = replace(CALLS["LeViT"], bias_params=4 * 196)
    slow = replace(VITCOD, dram_bytes_per_s=500_000_000)  # one byte a cycle
    plain, biased = (attention_cost(x, slow, 2) for x in (CALLS["LeViT"], op))
    rows = {row.level: row for row in biased.traffic if row.tensor == "attention bias"}
    assert rows["dram"].read_bytes == 4 * 196 * 2
    assert rows["buffer"].read_bytes == biased.details["scores_computed"] * 2
    assert biased.cycles >= plain.cycles + 1000
    assert not [row for row in plain.traffic if row.tensor == "attention bias"]
