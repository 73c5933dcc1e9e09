"""Every kind of threshold, on any mask: which keys it names, the same integers under each, and
what a report says of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.accel import Schedule, presets, simulate, simulate_attention
from sievit.accel.vitcod.simulate import attention_cost
from sievit.accel.vitcod.threshold import TRIED
from sievit.sparsify import polarize
from sievit.workload import Attention, AttentionMask, Workload, polarize_head
from sievit.workload.masks import kept_by

SMALL = replace(presets["vitcod"], lines=8, q_banks=4, k_banks=4, v_banks=4)

thresholds = st.one_of(
    st.integers(0, 30), st.floats(0.01, 0.99), st.sampled_from(["all", "none", 0.5, 1.0 - 1e-9])
)


@st.composite
def keeps(draw, square=False):
    """bool [heads, queries, keys]: empty, full and rectangular ones, columns of any fullness."""
    heads, queries = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    keys = queries if square else draw(st.one_of(st.just(queries), st.integers(1, 24)))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    fullness = rng.random((heads, 1, keys)) ** draw(st.sampled_from([0.0, 0.3, 1.0, 4.0, 99.0]))
    return rng.random((heads, queries, keys)) < fullness


def global_naive(head: np.ndarray, threshold) -> list[int]:
    """The keys that the rule names, key by key."""
    queries, keys = head.shape
    found = []
    for key in range(keys):
        kept = sum(bool(head[query, key]) for query in range(queries))
        if threshold == "all":
            named = kept == queries
        elif threshold == "none":
            named = False
        elif isinstance(threshold, float):
            named = kept > threshold * queries
        else:
            named = kept > threshold
        found += [key] * named
    return found


@settings(derandomize=True, deadline=None, max_examples=200)
@given(keeps(), thresholds)
def test_exactly_the_keys_that_the_rule_names_are_global(keep, threshold):
    made = polarize(AttentionMask((keep,), threshold))
    assert made == polarize(AttentionMask((keep,)), threshold)
    for head, mask in zip(keep, made[0], strict=True):
        assert sorted(mask.key_order[: mask.num_global]) == global_naive(head, threshold)
        assert np.array_equal(mask.dense(), head)
        assert mask.global_threshold == threshold
        assert mask == polarize_head(head, threshold)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(keeps(), st.lists(thresholds, min_size=1, max_size=4))
def test_the_integers_are_the_same_under_each_threshold(keep, rules):
    heads, queries, keys = keep.shape
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((heads, n, 8)) for n in (queries, keys, keys))
    masks = polarize(AttentionMask((keep,)))[0]
    plain = simulate_attention(q, k, v, masks, SMALL).output
    for rule in (*rules, "best"):
        schedule = Schedule(global_threshold=rule)
        found = simulate_attention(q, k, v, masks, SMALL, schedule=schedule)
        assert np.array_equal(found.output.values, plain.values)
        assert np.array_equal(found.output.scale, plain.scale)
        if rule != "best":
            again = polarize(AttentionMask((keep,), rule))[0]
            assert found.cost == simulate_attention(q, k, v, again, SMALL).cost
            for head, cost in zip(keep, found.cost.heads, strict=True):
                assert cost.global_keys == len(global_naive(head, rule))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(keeps(), thresholds, st.one_of(st.none(), st.just("best"), thresholds))
def test_the_report_says_which_rule_was_used(keep, own, asked):
    mask = AttentionMask((keep,), own)
    (shape,) = mask.shapes
    op = Attention("call", *shape, 8, 8)
    workload = Workload("w", (op,)).with_attention(mask)
    schedule = Schedule(global_threshold=asked)
    report = simulate(workload, SMALL, schedule=schedule)
    assert attention_cost(workload.attention[0], SMALL, 1, schedule) == report.ops[0]
    for head, cost in zip(keep, report.ops[0].heads, strict=True):
        rule = cost.global_threshold
        assert rule in TRIED if asked == "best" else rule == (own if asked is None else asked)
        assert cost.global_keys == len(global_naive(head, rule))
    rules = [head.global_threshold for head in report.ops[0].heads]
    assert sorted(map(str, report.global_thresholds)) == sorted({str(rule) for rule in rules})
    assert report.to_dict()["global_thresholds"] == list(report.global_thresholds)
    plain = simulate(workload, SMALL, "vitcod_plain")
    assert plain.global_thresholds == ("none",)


def test_rules_in_words():
    words = {
        50: "kept by more than 50 queries",
        0.5: "kept by more than 0.5 of the queries",
        "all": "kept by every query",
        "none": "none wanted",
        None: "as the masks have them",
    }
    assert {rule: kept_by(rule) for rule in words} == words
    assert simulate(Workload("w", (Attention("a", 1, 4, 4, 8, 8),)), SMALL).global_thresholds == ()
