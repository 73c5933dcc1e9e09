"""The machine's integers: plain against naive, the schedule against plain, both against float."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from engine_laws import OLD
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sievit.accel import Arithmetic, Quantized, integer_attention, quantize, simulate_attention
from sievit.accel.arithmetic import FixedPoint, quantize_head_map
from sievit.accel.encodings import ENCODINGS
from sievit.accel.hardware import Hardware, presets
from sievit.accel.integer_attention import checked_rules, integer_softmax
from sievit.accel.schedule import (
    ASSIGNMENTS,
    DEFAULT,
    LATENTS,
    OBJECTIVES,
    ON_CHIP,
    SCRATCHPADS,
    Schedule,
    UserMapping,
)
from sievit.accel.vitcod.builder import build
from sievit.accel.vitcod.mapper import candidates, choose
from sievit.accel.vitcod.numbers.executor import ProgramExecutor
from sievit.accel.vitcod.numbers.functional import CodecWeights, arithmetic_of, coded_operands
from sievit.accel.vitcod.program import LATENT, K
from sievit.workload import Attention, AttentionMask, HeadCodec, polarize_head

QUICK = settings(derandomize=True, deadline=None, max_examples=60)
ALL = settings(derandomize=True, deadline=None, max_examples=120)


def rescaled(value: int, factor: Fraction, low: int, high: int) -> int:
    """Python rounds a Fraction half to even."""
    return min(max(round(value * factor), low), high)


def nearest(factor: float, bits: int) -> Fraction:
    """The multiplier / 2^shift that stands for ``factor``."""
    shift = bits - math.frexp(factor)[1]
    return round(Fraction(factor) * Fraction(2) ** shift) / Fraction(2) ** shift


def attention_naive(q, k, v, keep, scale, output_scale, shift, a: Arithmetic):
    """Entry by entry in Python's own integers; ``a`` gives the widths."""
    low, high = -(2 ** (a.score_bits - 1)), 2 ** (a.score_bits - 1) - 1
    limit = 2 ** (a.operand_bits - 1) - 1
    entries, one = 2**a.fraction_bits, 2**a.term_bits - 1
    made = np.zeros((*q.values.shape[:2], v.values.shape[2]), dtype=np.int64)
    for head, row in np.ndindex(made.shape[:2]):
        base_2 = q.scale[head] * k.scale[head] * scale * math.log2(math.e)
        to_score = nearest(base_2 * entries / 2**shift, a.multiplier_bits)
        top_one = 2**a.probability_bits - 1
        to_out = nearest(v.scale[head] / (top_one * output_scale[head]), a.multiplier_bits)
        kept = np.flatnonzero(keep[head, row])
        scores = {}
        for key in kept:
            total = sum(
                int(x) * int(y)
                for x, y in zip(q.values[head, row], k.values[head, key], strict=True)
            )
            scores[key] = rescaled(total, to_score, low, high)
        top = max(scores.values(), default=0)
        terms = {}
        for key, score in scores.items():
            whole, fraction = divmod((top - score) << shift, entries)
            terms[key] = round(one * 2.0 ** (-fraction / entries)) >> whole
        total = sum(terms.values())
        weights = {key: round(Fraction(term * top_one, total)) for key, term in terms.items()}
        for column in range(made.shape[2]):
            summed = sum(
                weight * int(v.values[head, key, column]) for key, weight in weights.items()
            )
            made[head, row, column] = rescaled(summed, to_out, -limit, limit)
    return made


widths = st.builds(
    Arithmetic,
    operand_bits=st.sampled_from([4, 8]),
    score_bits=st.sampled_from([10, 12, 16]),
    fraction_bits=st.sampled_from([0, 4, 8]),
    term_bits=st.sampled_from([8, 16]),
    probability_bits=st.sampled_from([4, 8, 12]),
    multiplier_bits=st.sampled_from([6, 16]),
)


