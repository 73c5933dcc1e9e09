"""What a mask remembers of its polarization, in memory and in files, and the old names."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from sievit.ae import fit_codecs
from sievit.pipeline import Attachments, Settings
from sievit.pipeline.train import TrainSettings
from sievit.sparsify import polarize, random_mask, window_mask
from sievit.workload import AttentionMask, polarize_head
from sievit.workload.bits import packed, unpacked


def mask(threshold=0.5, tokens: int = 60) -> AttentionMask:
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


def test_older_files_that_name_no_threshold_mean_the_published_count(tmp_path):
    """As `save` wrote them before masks remembered a rule."""
    layer = mask(tokens=120).keep[0]
    bits = np.packbits(layer, axis=None)
    np.savez_compressed(tmp_path / "old.npz", shapes=np.array([layer.shape]), bits0=bits)
    found = AttentionMask.load(tmp_path / "old.npz")
    assert found == mask(tokens=120)
    assert found.global_threshold == 50
    assert type(found.global_threshold) is int
    assert heads(polarize(found)) == heads(polarize(mask(tokens=120), 50))
    found.save(tmp_path / "again.npz")
    assert AttentionMask.load(tmp_path / "again.npz").global_threshold == 50
    assert heads(polarize(mask(tokens=120))) != heads(polarize(mask(tokens=120), 50))


def test_kept_entries_alone_take_the_default(tmp_path):
    """As ViTCoD's script writes them."""
    np.save(tmp_path / "vitcod.npy", ~mask(tokens=120).keep[0][None])
    found = AttentionMask.load(tmp_path / "vitcod.npy")
    assert found == mask(tokens=120)
    assert found.global_threshold == 0.5


@pytest.mark.parametrize(("settings", "meant"), [({}, 50), ({"min_kept": 0.3}, 0.3)])
def test_older_attachments_mean_the_threshold_of_their_run(settings, meant, tmp_path):
    Attachments(64, mask(), settings=settings).save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = json.loads(metadata["about"])
    assert about.pop("global_threshold") == 0.5
    metadata["about"] = json.dumps(about)
    save_file(tensors, tmp_path / "old.safetensors", metadata)
    assert Attachments.load(tmp_path / "new.safetensors").mask.global_threshold == 0.5
    found = Attachments.load(tmp_path / "old.safetensors").mask
    assert found == mask()
    assert found.global_threshold == meant


def test_the_default_is_half_of_the_queries():
    kept = np.arange(1, 41)  # queries that keep each of 40 keys
    keep = np.arange(40)[:, None] < kept
    for made in (polarize_head(keep), polarize(AttentionMask((keep[None],)))[0][0]):
        assert made.num_global == 20  # those that 21 to 40 keep, and not the one of 20
        assert made.global_threshold == 0.5
    assert Settings().global_threshold == TrainSettings().global_threshold == 0.5
    assert AttentionMask((keep[None],)).global_threshold == 0.5


def test_the_masks_own_threshold_polarizes_it_unless_another_is_given():
    assert heads(polarize(mask(20))) == heads(polarize(mask(), 20)) != heads(polarize(mask()))
    assert heads(polarize(mask(20), 30)) == heads(polarize(mask(), 30))


def test_a_control_is_polarized_as_the_mask_that_it_is_like():
    like = mask(7, tokens=17)
    for control in (random_mask(like.shapes, like=like), window_mask(like, (4, 4))):
        assert control.global_threshold == 7


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
