"""A call is refused only where no mapping fits, and the refusal names the least that would do."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.accel.hardware import Hardware, presets
from sievit.accel.schedule import ASSIGNMENTS, LATENTS, SCRATCHPADS, Schedule, UserMapping
from sievit.accel.vitcod.estimate import WorkOfTiles
from sievit.accel.vitcod.mapper import candidates, choose
from sievit.accel.vitcod.mapping import Mapping
from sievit.accel.vitcod.needs import shortages
from sievit.accel.vitcod.pattern import patterns_of
from sievit.accel.vitcod.regions import Cut
from sievit.accel.vitcod.run import run_attention
from sievit.workload import Attention, HeadCodec, polarize_head

many = settings(derandomize=True, deadline=None, max_examples=150)

BUFFERS = [name for name in Hardware.__dataclass_fields__ if name.endswith("_buffer_bytes")]


@st.composite
def calls(draw):
    """Calls so small that all their mappings can be counted out."""
    heads, queries, keys = (draw(st.integers(1, most)) for most in (2, 5, 5))
    dims = draw(st.tuples(st.sampled_from([4, 20]), st.sampled_from([4, 20])))
    keep = np.random.default_rng(draw(st.integers(0, 999))).random((heads, queries, keys)) < 0.5
    masks = draw(st.sampled_from([None, tuple(polarize_head(h, 0.5) for h in keep)]))
    codec = draw(st.sampled_from([None, HeadCodec(heads, 1), HeadCodec(heads, heads, heads)]))
    return Attention("call", heads, queries, keys, *dims, masks=masks, codec=codec)


machines = st.builds(
    Hardware,
    lines=st.sampled_from([1, 3, 64]),
    **{name: st.integers(1, 400) for name in BUFFERS},
)
schedules = st.builds(
    Schedule,
    assignment=st.sampled_from(ASSIGNMENTS),
    scratchpad=st.sampled_from(SCRATCHPADS),
    latents=st.sampled_from(LATENTS),
    index_streams=st.sampled_from([1, 2]),
)


def fits_somehow(op, hardware, schedule, repeated):
    """Whether any mapping at all fits: all groups, tiles, orders, regions, places, lines."""
    patterns, cut = patterns_of(op), Cut.fixed(hardware)
    block = op.heads // op.codec.groups if op.codec else 1
    groups = [group for group in range(1, block + 1) if block % group == 0]
    lines = sorted({1, 2, hardware.lines // 2, hardware.lines} - {0})
    for used in (count for count in lines if count <= hardware.lines):
        work = WorkOfTiles(op, patterns, used)
        for group, query, key, whole, ahead, regions, resident in product(
            groups, range(1, op.queries + 1), range(1, op.keys + 1), (False, True),
            (False, True), (1, 2), (False, True),
        ):  # fmt: skip
            whole_keys = key == op.keys
            if (group > 1 or resident) and not whole_keys:
                continue
            if resident and (op.codec is None or group > 1 or schedule.latents == "fill"):
                continue
            if not resident and op.codec and schedule.latents == "resident":
                continue
            if group > 1 and not work.in_order and not whole:
                continue
            made = Mapping(
                op, hardware, schedule, patterns, group, query, key, whole, ahead, regions, cut,
                resident_latents=resident, repeated=repeated,
            ).using(lines=used)  # fmt: skip
            if not shortages(made, work):
                return True
    return False


def given_what_is_asked(hardware, refusal):
    """The machine with as many bytes as the refusal asks for."""
    for names, size in re.findall(r"([\w +]+) is \d+, one pass needs at least (\d+)", refusal):
        first, *others = names.strip().split(" + ")
        rest = sum(getattr(hardware, name) for name in others)
        if int(size) <= rest:  # all of the scratchpad counts: take it from the others
            hardware = replace(hardware, **dict.fromkeys(others, 1))
            rest = len(others)
        hardware = replace(hardware, **{first: int(size) - rest})
    return hardware


def refusal_of(op, hardware, schedule, instances):
    """What the mapper says where it refuses; None where it does not."""
    try:
        choose(op, hardware, schedule, instances)
    except ValueError as error:
        return str(error)
    return None


@many
@given(calls(), machines, schedules, st.sampled_from([1, 2]))
def test_what_is_refused_cannot_be_mapped_and_all_else_is(op, hardware, schedule, instances):
    refused = refusal_of(op, hardware, schedule, instances)
    assert (refused is None) == fits_somehow(op, hardware, schedule, instances > 1)


@many
@given(calls(), machines, schedules, st.sampled_from([1, 2]))
def test_a_refusal_names_the_least_that_would_do(op, hardware, schedule, instances):
    refused = refusal_of(op, hardware, schedule, instances)
    if refused is None:
        return
    enough = given_what_is_asked(hardware, refused)
    assert run_attention(op, enough, instances, schedule).cycles > 0
    for field in BUFFERS:
        asked, size = getattr(enough, field), getattr(hardware, field)
        if asked > max(size, 1):
            assert refusal_of(op, replace(enough, **{field: asked - 1}), schedule, instances)


@many
@given(calls(), machines, schedules, st.sampled_from([1, 2]), st.sampled_from([*BUFFERS, "lines"]))
def test_more_never_makes_a_call_refused(op, hardware, schedule, instances, field):
    if refusal_of(op, hardware, schedule, instances) is None:
        for times in (2, 3, 50):
            more = replace(hardware, **{field: times * getattr(hardware, field)})
            assert refusal_of(op, more, schedule, instances) is None


@pytest.mark.parametrize(("tokens", "streams"), [(1000, 1), (1000, 2), (6000, 2)])
def test_larger_buffers_for_many_tokens_are_neither_refused_nor_slower(tokens, streams):
    """A diagonal mask: as many columns as tokens, each with a start in IdxBuf."""
    mask = polarize_head(np.eye(tokens, dtype=bool), "none")
    op = Attention("diagonal", 1, tokens, tokens, 64, 64, masks=(mask,))
    schedule = Schedule(index_streams=streams, objective="cycles")
    cycles = []
    for kilobytes in (53, 212, 424):
        sizes = {"k_buffer_bytes": kilobytes * 1024, "v_buffer_bytes": kilobytes * 1024}
        cycles.append(run_attention(op, replace(presets["vitcod"], **sizes), 1, schedule).cycles)
    assert all(b <= 1.03 * a for a, b in pairwise(cycles)), cycles


def test_two_windows_of_one_head_need_room_for_two_units():
    """The scores of the next window come before the values of this one."""
    op = Attention("windows", 1, 64, 64, 16, 16, windows=3)
    small = replace(presets["vitcod"], output_buffer_bytes=64 * 64 * 2 + 2 * 64 * 16 * 4)
    run = run_attention(op, small, 1, Schedule(objective="cycles"))
    assert not (run.mapping.ahead and run.mapping.query_tile == 64)
    alone = run_attention(replace(op, windows=1), small, 1, Schedule(mapping=UserMapping()))
    assert alone.mapping.ahead
    with pytest.raises(ValueError, match=r"output_buffer_bytes is .*, it needs"):
        run_attention(op, small, 1, Schedule(mapping=UserMapping()))


def test_the_index_of_two_windows_of_one_head_does_not_stand_in_its_own_way():
    """Once a fault: room was found for one unit's lists where two wait."""
    keep = np.random.default_rng(0).random((130, 120)) < 0.2
    keep[:, 0] = keep[0] = True
    for threshold in (0.5, "all", "none", 0.8):
        masks = (polarize_head(keep, threshold),)
        op = Attention("windows", 1, 130, 120, 16, 16, windows=2, masks=masks)
        for size in range(300, 2300, 200):
            hardware = Hardware(lines=8, macs_per_line=1, index_buffer_bytes=size)
            for made in candidates(op, hardware, Schedule(), 2)[:3]:
                asked = UserMapping(
                    made.group, made.query_tile, made.key_tile, made.whole_queries, made.ahead,
                    made.output_regions,
                )  # fmt: skip
                if made.idle_lines == 0:
                    assert run_attention(op, hardware, 1, Schedule(mapping=asked)).cycles > 0
