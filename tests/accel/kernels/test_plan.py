"""Plans: exact in every form, validated when read, tiles that hold what rows keep."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.accel.kernels import AttentionPlan, plan, plan_attention, plan_layers, tiling
from sievit.accel.kernels.plan import TileTensors
from sievit.workload import AttentionMask, polarize_head


def random_keep(seed: int, heads: int, queries: int, keys: int, share: float) -> np.ndarray:
    return np.random.default_rng(seed).random((heads, queries, keys)) < share


def from_tiles(tiles: TileTensors, heads: int, rows: int, width: int) -> np.ndarray:
    """The mask that the tiles say, entry by entry."""
    keep = np.zeros((heads, rows, width), bool)
    seen = np.zeros((heads, rows), int)
    for t, head in enumerate(tiles.head.tolist()):
        start, count = int(tiles.start[t]), int(tiles.count[t])
        for r, row in enumerate(tiles.rows[t].tolist()):
            if row < 0:
                continue
            seen[head, row] += 1
            for e in range(start, start + count):
                if int(tiles.bits[e]) >> r & 1:
                    keep[head, row, int(tiles.columns[e])] = True
    assert (seen == 1).all()
    return keep


def same(one: AttentionPlan, other: AttentionPlan) -> bool:
    def equal(a, b) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b) and a.dtype == b.dtype
        if isinstance(a, TileTensors):
            return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
        return a == b

    return all(equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    heads=st.integers(1, 3),
    queries=st.integers(1, 70),
    keys=st.integers(1, 70),
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    tile=st.sampled_from([16, 32, 64]),
)
def test_every_form_is_the_mask(seed, heads, queries, keys, share, tile):
    keep = random_keep(seed, heads, queries, keys, share)
    planned = plan_attention(keep, tile=tile)
    assert np.array_equal(planned.dense().numpy(), keep)
    by_rows = replace(planned, keep=torch.zeros(0, dtype=torch.bool)).dense()
    assert np.array_equal(by_rows.numpy(), keep)
    assert np.array_equal(from_tiles(planned.by_query, heads, queries, keys), keep)
    by_key = from_tiles(planned.by_key, heads, keys, queries)
    assert np.array_equal(by_key.transpose(0, 2, 1), keep)
    lanes = np.arange(keys)
    words = planned.words.numpy()[:, :, lanes // 32] >> (lanes % 32) & 1
    assert np.array_equal(words.astype(bool), keep)
    assert planned.kept == keep.sum()
    assert planned.density == pytest.approx(keep.mean())


def test_a_saved_plan_comes_back(tmp_path):
    planned = plan_attention(random_keep(0, 3, 40, 50, 0.2), tile=16)
    planned.save(tmp_path / "layer.npz")
    assert same(AttentionPlan.load(tmp_path / "layer.npz"), planned)


def test_polarized_heads_and_one_layer_masks_plan_alike():
    keep = random_keep(1, 2, 60, 60, 0.1)
    planned = plan_attention(keep)
    polarized = tuple(polarize_head(head, 5) for head in keep)
    assert same(plan_attention(polarized), planned)
    assert same(plan_attention(AttentionMask((keep,))), planned)
    assert same(plan_attention(torch.from_numpy(keep)), planned)
    assert same(plan_layers(AttentionMask((keep, keep)))[1], planned)
    with pytest.raises(ValueError, match="has 2: use plan_layers"):
        plan_attention(AttentionMask((keep, keep)))


def test_queries_that_keep_most_keys_are_gathered_too():
    keep = np.zeros((1, 64, 50), bool)
    keep[:, 0::2, :30] = True  # every other query alike, each keeping more than half
    keep[:, 1::2, 20:] = True
    planned = plan_attention(keep, tile=32)
    assert planned.computed == 2 * 32 * 30
    assert torch.equal(planned.dense(), torch.from_numpy(keep))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_order": np.zeros((2, 9), np.int32)}, "query_order must be a permutation"),
        ({"key_order": np.arange(9, dtype=np.int32)[None]}, "key_order must be a permutation"),
        ({"query_order": np.full((2, 9), 10**6, np.int32)}, "query_order must be"),
        ({"bits": np.zeros(3, np.uint8)}, "3 bytes are no 2 x 9 x 9 bits"),
        ({"shape": np.array([2, -9, 9, 16])}, "are no 2 x -9 x 9 bits"),
        ({"shape": np.array([2, 9, 9, 5])}, "tile must be one of 16, 32, 64, got 5"),
        ({"shape": np.array([2, 9])}, "not a readable plan"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    plan_attention(random_keep(2, 2, 9, 9, 0.5), tile=16).save(tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as stored:
        np.savez(tmp_path / "bad.npz", **{**stored, **change})
    with pytest.raises(ValueError, match=message):
        AttentionPlan.load(tmp_path / "bad.npz")


def test_no_plan_at_all_is_refused(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable plan"):
        AttentionPlan.load(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match=r"saved as \.npz, got 'layer.pt'"):
        plan_attention(random_keep(2, 1, 9, 9, 0.5)).save("layer.pt")


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (np.ones((2, 4, 4)), {}, r"got float64 \[2, 4, 4\]"),
        (np.ones((4, 4), bool), {}, r"got bool \[4, 4\]"),
        (np.ones((1, 0, 4), bool), {}, "no empty axis"),
        (np.ones((1, 1, 8193), bool), {}, r"up to 8192 queries and keys, got \[1, 8193\]"),
        (np.ones((1, 4, 4), bool), {"tile": 24}, "one of 16, 32, 64, got 24"),
        (np.ones((1, 4, 4), bool), {"granularity": (8, 1)}, r"got \(8, 1\)"),
        (np.eye(64, dtype=bool)[None], {"granularity": (32, 1)}, "head 0 is finer, its query 1 "),
    ],
)
def test_what_cannot_be_planned_is_refused(mask, options, message):
    with pytest.raises(ValueError, match=message):
        plan_attention(mask, **options)


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_a_mask_of_vectors_is_computed_without_waste(rows):
    vectors = random_keep(3, 2, 512 // rows, 512, 0.0625)
    vectors = np.argsort(np.argsort(vectors + random_keep(4, *vectors.shape, 0.5))) >= 512 - 64
    keep = np.repeat(vectors, rows, axis=1)
    planned = plan_attention(keep, granularity=(rows, 1))
    assert planned.tile == rows
    assert planned.area == pytest.approx(planned.density)


def test_without_numba_the_plan_is_the_same(monkeypatch):
    keep = random_keep(6, 2, 40, 30, 0.2)
    compiled = plan_attention(keep, tile=16)
    for name in ("numba", "numba.core"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("interpreted", tiling.__file__)
    interpreted = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "interpreted", interpreted)
    spec.loader.exec_module(interpreted)
    assert not interpreted.HAVE_NUMBA
    for name in ("Csr", "cluster", "lay_out"):
        monkeypatch.setattr(plan, name, getattr(interpreted, name))
    assert same(plan_attention(keep, tile=16), compiled)


def test_gathering_rows_computes_less_than_their_own_order(golden):
    masks = AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy"))
    keep = np.concatenate(masks.keep)
    padded = np.pad(keep, ((0, 0), (0, 11), (0, 0))).reshape(36, 13, 16, 197)
    raster = 16 * np.count_nonzero(padded.any(axis=2)) / keep.size
    assert plan_attention(keep, tile=16).area < 0.9 * raster
