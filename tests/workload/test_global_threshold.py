"""What a mask remembers of its polarization, in memory and in files, and the old names."""

from __future__ import annotations

import numpy as np
import pytest

from sievit.ae import fit_codecs
from sievit.pipeline import Attachments, Settings
from sievit.sparsify import polarize
from sievit.workload import AttentionMask, polarize_head
from sievit.workload.bits import packed, unpacked


def mask(threshold=50, tokens: int = 60) -> AttentionMask:
    keep = np.random.default_rng(0).random((2, tokens, tokens)) < np.linspace(0, 1, tokens)
    keep[:, :, -2:] = True
    return AttentionMask((keep,), threshold)


def heads(polarized) -> list[int]:
    return [head.num_global for layer in polarized for head in layer]


@pytest.mark.parametrize("threshold", [7, 0.25, "all", "none"])
def test_files_keep_the_threshold(threshold, tmp_path):
    mask(threshold).save(tmp_path / "a.npz")
    Attachments(64, mask(threshold)).save(tmp_path / "a.safetensors")
    for found in (
        AttentionMask.load(tmp_path / "a.npz"),
        Attachments.load(tmp_path / "a.safetensors").mask,
    ):
        assert found == mask()
        assert found.global_threshold == threshold
        assert type(found.global_threshold) is type(threshold)


def test_older_files_mean_the_published_threshold(tmp_path):
    layer = mask().keep[0]
    bits = np.packbits(layer, axis=None)
    np.savez_compressed(tmp_path / "old.npz", shapes=np.array([layer.shape]), bits0=bits)
    assert AttentionMask.load(tmp_path / "old.npz").global_threshold == 50


def test_the_masks_own_threshold_polarizes_it_unless_another_is_given():
    assert heads(polarize(mask(20))) == heads(polarize(mask(), 20)) != heads(polarize(mask()))
    assert heads(polarize(mask(20), 30)) == heads(polarize(mask(), 30))


def test_all_is_what_every_query_keeps_and_none_is_no_key():
    keep = mask().keep[0][0]
    assert polarize_head(keep, "all") == polarize_head(keep, 1.0 - 1e-9)
    assert polarize_head(keep, "all").num_global == keep.all(axis=0).sum() >= 2
    assert polarize_head(keep, "none").num_global == 0
    for wrong in ("some", -1, 1.0, True):
        with pytest.raises(ValueError, match=f"'all' or 'none', got {wrong!r}"):
            mask(wrong)


def test_old_names_warn_and_do_the_same():
    with pytest.warns(DeprecationWarning, match="min_kept is called global_threshold"):
        assert heads(polarize(mask(), min_kept=20)) == heads(polarize(mask(), 20))
    with pytest.warns(DeprecationWarning, match="turn is called rotation"):
        old = Settings(turn=False)
    assert old == Settings(rotation=False)
    with pytest.warns(DeprecationWarning, match="turn is called rotation"):
        assert old.turn is False
    with pytest.warns(DeprecationWarning, match="turn is called rotation"):
        assert fit_codecs([], turn=False).shapes == ()


@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 3, 7)])
def test_bits_come_back_and_another_length_is_refused(shape):
    keep = np.random.default_rng(1).random(shape) < 0.5
    assert np.array_equal(unpacked(packed(keep), shape), keep)
    with pytest.raises(ValueError, match="bytes are no"):
        unpacked(packed(keep), (*shape, 9))
