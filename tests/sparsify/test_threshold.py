"""Mask rules against their naive twins, the golden maps and their invariants."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.sparsify import threshold

quick = settings(derandomize=True, deadline=None, max_examples=40)


def softmax_maps(seed: int, *shapes: tuple[int, int, int], ties: bool = False):
    generator = np.random.default_rng(seed)
    maps = []
    for shape in shapes:
        scores = generator.integers(0, 3, shape) if ties else 2 * generator.standard_normal(shape)
        weights = np.exp(scores)
        maps.append((weights / weights.sum(-1, keepdims=True)).astype(np.float32))
    return tuple(maps)


def naive_information(row: np.ndarray, theta: float) -> list[int]:
    """Indices kept, one row at a time: largest first until the sum reaches theta."""
    order = sorted(range(len(row)), key=lambda j: (-row[j], j))
    total, kept = 0.0, []
    for j in order:
        kept.append(j)
        total += float(row[j])
        if total >= theta:
            break
    return sorted(kept)


@quick
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(1, 12),
    theta=st.floats(0.01, 1.0),
    ties=st.booleans(),
)
def test_information_equals_its_naive_twin(seed, tokens, theta, ties):
    maps = softmax_maps(seed, (2, tokens, tokens + 2), ties=ties)
    mask = threshold(maps, theta=theta, prefix_tokens=0)
    for head in range(2):
        for query in range(tokens):
            kept = np.flatnonzero(mask.keep[0][head, query]).tolist()
            assert kept == naive_information(maps[0][head, query], theta)


@quick
@given(seed=st.integers(0, 999), low=st.floats(0.01, 0.99), ties=st.booleans())
def test_larger_theta_never_prunes_more(seed, low, ties):
    maps = softmax_maps(seed, (2, 9, 9), ties=ties)
    less, more = threshold(maps, theta=low), threshold(maps, theta=min(1.0, low + 0.1))
    assert np.all(more.keep[0] | ~less.keep[0])


@quick
@given(seed=st.integers(0, 999), theta=st.floats(0.01, 0.99), prefix=st.integers(0, 3))
def test_rows_reach_theta_and_prefix_stays(seed, theta, prefix):
    maps = softmax_maps(seed, (2, 9, 9))
    keep = threshold(maps, theta=theta, prefix_tokens=prefix).keep[0]
    assert keep[:, :prefix].all()
    assert keep[:, :, :prefix].all()
    sums = np.where(keep, maps[0].astype(np.float64), 0).sum(-1)
    assert np.all(sums >= theta - 1e-12)


@quick
@given(seed=st.integers(0, 999), sparsity=st.floats(0.0, 0.8), ties=st.booleans())
def test_sparsity_is_the_nearest_that_one_theta_reaches(seed, sparsity, ties):
    maps = softmax_maps(seed, (2, 10, 10), (3, 10, 10), ties=ties)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reached = threshold(maps, sparsity=sparsity).sparsity
    sums = np.concatenate([_sums_before(m, 1) for m in maps])
    steps = np.unique(np.concatenate([sums[sums > 0], [1.0]]))
    possible = [threshold(maps, theta=float(t)).sparsity for t in steps if t <= 1.0]
    best = min(abs(p - sparsity) for p in possible)
    assert abs(reached - sparsity) <= best + 1 / (5 * 100)  # rounding of the wanted count


def _sums_before(layer: np.ndarray, prefix: int) -> np.ndarray:
    result = []
    for row in layer[:, prefix:].reshape(-1, layer.shape[-1]):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        total = 0.0
        for j in order:
            if j >= prefix:
                result.append(total)
            total += float(row[j])
    return np.array(result)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.8, 0.9])
def test_sparsity_is_close_on_smooth_maps(sparsity):
    maps = softmax_maps(3, (3, 65, 65), (3, 65, 65))
    assert threshold(maps, sparsity=sparsity).sparsity == pytest.approx(sparsity, abs=1e-3)


def test_an_unreachable_sparsity_warns_with_the_value():
    with pytest.warns(UserWarning, match=r"0\.9900 cannot be reached; the nearest is 0\.7200"):
        threshold(softmax_maps(0, (1, 10, 10)), sparsity=0.99)


def test_released_masks_are_bit_exact(golden):
    stored = np.load(golden("golden/vitcod_algorithm.npz"))
    mask = threshold(tuple(stored["avg_attention"]), theta=0.5, released=True)
    keep = np.stack(mask.keep)
    assert np.array_equal(~keep, stored["mask_cut0.5"])
    assert np.array_equal(keep.sum(axis=2), stored["kept_per_key_cut0.5"])


@quick
@given(seed=st.integers(0, 999), theta=st.floats(0.05, 0.95))
def test_released_keeps_one_entry_more_in_each_free_row(seed, theta):
    maps = softmax_maps(seed, (2, 11, 11))
    plain = threshold(maps, theta=theta, prefix_tokens=0).keep[0]
    more = threshold(maps, theta=theta, prefix_tokens=0, released=True).keep[0]
    assert np.all(more | ~plain)
    assert np.array_equal(more.sum(-1), np.minimum(plain.sum(-1) + 1, 11))


def test_theta_by_layer():
    maps = softmax_maps(1, (2, 8, 8), (2, 4, 8))
    both = threshold(maps, theta=[0.3, 0.9], prefix_tokens=0)
    for layer, theta in enumerate((0.3, 0.9)):
        alone = threshold(maps[layer : layer + 1], theta=theta, prefix_tokens=0)
        assert np.array_equal(both.keep[layer], alone.keep[0])


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.9])
def test_ratio_prunes_by_ascending_rank(sparsity):
    maps = softmax_maps(2, (2, 7, 10))
    keep = threshold(maps, "ratio", sparsity=sparsity, prefix_tokens=0).keep[0]
    for row, kept in zip(maps[0].reshape(-1, 10), keep.reshape(-1, 10), strict=True):
        rank = [sorted(row.tolist()).index(v) for v in row.tolist()]
        assert kept.tolist() == [r >= sparsity * 10 for r in rank]


def test_quota_gives_each_head_its_own_sparsity():
    maps = softmax_maps(4, (2, 40, 40), (3, 40, 40))
    wanted = [[0.5, 0.8], [0.3, 0.6, 0.85]]
    mask = threshold(maps, "quota", sparsity=wanted)
    for got, row in zip(mask.sparsity_by_head(), wanted, strict=True):
        assert got == pytest.approx(row, abs=2e-3)
    with pytest.raises(ValueError, match=r"\[2, 3\] heads by layer"):
        threshold(maps, "quota", sparsity=[[0.5], [0.5]])


def test_random_controls():
    maps = softmax_maps(5, (2, 30, 30), (2, 15, 30))
    learned = threshold(maps, sparsity=0.7)
    uniform = threshold(maps, "random", sparsity=learned.sparsity)
    assert uniform.kept == learned.kept
    rows = threshold(maps, "random", like=learned)
    for a, b in zip(rows.keep, learned.keep, strict=True):
        assert np.array_equal(a.sum(-1), b.sum(-1))
        assert a[:, 0].all()
        assert a[:, :, 0].all()
        assert not np.array_equal(a, b)
    assert threshold(maps, "random", sparsity=0.5, seed=1) == threshold(
        maps, "random", sparsity=0.5, seed=1
    )
    assert threshold(maps, "random", sparsity=0.5, seed=1) != threshold(
        maps, "random", sparsity=0.5, seed=2
    )


def test_uniform_random_gives_each_free_entry_the_same_chance():
    maps = softmax_maps(6, (4, 50, 50))
    keep = threshold(maps, "random", sparsity=0.6).keep[0][:, 1:, 1:]
    share = keep.mean()
    rows, columns = keep.mean(axis=(0, 2)), keep.mean(axis=(0, 1))
    deviation = (share * (1 - share) / (4 * 49)) ** 0.5
    assert np.abs(rows - share).max() < 4 * deviation
    assert np.abs(columns - share).max() < 4 * deviation


def test_window_keeps_the_nearest_keys():
    maps = softmax_maps(7, (2, 1 + 12, 1 + 12))
    learned = threshold(maps, sparsity=0.5)
    window = threshold(maps, "window", like=learned, grid=(3, 4)).keep[0]
    assert np.array_equal(window.sum(-1), learned.keep[0].sum(-1))
    places = [(i // 4, i % 4) for i in range(12)]
    for head in range(2):
        for query in range(12):
            far = [(r - places[query][0]) ** 2 + (c - places[query][1]) ** 2 for r, c in places]
            kept = window[head, query + 1, 1:]
            inside = [d for d, k in zip(far, kept, strict=True) if k]
            outside = [d for d, k in zip(far, kept, strict=True) if not k]
            assert max(inside, default=0) <= min(outside, default=99)
            assert window[head, query + 1, 0]


def test_window_of_a_subsampling_layer():
    maps = softmax_maps(8, (2, 4, 16))  # 4 x 4 keys, every second row and column queries
    like = threshold(maps, sparsity=0.625, prefix_tokens=0)
    window = threshold(maps, "window", like=like, grid=(4, 4), prefix_tokens=0)
    for query, key in enumerate((0, 2, 8, 10)):
        assert window.keep[0][:, query, key].all()  # its own place is nearest
    with pytest.raises(ValueError, match="3 x 3"):
        threshold(maps, "window", like=like, grid=(3, 3), prefix_tokens=0)


bad_arguments = {
    "theta above one": ({"theta": 1.5}, "1.5"),
    "theta zero": ({"theta": 0.0}, "0.0"),
    "sparsity one": ({"sparsity": 1.0}, "1.0"),
    "sparsity negative": ({"sparsity": -0.1}, "-0.1"),
    "both": ({"theta": 0.5, "sparsity": 0.5}, "theta or sparsity"),
    "neither": ({}, "theta or sparsity"),
    "unknown rule": ({"rule": "best", "theta": 0.5}, "best"),
    "stray argument": ({"rule": "ratio", "sparsity": 0.5, "grid": (1, 1)}, "grid"),
    "prefix too long": ({"theta": 0.5, "prefix_tokens": 9}, "9"),
    "window without grid": ({"rule": "window"}, "like"),
}


@pytest.mark.parametrize("name", bad_arguments)
def test_bad_arguments_are_named(name):
    arguments, message = bad_arguments[name]
    with pytest.raises(ValueError, match=message):
        threshold(softmax_maps(0, (1, 8, 8)), **arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.25])
def test_bad_values_in_the_maps_are_named_with_their_place(value):
    maps = softmax_maps(0, (2, 8, 8), (2, 8, 8))
    maps[1][1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"maps\[1\] holds {value} at .* = \(1, 2, 3\)"):
        threshold(maps, theta=0.5)


def naive_blocks(layer: np.ndarray, theta: float, block: tuple[int, int], prefix: int):
    """Rows of blocks, one block after the other by mass an entry."""
    heads, queries, keys = layer.shape

    def spans(tokens, size):
        singles = [(i, i + 1) for i in range(prefix)]
        return singles + [(i, min(i + size, tokens)) for i in range(prefix, tokens, size)]

    keep = np.zeros(layer.shape, dtype=bool)
    for head in range(heads):
        for top, bottom in spans(queries, block[0]):
            rows = layer[head, top:bottom].astype(np.float64)
            blocks = [(rows[:, a:b].mean(), -a, a, b) for a, b in spans(keys, block[1])]
            total = 0.0
            for _, _, a, b in sorted(blocks, reverse=True):
                if total >= theta:
                    break
                keep[head, top:bottom, a:b] = True
                total += rows[:, a:b].sum() / (bottom - top)
    keep[:, :prefix] = True
    keep[:, :, :prefix] = True
    return keep


@pytest.mark.parametrize("block", [(4, 1), (3, 5), (32, 1), (1, 1)])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_blocks_are_kept_or_pruned_as_one(block, prefix):
    generator = np.random.default_rng(0)
    layer = generator.random((2, 19, 23))
    layer /= layer.sum(-1, keepdims=True)
    for theta in (0.3, 0.7, 1.0):
        got = threshold([layer], theta=theta, granularity=block, prefix_tokens=prefix)
        assert np.array_equal(got.keep[0], naive_blocks(layer, theta, block, prefix))


def test_blocks_reach_a_sparsity_and_bad_ones_are_named():
    generator = np.random.default_rng(1)
    layer = generator.random((2, 65, 65)) ** 8
    layer /= layer.sum(-1, keepdims=True)
    mask = threshold([layer], sparsity=0.8, granularity=(8, 1))
    assert mask.sparsity == pytest.approx(0.8, abs=0.003)
    assert (mask.keep[0][:, 1:9] == mask.keep[0][:, 1:2]).all()
    for wrong in ((0, 1), (1,), (2.0, 1)):
        with pytest.raises(ValueError, match="granularity is"):
            threshold([layer], sparsity=0.8, granularity=wrong)
    with pytest.raises(ValueError, match="takes no granularity"):
        threshold([layer], "ratio", sparsity=0.8, granularity=(2, 1))
    with pytest.raises(ValueError, match="keeps single entries"):
        threshold([layer], theta=0.8, granularity=(2, 1), released=True)
