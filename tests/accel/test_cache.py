"""Index lists and assignments are made once for equal content, and never mixed up."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from sievit.accel import Hardware, Schedule, presets, simulate
from sievit.accel.cache import LruCache
from sievit.accel.schedule import UserMapping
from sievit.accel.vitcod import coded, mapper, pattern, threshold
from sievit.workload import Attention, AttentionMask, Workload, polarize_head

REMEMBERED = (
    pattern.ASSIGNMENTS,
    pattern.PATTERNS,
    mapper.WORK,
    coded.CODED,
    threshold.POLARIZED,
    threshold.CHOSEN,
)


@pytest.fixture(autouse=True)
def _forget():
    _clear()
    yield
    _clear()


def _clear() -> None:
    for kept in REMEMBERED:
        kept.clear()


def _workload(seed: int = 0, keys: int = 24) -> Workload:
    generator = np.random.default_rng(seed)
    keep = generator.random((2, 20, keys)) < 0.3
    keep[:, :, 0] = True
    heads = tuple(polarize_head(head, 12) for head in AttentionMask((keep,)).keep[0])
    return Workload("tiny", (Attention("a", 2, 20, keys, 12, 16, masks=heads),))


def _other(name: str, value: object) -> object:
    """An allowed value that differs from the default."""
    if isinstance(value, str):
        allowed = {
            "dram_model": "ddr4",
            "dram_map": "rows_interleaved",
        }
        return allowed.get(name)
    if isinstance(value, bool):
        return not value
    return value * 2 if value else 1


FIELDS = [item.name for item in fields(Hardware) if item.name != "name"]


@pytest.mark.parametrize("field", FIELDS)
def test_what_is_remembered_does_not_change_a_figure(field):
    value = _other(field, getattr(presets["vitcod"], field))
    if value is None:
        pytest.skip(f"{field} has no second value here")
    workload, small = _workload(), replace(presets["vitcod"], lines=6)
    changed = replace(small, **{field: 9 if field == "lines" else value})
    fresh = simulate(workload, changed).to_dict()
    _clear()
    simulate(workload, small)
    assert simulate(workload, changed).to_dict() == fresh


@pytest.mark.parametrize(
    "changes",
    [{"assignment": "lockstep"}, {"mappings_stepped": 3}, {"mapping": UserMapping(ahead=False)}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_remembered_of_one_schedule_is_not_taken_for_another(changes):
    workload, small = _workload(), replace(presets["vitcod"], lines=6)
    changed = Schedule(**changes)
    fresh = simulate(workload, small, schedule=changed).to_dict()
    _clear()
    simulate(workload, small)
    assert simulate(workload, small, schedule=changed).to_dict() == fresh


def test_tiles_are_shared_by_content():
    small = replace(presets["vitcod"], lines=6)
    first = simulate(_workload(), small)
    made = coded.CODED.misses
    assert made == pattern.ASSIGNMENTS.misses > 0
    found = coded.CODED.hits
    again = simulate(_workload(), replace(small, dram_latency_cycles=99))  # equal, not the same
    assert coded.CODED.misses < 2 * made  # where other mappings are stepped
    assert coded.CODED.hits > 2 * found
    assert again.attention_cycles > first.attention_cycles
    simulate(_workload(seed=1), small)
    assert coded.CODED.misses > made


def test_digest_names_the_content():
    generator = np.random.default_rng(3)
    keep = generator.random((9, 7)) < 0.5
    one, same = polarize_head(keep, 4), polarize_head(keep.copy(), 4)
    assert one.digest == same.digest
    digests = {one.digest}
    for row in range(9):
        for key in range(7):
            other = keep.copy()
            other[row, key] ^= True
            digests.add(polarize_head(other, 4).digest)
    digests.add(polarize_head(keep, 5).digest)  # other global keys may still be the same
    assert len(digests) in (64, 65)
    assert polarize_head(np.ones((2, 3), bool), 5).digest != (
        polarize_head(np.ones((3, 2), bool), 5).digest
    )


def test_oldest_goes_first_and_large_results_are_not_kept():
    kept = LruCache(100)
    for key in "abcd":
        kept.get(key, lambda key=key: key, lambda made: 25)
    assert kept.get("a", lambda: "new", lambda made: 25) == "a"
    kept.get("e", lambda: "e", lambda made: 25)  # "b" is the oldest now
    assert kept.get("a", lambda: "new", lambda made: 25) == "a"
    assert kept.get("b", lambda: "new", lambda made: 25) == "new"
    assert kept.held_bytes == 100
    assert kept.get("large", lambda: 1, lambda made: 26) == 1
    assert kept.get("large", lambda: 2, lambda made: 26) == 2