def operands(rng, heads, queries, keys, dim, value_dim, spread=2.0):
    shapes = ((heads, queries, dim), (heads, keys, dim), (heads, keys, value_dim))
    return tuple(rng.standard_normal(shape) * spread for shape in shapes)


@QUICK
@given(st.integers(0, 2**16), widths, st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
def test_the_plain_function_is_what_its_words_say(seed, arithmetic, density, same_scale):
    rng = np.random.default_rng(seed)
    heads, queries, keys, dim, value_dim = (int(x) for x in rng.integers(1, 7, 5))
    spread = float(rng.choice([0.5, 4.0]))
    q, k, v = (
        quantize(x, arithmetic) for x in operands(rng, heads, queries, keys, dim, value_dim, spread)
    )
    keep = rng.random((heads, queries, keys)) < density
    scale = v.scale if same_scale else v.scale * 0.6  # the second may saturate
    shift = int(rng.integers(0, 4))
    made = integer_attention(
        q, k, v, keep, output_scale=scale, score_shift=shift, arithmetic=arithmetic
    )
    expected = attention_naive(q, k, v, keep, dim**-0.5, scale, shift, arithmetic)
    assert np.array_equal(made.values, expected)


@QUICK
@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=30),
    st.floats(1e-12, 60000.0),
    st.sampled_from([2, 8, 16]),
)
def test_a_change_of_scale_rounds_half_to_even(values, factor, bits):
    fixed = FixedPoint.of(np.array([factor]), bits)
    assert fixed.multiplier[0] < 2**bits or fixed.shift[0] == 0
    exact = Fraction(int(fixed.multiplier[0]), 2 ** int(fixed.shift[0]))
    assert abs(float(exact) - factor) <= factor * 2.0**-bits
    if exact:
        assert exact == nearest(factor, bits)
    made = fixed(np.array(values), -(2**15), 2**15 - 1, 0)
    assert made.tolist() == [rescaled(v, exact, -(2**15), 2**15 - 1) for v in values]


def test_halves_go_to_the_even_side():
    half = FixedPoint.of(np.array([0.5]), 8)
    odd = np.arange(-7, 8, 2)
    assert half(odd, -100, 100, 0).tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]
    assert quantize(np.array([[[0.5, 1.5, 2.5, -0.5]]]), scale=1.0).values.tolist() == [
        [[0, 2, 2, 0]]
    ]


def test_softmax_is_near_the_real_one_and_deaf_to_pruned_scores():
    rng = np.random.default_rng(0)
    arithmetic = Arithmetic()
    scores = rng.integers(-3000, 3000, (40, 24))
    keep = rng.random(scores.shape) < 0.6
    keep[3] = False
    made = integer_softmax(scores, keep, arithmetic)
    terms = np.where(keep, np.exp2((scores - scores.max()) / 256), 0.0)
    exact = terms / np.maximum(terms.sum(axis=1, keepdims=True), 1e-300)
    # half of the last place, and 16-bit terms that lose less than one unit each
    assert np.abs(made / 255 - exact).max() <= 0.5 / 255 + 24 / 2**16
    assert not made[~keep].any()
    changed = np.where(keep, scores, 32767)
    assert np.array_equal(integer_softmax(changed, keep, arithmetic), made)


def exact_row(keep_one):
    q = Quantized(np.full((1, 1, 4), 100), 1.0)
    v = Quantized(np.array([[[7, -7], [50, 90]]]), 1.0)
    return integer_attention(q, Quantized(np.full((1, 2, 4), 90), 1.0), v, keep_one).values


def test_one_kept_key_gives_its_value_and_none_gives_zero():
    assert exact_row(np.array([[[True, False]]])).tolist() == [[[7, -7]]]
    assert exact_row(np.array([[[False, False]]])).tolist() == [[[0, 0]]]
    assert exact_row(None).tolist() == [[[29, 42]]]  # 128 of 255 each, halves to even: 28.6, 41.7


