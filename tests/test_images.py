"""Photos: folders good and bad, crops, batches, samples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from sievit.images import (
    NORMALIZATIONS,
    Normalization,
    Photos,
    batches,
    center_crops,
    endless_crops,
    load_folder,
    normalize,
    random_crops,
    sample_photos,
)


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for name, size in (("b/two.png", (40, 60)), ("a.jpg", (64, 48)), ("c.PNG", (32, 32))):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    (tmp_path / "notes.txt").write_text("not a photo")
    return tmp_path


def test_a_folder_is_read_in_sorted_order(folder):
    photos = load_folder(folder)
    assert photos.names == ("a.jpg", "b/two.png", "c.PNG")
    assert [a.shape for a in photos.arrays] == [(64, 48, 3), (40, 60, 3), (32, 32, 3)]
    assert len(load_folder(folder, limit=2)) == 2


def test_large_photos_are_reduced(folder):
    assert max(load_folder(folder, longest_side=30).arrays[0].shape) <= 30


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff broken", b"GIF89a"])
def test_a_broken_file_is_skipped_and_named(folder, content):
    (folder / "broken.jpg").write_bytes(content)
    with pytest.warns(UserWarning, match=r"skipped .*broken\.jpg"):
        assert len(load_folder(folder)) == 3


def test_a_truncated_photo_is_skipped(folder):
    whole = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"skipped .*a\.jpg"):
        assert len(load_folder(folder)) == 2


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no-such-folder"):
        load_folder(tmp_path / "no-such-folder")
    with pytest.raises(ValueError, match="holds no file ending in"):
        load_folder(tmp_path)
    (tmp_path / "x.png").write_bytes(b"broken")
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ValueError, match="none of the 1 image files"),
    ):
        load_folder(tmp_path)


def test_split_holds_photos_out():
    photos = Photos(tuple("abcdefgh"), tuple(np.zeros((8, 4, 4, 3), np.uint8)))
    learn, judge = photos.split()
    assert judge.names == ("d", "h")
    assert learn.names == tuple("abcefg")
    assert photos.take([0, 1]).split()[1].names == ("b",)
    with pytest.raises(ValueError, match="at least 2 photos"):
        photos.take([0]).split()


def test_center_crop_of_a_square_photo_is_the_photo():
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(center_crops(Photos(("x",), (array,)), 16)[0], array)
    wide = np.concatenate(
        [np.zeros((16, 4, 3), np.uint8), array, np.zeros((16, 4, 3), np.uint8)], 1
    )
    assert np.array_equal(center_crops(Photos(("x",), (wide,)), 16)[0], array)


def test_random_crops_come_from_the_seed(folder):
    photos = load_folder(folder)
    one, same, other = (
        random_crops(photos, 24, 7, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert one.shape == (7, 24, 24, 3)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_batches_are_normalised_and_complete(folder):
    crops = center_crops(load_folder(folder), 28)
    parts = list(batches(crops, 2))
    assert [len(p) for p in parts] == [2, 1]
    pixel = crops[2, 5, 6] / 255
    expected = (pixel - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert parts[1][0, :, 5, 6].numpy() == pytest.approx(expected, abs=1e-5)
    assert normalize(crops).shape == (3, 3, 28, 28)


def test_pixels_are_normalised_as_the_model_was_trained(folder):
    crops = center_crops(load_folder(folder), 16)
    pixels = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
    by = NORMALIZATIONS["inception"]
    assert torch.allclose(normalize(crops, by), pixels * 2 - 1, atol=1e-6)
    other = Normalization((0.1, 0.2, 0.3), (0.5, 0.25, 1.0))
    found = torch.cat(list(batches(crops, 2, other)))
    assert torch.allclose(found[:, 2], pixels[:, 2] - 0.3)
    assert torch.allclose(found[:, 1], (pixels[:, 1] - 0.2) * 4)
    streams = [next(endless_crops(load_folder(folder), 16, 2, 0, by=b)) for b in (by, other)]
    assert torch.allclose((streams[0][:, 2] + 1) / 2 - 0.3, streams[1][:, 2], atol=1e-6)
    with pytest.raises(ValueError, match="std has 3 channels, each above 0"):
        Normalization(std=(0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"mean has 3 channels, got \(0\.5,\)"):
        Normalization(mean=(0.5,))


def test_endless_crops_use_every_photo_in_each_pass():
    arrays = tuple(np.full((8, 8, 3), 40 * i, np.uint8) for i in range(5))
    stream = endless_crops(Photos(tuple("abcde"), arrays), 8, 2, seed=3)
    values = [round(float(x)) for b in itertools.islice(stream, 5) for x in b[:, 0, 0, 0] * 100]
    assert len(set(values)) == 5
    assert sorted(values[:5]) == sorted(values[5:])


def test_sample_photos_are_disjoint_and_named():
    pytest.importorskip("skimage", reason="the sample photos come with scikit-image")
    learn, judge = sample_photos()
    assert not set(learn.names) & set(judge.names)
    assert len(learn) + len(judge) == 8
    assert all(a.dtype == np.uint8 and a.ndim == 3 and a.shape[2] == 3 for a in learn.arrays)


def test_endless_crops_continue_where_they_are_told_to():
    arrays = tuple(np.full((8, 8, 3), i * 40, np.uint8) for i in range(5))
    photos = Photos(tuple("abcde"), arrays)
    whole = list(itertools.islice(endless_crops(photos, 8, 3, seed=3), 6))
    rest = list(itertools.islice(endless_crops(photos, 8, 3, seed=3, start=4), 2))
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
