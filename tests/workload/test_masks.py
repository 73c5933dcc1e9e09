"""Masks and polarization: round trips, the published counts, files."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sievit.sparsify import polarize
from sievit.workload import (
    PUBLISHED_GLOBAL_THRESHOLD,
    AttentionMask,
    PolarizedMask,
    polarize_head,
)

quick = settings(derandomize=True, deadline=None, max_examples=60)
heads = st.tuples(st.integers(1, 24), st.integers(1, 24)).flatmap(lambda s: arrays(np.bool_, s))


def naive_order(keep: np.ndarray, min_kept: float) -> list[int]:
    """Sequential swaps, as the paper's script words it."""
    order = list(range(keep.shape[1]))
    globals_ = [j for j in range(keep.shape[1]) if sum(keep[:, j].tolist()) > min_kept]
    for i, j in enumerate(globals_):
        order[i], order[j] = order[j], order[i]
    return order


@quick
@given(keep=heads, min_kept=st.integers(0, 24))
def test_polarize_is_lossless_and_follows_the_swaps(keep, min_kept):
    head = polarize_head(keep, min_kept)
    assert np.array_equal(head.dense(), keep)
    assert head.key_order.tolist() == naive_order(keep, min_kept)
    square = keep.shape[0] == keep.shape[1]
    expected = head.key_order if square else np.arange(keep.shape[0])
    assert np.array_equal(head.query_order, expected)
    assert head.num_global == sum(keep.sum(axis=0) > min_kept)
    assert head.kept == keep.sum()
    assert head.computed == keep.shape[0] * head.num_global + head.sparser_kept
    assert np.array_equal(head.query_order[head.query_position], np.arange(head.queries))
    bits = np.unpackbits(head.bitmap, count=head.global_keep.size).astype(bool)
    assert np.array_equal(bits.reshape(head.global_keep.shape), head.global_keep)


@quick
@given(keep=heads, min_kept=st.integers(0, 24))
def test_rows_are_the_sparser_part_transposed(keep, min_kept):
    head = polarize_head(keep, min_kept)
    rest = head.reordered()[:, head.num_global :]
    indptr, columns = head.rows
    got = [columns[a:b].tolist() for a, b in pairwise(indptr)]
    assert got == [np.flatnonzero(row).tolist() for row in rest]


@pytest.mark.parametrize("tokens", [1, 197, 257, 577])
def test_any_token_count(tokens):
    keep = np.random.default_rng(tokens).random((tokens, tokens)) < 0.2
    keep[:, 0] = True
    assert np.array_equal(polarize_head(keep, 50).dense(), keep)


def test_share_of_queries_is_strict():
    keep = np.zeros((4, 3), dtype=bool)
    keep[:2, 0] = keep[:3, 1] = True
    assert polarize_head(keep, 0.5).num_global == 1  # 3 of 4 is more than half, 2 of 4 is not
    assert polarize_head(keep, 2).num_global == 1


@pytest.mark.parametrize("min_kept", [-1, 0.0, 1.0, 1.5, True])
def test_min_kept_out_of_range_names_the_value(min_kept):
    with pytest.raises(ValueError, match=str(min_kept)):
        polarize_head(np.ones((2, 2), dtype=bool), min_kept)


def test_published_masks_give_the_published_global_tokens(golden):
    mask = AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy"))
    published = np.load(golden("vitcod-deit-tiny-masks/global_token_info_0.95.npy"))
    assert mask.kept == 74_399
    polarized = polarize(mask, PUBLISHED_GLOBAL_THRESHOLD)
    assert [[h.num_global for h in layer] for layer in polarized] == published.tolist()
    for layer, keep in zip(polarized, mask.keep, strict=True):
        assert np.array_equal(np.stack([h.dense() for h in layer]), keep)


def test_mask_file_round_trip_with_unequal_layers(tmp_path):
    generator = np.random.default_rng(0)
    shapes = ((3, 7, 7), (4, 2, 9))
    mask = AttentionMask(tuple(generator.random(s) < 0.5 for s in shapes))
    mask.save(tmp_path / "mask.npz")
    assert AttentionMask.load(tmp_path / "mask.npz") == mask
    assert [p.name for p in tmp_path.iterdir()] == ["mask.npz"]


def test_vitcod_file_is_inverted(tmp_path):
    pruned = np.random.default_rng(1).random((2, 3, 5, 5)) < 0.8
    np.save(tmp_path / "info.npy", pruned)
    mask = AttentionMask.load(tmp_path / "info.npy")
    assert mask.sparsity == pytest.approx(pruned.mean())


@pytest.mark.parametrize("content", [b"", b"not a mask", b"PK\x03\x04broken"])
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_broken_files_are_one_clear_error(tmp_path, content, suffix):
    path = tmp_path / f"mask{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        AttentionMask.load(path)


def test_pickled_objects_are_refused(tmp_path):
    np.save(tmp_path / "mask.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"mask\.npy"):
        AttentionMask.load(tmp_path / "mask.npy")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    mask = AttentionMask((np.ones((1, 2, 2), dtype=bool),))
    mask.save(tmp_path / "mask.npz")
    before = (tmp_path / "mask.npz").read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        mask.save(tmp_path / "mask.npz")
    assert (tmp_path / "mask.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "layer", [np.ones((2, 2), bool), np.ones((1, 2, 2)), np.ones((1, 0, 2), bool)]
)
def test_a_mask_checks_its_layers(layer):
    with pytest.raises(ValueError, match="layer 1"):
        AttentionMask((np.ones((1, 2, 2), bool), layer))


def test_a_polarized_mask_checks_itself():
    good = polarize_head(np.eye(4, dtype=bool), 2)
    fields = {name: getattr(good, name) for name in good.__dataclass_fields__}
    wrong = {
        "query_order": np.array([0, 0, 1, 2]),
        "global_keep": np.ones((4, 1), bool),
        "indptr": np.array([0, 2, 1, 3, 4]),
        "indices": np.array([0, 1, 2, 9]),
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name if name != "indices" else "indices"):
            PolarizedMask(**{**fields, name: value})