# ---------------------------------------------------------------- the schedule

BUFFERS = ("q_buffer_bytes", "k_buffer_bytes", "v_buffer_bytes", "output_buffer_bytes")

machines = st.builds(
    Hardware,
    lines=st.sampled_from([1, 3, 8, 64]),
    macs_per_line=st.sampled_from([1, 8]),
    sorted_lists=st.booleans(),
    **{field: st.sampled_from([400, 900, 3000, 54272]) for field in BUFFERS},
)


schedules = st.builds(
    Schedule,
    assignment=st.sampled_from(ASSIGNMENTS),
    mappings_stepped=st.sampled_from([1, 9]),
    objective=st.sampled_from(OBJECTIVES),
    scratchpad=st.sampled_from(SCRATCHPADS),
    on_chip=st.sampled_from(ON_CHIP),
    latents=st.sampled_from(LATENTS),
    index_streams=st.sampled_from([1, 2]),
    index_encoding=st.sampled_from(list(ENCODINGS)),
    sparser_percent=st.sampled_from([50, 108]),
)


@st.composite
def calls(draw):
    """(rng, masks, codec shape, sizes): empty and full masks, rectangles, odd sizes."""
    queries = draw(st.integers(1, 22))
    keys = draw(st.one_of(st.just(queries), st.integers(1, 22)))
    heads = draw(st.sampled_from([1, 2, 4]))
    dims = draw(st.tuples(*2 * [st.sampled_from([1, 4, 8, 11])]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    keep = rng.random((heads, queries, keys)) < draw(st.sampled_from([0.0, 0.1, 0.4, 1.0]))
    if draw(st.booleans()):
        keep[:, rng.integers(queries)] = True
        keep[:, :, rng.integers(keys)] |= rng.random((heads, queries)) < 0.9
    least = draw(st.sampled_from([0, queries // 3, queries]))  # all global ... none global
    masks = draw(st.sampled_from([None, tuple(polarize_head(h, least) for h in keep)]))
    groups = draw(st.sampled_from([0, 1, 2]))
    codec = None
    if groups and heads % groups == 0:
        codec = HeadCodec(heads, draw(st.sampled_from([groups, heads])), groups)
    return rng, masks, codec, (heads, queries, keys, *dims)


def random_codec(rng, shape: HeadCodec) -> CodecWeights:
    inside, outside = shape.heads // shape.groups, shape.latent_heads // shape.groups
    return CodecWeights(
        shape,
        rng.standard_normal((shape.latent_heads, inside)),
        rng.standard_normal(shape.latent_heads),
        rng.standard_normal((shape.heads, outside)),
        rng.standard_normal(shape.heads),
    )


LOADS = (
    {},
    {"key_loads": "all"},
    {"index_loads": "each_instance"},
    {"query_loads": "per_key_tile"},
)


@pytest.mark.parametrize("codec", [None, HeadCodec(2, 1)], ids=["plain", "codec"])
@pytest.mark.parametrize("loads", LOADS, ids=str)
def test_what_is_loaded_when_changes_bytes_and_no_number(loads, codec):
    """Three images, in tiles of queries and keys."""
    rng = np.random.default_rng(2)
    q, k, v = (quantize(rng.standard_normal((3, 2, 40, 16))) for _ in range(3))
    keep = rng.random((2, 40, 40)) < 0.1
    keep[:, :, 0] = True
    masks = tuple(polarize_head(head, 20) for head in keep)
    mapping = UserMapping(1, 9, 11, whole_queries=False)
    weights = (random_codec(rng, codec), random_codec(rng, codec)) if codec else None

    def run(schedule):
        found = simulate_attention(q, k, v, masks, schedule=schedule, codecs=weights)
        rows = [row for row in found.cost.traffic if row.level == "dram"]
        return found, {row.tensor: row.read_bytes for row in rows}

    found, moved = run(Schedule(mapping=mapping, **loads))
    plain = plain_attention(
        q, k, v, masks, weights, Arithmetic(), score_shift=found.score_shift
    )  # fmt: skip
    assert np.array_equal(found.output.values, plain.values)
    usual = run(Schedule(mapping=mapping, key_loads="all", index_loads="each_instance"))[1]
    again = bool(loads.get("query_loads")) and not codec
    fewer = loads.get("key_loads") != "all" and not again
    assert (moved["K"] < usual["K"]) == (moved["V"] < usual["V"]) == fewer
    assert moved["Q"] == usual["Q"] * (4 if again else 1)
    if loads == {"key_loads": "all"}:
        assert usual["index"] == 3 * moved["index"]


def plain_attention(q, k, v, masks, codecs, arithmetic, **given):
    """The same by the plain function: masks dense, latents decoded before."""
    keep = None if masks is None else np.stack([mask.dense() for mask in masks])
    if codecs:
        q, k = (side.operands for side in coded_operands(q, k, codecs, arithmetic))
    return integer_attention(q, k, v, keep, arithmetic=arithmetic, **given)


@ALL
@given(
    calls(), machines, schedules, st.sampled_from([None, 1, 2]), st.booleans(),
    st.sampled_from([0, 500, 10**6]),
)  # fmt: skip
def test_the_schedule_gives_the_plain_result_bit_for_bit(
    call, hardware, schedule, images, biased, room
):
    rng, masks, shape, sizes = call
    batch = () if images is None else (images,)
    q, k, v = (
        quantize(np.stack(many).reshape(*batch, *many[0].shape))
        for many in zip(*(operands(rng, *sizes) for _ in range(images or 1)), strict=True)
    )
    codecs = tuple(random_codec(rng, shape) for _ in range(2)) if shape else None
    bias = rng.standard_normal(sizes[:3]) if biased else None
    try:
        found = simulate_attention(
            q, k, v, masks, hardware, codecs=codecs, bias=bias, schedule=schedule,
            on_chip_bytes=room,
        )  # fmt: skip
    except ValueError as error:
        assert "does not fit the machine" in str(error)  # noqa: PT017
        assume(False)
    assert found.score_shift.shape == (sizes[0],)
    plain = plain_attention(q, k, v, masks, codecs, arithmetic_of(hardware), bias=bias,
                            score_shift=found.score_shift)  # fmt: skip
    assert np.array_equal(found.output.values, plain.values)
    assert np.array_equal(found.output.scale, plain.scale)
    assert found.cost.details["scores_computed"] >= found.cost.details["scores_kept"]


def test_the_schedules_of_many_tiles_and_shared_passes_were_among_them():
    """The cases that the property must have met, each by name."""
    tight = Hardware(q_buffer_bytes=400, k_buffer_bytes=400, v_buffer_bytes=400, lines=8)
    rng = np.random.default_rng(1)
    keep = rng.random((2, 20, 20)) < 0.3
    keep[:, :, 4] = True
    masks = tuple(polarize_head(h, 10) for h in keep)
    long = Attention("call", 2, 60, 60, 8, 8)
    assert len(choose(long, tight, OLD).key_tiles) > 1
    assert len(choose(long, tight, OLD).query_tiles) > 1
    shared = Attention("call", 2, 20, 20, 8, 8, masks=masks, codec=HeadCodec(2, 1))
    assert choose(shared, presets["vitcod"], OLD).group == 2
    resident = choose(shared, presets["vitcod"], Schedule(latents="resident"), 1, 10**6)
    assert resident.resident_latents
    assert resident.kept.latents == 1
    assert not np.array_equal(masks[0].query_order, masks[1].query_order) or masks[0] != masks[1]


def test_heads_of_one_pass_with_unlike_orders_keep_all_queries_resident():
    keep = np.zeros((2, 24, 24), dtype=bool)
    keep[0, :, 20] = keep[1, :, 7] = True
    masks = tuple(polarize_head(h, 10) for h in keep)
    op = Attention("call", 2, 24, 24, 8, 8, masks=masks, codec=HeadCodec(2, 1))
    tight = replace(presets["vitcod"], q_buffer_bytes=24 * 16 - 1)
    assert max(made.group for made in candidates(op, presets["vitcod"], OLD)) == 2
    assert max(made.group for made in candidates(op, tight, OLD)) == 1
    in_order = tuple(polarize_head(h[:, :23], 10) for h in keep)  # queries do not move
    alike = replace(op, keys=23, masks=in_order)
    assert max(made.group for made in candidates(alike, tight, OLD)) == 2


def small_run(change, schedule=DEFAULT, codec=None, room=0):
    """A run whose program was damaged."""
    rng = np.random.default_rng(2)
    keep = rng.random((2, 12, 12)) < 0.4
    masks = tuple(polarize_head(head, 6) for head in keep)
    op = Attention("call", 2, 12, 12, 8, 8, masks=masks, codec=codec)
    mapping = choose(op, presets["vitcod"], schedule, 1, room)
    program, _ = build(mapping, 1)
    mapping, program = change(mapping, program)
    q, k, v = (quantize(x) for x in operands(rng, 2, 12, 12, 8, 8))
    rules = checked_rules(q, k, v, None, None, Arithmetic())
    sides, decoders = (q, k), (None, None)
    if codec:
        made = coded_operands(q, k, (random_codec(rng, codec), random_codec(rng, codec)))
        sides, decoders = [side.stored for side in made], tuple(side.decoder for side in made)
    memory = (*(side.values[None] for side in sides), v.values[None])
    return ProgramExecutor(mapping, program, memory, decoders, rules, None).all_stages()


def repeated_piece(mapping, program):
    pieces = program.pieces.copy()
    pieces[1] = pieces[0]
    return mapping, program._replace(pieces=pieces)


def early_values(mapping, program):
    scores = program.row_scores.copy()
    scores += 1  # a score that never comes
    return mapping, program._replace(row_scores=scores)


def transfer_with(channel, field, value):
    """The channel's first transfer with another value in a field."""

    def change(mapping, program):
        transfers = program.transfers.copy()
        transfers[field][program.channel_first[channel]] = value
        return mapping, program._replace(transfers=transfers)

    return change


def no_room(mapping, program):
    return replace(mapping, cut=mapping.cut._replace(v=12 * 8 - 1)), program


def lists_too_far(mapping, program):
    pieces = program.pieces.copy()
    pieces["place"][pieces["round"] >= 0] += program.list_entries - pieces["place"].max() - 1
    return mapping, program._replace(row_lists=program.row_lists * 0, pieces=pieces)


RESIDENT = {"schedule": Schedule(latents="resident"), "codec": HeadCodec(2, 1)}


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (repeated_piece, {}, "made twice"),
        (early_values, {}, "before its softmax"),
        (transfer_with(K, "token", 10**6), {}, "token 0 of channel 1 is not on chip"),
        (transfer_with(K, "token", 10**6), {"room": 10**6}, "channel 1 is not on chip"),
        (transfer_with(LATENT, "token", 1), RESIDENT, "of channel 6 is not on chip"),
        (transfer_with(LATENT, "release", 0), RESIDENT, "of channel 6 is not on chip"),
        (transfer_with(LATENT, "token", 1), RESIDENT | {"room": 10**6}, "of channel 6 is not"),
        (transfer_with(LATENT, "room", 10**6), RESIDENT, "channel 6 needs more than its region"),
        (no_room, {}, "channel 2 needs more than its region has"),
        (lists_too_far, {}, "a list is read beyond its keys"),
    ],
)
def test_a_wrong_schedule_is_noticed(change, arguments, message):
    small_run(lambda mapping, program: (mapping, program), **arguments)
    with pytest.raises(RuntimeError, match=message):
        small_run(change, **arguments)


# ---------------------------------------------------------------- against float


def test_real_masks_stay_near_float(golden):
    mask = AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy"))
    masks = tuple(polarize_head(head) for head in mask.keep[5])
    q, k, v = operands(np.random.default_rng(0), 3, 197, 197, 64, 64, 1.0)
    found = simulate_attention(q, k, v, masks)
    plain = integer_attention(quantize(q), quantize(k), quantize(v), mask.keep[5])
    assert np.array_equal(found.output.values, plain.values)
    assert 0 < found.relative_error < 0.05
    assert 0 < found.max_error < 0.15
    finer = replace(Arithmetic(), probability_bits=16)
    assert (
        simulate_attention(q, k, v, masks, arithmetic=finer).relative_error < found.relative_error
    )


def test_large_scores_are_held_coarser_instead_of_saturating():
    rng = np.random.default_rng(4)
    q, k, v = operands(rng, 2, 20, 20, 16, 16, 1.0)
    q[1], k[1, :3] = 20 * q[1], 20 * k[1, :3]  # scores up to some hundreds
    found = simulate_attention(q, k, v)
    stuck = simulate_attention(q, k, v, score_shift=0)
    assert found.score_shift[0] == 0 < found.score_shift[1]
    assert found.relative_error < 0.03 < stuck.relative_error
    with pytest.raises(ValueError, match=r"score_shift must lie in 0\.\.16, got 17"):
        simulate_attention(q, k, v, score_shift=17)


def test_a_codec_is_compared_with_the_same_codec_in_float():
    rng = np.random.default_rng(3)
    q, k, v = operands(rng, 4, 30, 30, 16, 16, 1.0)
    eye = np.eye(4)
    same = CodecWeights(HeadCodec(4, 4), eye, np.zeros(4), eye, np.zeros(4))
    plain, coded = (simulate_attention(q, k, v, codecs=c) for c in (None, (same, same)))
    assert np.allclose(plain.reference, coded.reference)
    assert coded.relative_error < 1.5 * plain.relative_error
    half = random_codec(rng, HeadCodec(4, 2))
    assert simulate_attention(q, k, v, codecs=(half, half)).relative_error < 0.35


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"operand_bits": 17}, "operand_bits must be an integer in 2..16, got 17"),
        ({"fraction_bits": 13}, "fraction_bits must be an integer in 0..12"),
        ({"score_bits": 8}, "below score_bits = 8"),
        ({"term_bits": True}, "term_bits"),
    ],
)
def test_bad_widths_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Arithmetic(**fields)


def test_operands_that_do_not_fit_are_named():
    good = Quantized(np.ones((1, 3, 8), int), 1.0)
    with pytest.raises(ValueError, match=r"k must lie in -127\.\.127, it reaches 128"):
        integer_attention(good, Quantized(np.full((1, 3, 8), -128), 1.0), good)
    with pytest.raises(ValueError, match="do not fit"):
        integer_attention(good, Quantized(np.ones((1, 3, 7), int), 1.0), good)
    with pytest.raises(ValueError, match="keep is bool"):
        integer_attention(good, good, good, np.ones((1, 3, 4), bool))
    with pytest.raises(ValueError, match="softmax sums of 3 keys reach 196605"):
        integer_attention(good, good, good, arithmetic=Arithmetic(accumulator_bits=18))
    with pytest.raises(ValueError, match="scales must be positive"):
        Quantized(good.values, 0.0)
    with pytest.raises(ValueError, match="values are integers"):
        Quantized(np.ones((1, 3, 8)), 1.0)
    with pytest.raises(ValueError, match="codec's sums reach"):
        quantize_head_map(
            np.ones((1, 2)), np.full(1, 1e12), HeadCodec(2, 1), np.ones(2), np.ones(1)
        )
