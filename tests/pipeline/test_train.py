"""Sparse training from photos, what it leaves on disk, and the command for it."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from sievit.accel import presets
from sievit.ae import QKCodec
from sievit.cli import app
from sievit.images import IMAGENET, NORMALIZATIONS, Photos, batches, center_crops
from sievit.models import create, trace
from sievit.models.training.checkpoints import checkpoint_files, load_checkpoint
from sievit.pipeline import Attachments
from sievit.pipeline.networks import attention_cycles
from sievit.pipeline.sparse_model import class_labels
from sievit.pipeline.train import TrainSettings, train_sparse
from sievit.pipeline.training_log import TrainingLog
from sievit.sparsify import random_mask, token_features
from sievit.workload import AttentionMask, HeadCodec

SMALL = TrainSettings(
    image_size=64, sparsity=0.6, steps=4, batch_size=4, learn_crops=4, checkpoint_every=2
)


def network(**overrides):
    torch.manual_seed(0)
    settings = {"image_size": 64, "dim": 32, "heads": 4, "depth": 2, "num_classes": 2}
    return create("deit_tiny", **settings | overrides).eval()


def photos(count: int = 6) -> Photos:
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, (70, 90, 3), dtype=np.uint8) for _ in range(count)]
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(count)]
    return Photos(tuple(names), tuple(arrays))


def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("mode", "stages"), [("mask", ["mask"]), ("joint", ["joint"]), ("two-step", ["codec", "mask"])]
)
@pytest.mark.parametrize("more", [{}, {"labels": True, "gradual": True, "accumulate": 2}])
def test_every_mode_trains_a_sparse_model(mode, stages, more):
    model = network()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    found = train_sparse(model, photos(), replace(SMALL, mode=mode, **more))
    assert list(found.logs) == stages
    assert all(len(log.losses) == 4 for log in found.logs.values())
    assert found.attachments.mask.sparsity == pytest.approx(0.6, abs=0.02)
    assert (found.attachments.codecs is None) == (mode == "mask")
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not torch.equal(
        found.model.state_dict()["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"]
    )
    assert list(found.model.state_dict()) == list(before)
    bare = found.model(image())
    with found.attachments.attach(found.model):
        assert not torch.allclose(found.model(image()), bare)
    assert torch.equal(found.model(image()), bare)


def test_files_load_back_to_the_same_outputs(tmp_path):
    found = train_sparse(network(), photos(), replace(SMALL, mode="joint"))
    found.save(tmp_path, {})
    again = network()
    from sievit.models import load_weights

    load_weights(again, tmp_path / "model.safetensors")
    loaded = Attachments.load(tmp_path / "attachments.safetensors")
    assert loaded.settings["sparsity"] == 0.6
    assert loaded.image_size == 64
    with found.attachments.attach(found.model), loaded.attach(again):
        assert torch.equal(found.model(image()), again(image()))
    assert json.loads((tmp_path / "training.json").read_text())["settings"]["mode"] == "joint"


def test_rotated_codecs_load_back_with_their_rotation(tmp_path):
    from sievit.ae import fit_codecs, head_moments

    model = network()
    codecs = fit_codecs(head_moments(model, [image()]), 2).codecs
    assert codecs[0].rotation is not None
    Attachments(64, None, codecs, {}).save(tmp_path / "a.safetensors")
    loaded = Attachments.load(tmp_path / "a.safetensors")
    with Attachments(64, None, codecs, {}).attach(model):
        wanted = model(image())
    with loaded.attach(model):
        assert torch.equal(model(image()), wanted)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        about = file.metadata()
        tensors = {name.replace("rotation", "turn"): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert "codecs.0.turn" in tensors
    save_file(tensors, tmp_path / "earlier.safetensors", about)
    with Attachments.load(tmp_path / "earlier.safetensors").attach(model):
        assert torch.equal(model(image()), wanted)


def test_files_that_hold_no_attachments_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="holds no masks and codecs"):
        Attachments.load(tmp_path / "weights.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"xx")
    for name in ("bad.safetensors", "absent.safetensors"):
        with pytest.raises(ValueError, match="not a readable safetensors"):
            Attachments.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"saved as \.safetensors"):
        Attachments(64).save(tmp_path / "a.npz")


def test_a_second_run_goes_on_where_the_first_was_stopped(tmp_path):
    settings = replace(SMALL, mode="two-step")
    whole = train_sparse(network(), photos(), settings)

    class Stopped(Exception):
        pass

    def stop(stage, share):
        if stage == "training: mask" and share >= 0.75:
            raise Stopped

    with pytest.raises(Stopped):
        train_sparse(network(), photos(), settings, tmp_path, stop)
    again = train_sparse(network(), photos(), settings, tmp_path)
    assert again.logs["codec"].steps == 0
    assert again.logs["mask"].resumed_at == 2
    for stage, log in whole.logs.items():
        assert again.logs[stage].losses == log.losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    with open(tmp_path / "mask" / "log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match=r"sparsity was 0\.6, is 0\.5"):
        train_sparse(network(), photos(), replace(settings, sparsity=0.5), tmp_path)


def test_a_training_begun_under_the_earlier_default_threshold_is_resumed(tmp_path):
    """Its checkpoints name no global_threshold, since it was the default of 50."""
    train_sparse(network(), photos(), replace(SMALL, global_threshold=50, steps=2), tmp_path)
    (file,) = checkpoint_files(tmp_path / "mask")
    assert "global_threshold" not in load_checkpoint(file)["settings"]
    again = train_sparse(network(), photos(), replace(SMALL, steps=2), tmp_path)
    assert again.logs["mask"].steps == 0
    assert again.attachments.mask.global_threshold == 0.5
    with pytest.raises(ValueError, match=r"global_threshold was None, is 0\.25"):
        train_sparse(network(), photos(), replace(SMALL, steps=2, global_threshold=0.25), tmp_path)


def test_training_within_cycles_resumes_on_the_same_machine_alone(tmp_path):
    settings = replace(SMALL, image_size=96, sparsity=None, cycles=6000.0, steps=2)
    model = network(image_size=96, patch_size=8)
    found = train_sparse(model, photos(), settings, tmp_path)
    mask = found.attachments.mask
    assert mask.global_threshold == "all"
    assert 0.9 * 6000 <= attention_cycles(trace(model, 96))(mask) <= 6000
    assert found.attachments.settings["cycles"] == 6000.0
    again = train_sparse(model, photos(), settings, tmp_path)
    assert again.logs["mask"].steps == 0
    other = replace(presets["vitcod"], lines=128)
    with pytest.raises(ValueError, match=r"hardware was .* is "):
        train_sparse(model, photos(), settings, tmp_path, hardware=other)


def given_mask(sparsity: float = 0.7, heads: int = 4, tokens: int = 17) -> AttentionMask:
    return random_mask([(heads, tokens, tokens)] * 2, sparsity=sparsity, seed=1)


@pytest.mark.parametrize("mode", ["mask", "joint", "two-step"])
def test_a_mask_that_is_given_is_the_one_trained_with(mode):
    mask = given_mask()
    found = train_sparse(network(), photos(), replace(SMALL, mode=mode), mask=mask)
    assert found.attachments.mask is mask
    assert found.attachments.settings["sparsity"] == mask.sparsity


def test_a_mask_that_is_given_must_fit_stay_and_be_the_same_on_resuming(tmp_path):
    with pytest.raises(ValueError, match="cannot grow"):
        train_sparse(network(), photos(), replace(SMALL, gradual=True), mask=given_mask())
    told = []
    with pytest.raises(ValueError, match=r"mask is for \(2, 17, 17\)"):
        train_sparse(
            network(), photos(), SMALL, progress=lambda *a: told.append(a), mask=given_mask(heads=2)
        )
    assert not told  # before any work
    train_sparse(network(), photos(), SMALL, tmp_path, mask=given_mask())
    other = AttentionMask(tuple(layer[::-1] for layer in given_mask().keep))
    with pytest.raises(ValueError, match=r"mask was '[0-9a-f]+', is '[0-9a-f]+'"):
        train_sparse(network(), photos(), SMALL, tmp_path, mask=other)


def test_labelled_training_reports_accuracy_and_the_machines_integers(tmp_path):
    model, learn = network(), photos(6)
    found = train_sparse(model, learn, replace(SMALL, labels=True, mode="joint"))
    assert found.classes == ("a", "b")
    judged = photos(5).take([4, 3, 1])  # a, b, b
    rows = found.evaluate(model, judged, learned_from=learn)
    names = ["dense", "mask, untrained", "mask + codec, trained", "as above, attention in int8"]
    assert list(rows) == names
    assert rows["dense"].patch_cosine == pytest.approx(1.0)
    crops = list(batches(center_crops(judged, 64), 8))
    with torch.no_grad():
        right = model(crops[0]).argmax(1) == torch.tensor([0, 1, 1])
    assert rows["dense"].accuracy == pytest.approx(float(right.float().mean()))
    plain, integers = rows[names[2]], rows[names[3]]
    assert integers != plain
    assert integers.patch_cosine == pytest.approx(plain.patch_cosine, abs=0.02)
    with found.attachments.attach_int8(found.model, batches(center_crops(learn, 64), 8)):
        inside = token_features(found.model, crops)
    assert not torch.equal(inside, token_features(found.model, crops))
    errors = found.codec_errors(judged)
    assert len(errors) == 2
    assert all(0 < row.q < 1 and 0 < row.k < 1 and 0 < row.attention < 1 for row in errors)
    found.save(tmp_path, rows, errors)
    saved = json.loads((tmp_path / "training.json").read_text())
    assert saved["codec_errors"][1]["attention"] == errors[1].attention
    assert saved["classes"] == ["a", "b"]
    strange = Photos(("c/1.png",), photos(1).arrays)
    with pytest.raises(ValueError, match=r"'c/1.png' is of none of the classes a, b"):
        found.evaluate(model, strange)


@pytest.mark.parametrize("mode", ["mask", "joint"])
def test_images_are_normalised_everywhere_or_nowhere(mode):
    """A model whose stem takes back what another normalization does trains alike."""
    half = NORMALIZATIONS["inception"]
    plain, moved = network(), network()
    weight, bias = moved.patch_embed.proj.weight, moved.patch_embed.proj.bias
    scale = torch.tensor(half.std) / torch.tensor(IMAGENET.std)
    shift = (torch.tensor(half.mean) - torch.tensor(IMAGENET.mean)) / torch.tensor(IMAGENET.std)
    with torch.no_grad():
        bias += (weight * shift.view(1, 3, 1, 1)).sum((1, 2, 3))
        weight *= scale.view(1, 3, 1, 1)
    settings = replace(SMALL, mode=mode, block_weight=0.0)
    both = [
        train_sparse(model, photos(), replace(settings, normalization=by))
        for model, by in ((plain, IMAGENET), (moved, half))
    ]
    for stage, log in both[0].logs.items():
        assert both[1].logs[stage].losses == pytest.approx(log.losses, rel=0.05)
    rows = [
        found.evaluate(model, photos(3), learned_from=photos(3))
        for found, model in zip(both, (plain, moved), strict=True)
    ]
    assert list(rows[0]) == list(rows[1])
    for name, row in rows[0].items():
        assert rows[1][name].relative_l2 == pytest.approx(row.relative_l2, rel=0.003)
    masks = [found.attachments.mask.keep for found in both]
    alike = [np.mean(one == other) for one, other in zip(*masks, strict=True)]
    assert min(alike) > 0.99


def test_classes_come_from_folders():
    assert class_labels(photos(3)) == (("a", "b"), [0, 1, 0])
    loose = Photos(("x.png",), photos(1).arrays)
    with pytest.raises(ValueError, match=r"'x.png' lies in none"):
        class_labels(loose)
    one = photos(6).take([0, 2, 4])
    with pytest.raises(ValueError, match="at least 2 classes, got 'a' alone"):
        class_labels(one)
    with pytest.raises(ValueError, match="gives 5 outputs, the photos have 2 classes"):
        train_sparse(network(num_classes=5), photos(), replace(SMALL, labels=True))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mode": "both"}, "mode must be one of two-step, joint, mask"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\)"),
        ({"cycles": 1e4}, "exactly one of .* got sparsity=0.9, cycles=10000.0"),
        ({"sparsity": None, "cycles": 1e4, "gradual": True}, "to a sparsity alone, got .* cycles="),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 8, "accumulate": 3}, "cannot be cut into 3"),
    ],
)
def test_settings_check_themselves(settings, match):
    with pytest.raises(ValueError, match=match):
        TrainSettings(**settings)


def test_the_log_replaces_rows_after_a_resume_and_a_torn_line(tmp_path):
    with TrainingLog(tmp_path, tensorboard=False) as log:
        for step in range(3):
            log(step, 0.1, {"tokens": 1.0, "codec": 0.5}, 0.0)
    with open(tmp_path / "log.csv", "a") as file:
        file.write("3,0.1,1")
    with TrainingLog(tmp_path, tensorboard=False) as log:
        log(2, 0.2, {"tokens": 2.0, "codec": 0.0}, 0.0)
    rows = (tmp_path / "log.csv").read_text().split()
    assert rows == ["step,rate,loss,tokens,codec", "0,0.1,1.5,1,0.5", "1,0.1,1.5,1,0.5",
                    "2,0.2,2,2,0"]  # fmt: skip


def test_the_log_goes_to_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    told = []

    class Board:
        def __init__(self, folder):
            told.append(folder)

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

        def close(self):
            told.append("closed")

    found = importlib.util.find_spec
    present = lambda name: True if name == "tensorboard" else found(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", present)
    board = types.SimpleNamespace(SummaryWriter=Board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    with TrainingLog(tmp_path) as log:
        log(3, 0.5, {"tokens": 1.25}, 0.0)
    assert told == [str(tmp_path), ("rate", 0.5, 3), ("tokens", 1.25, 3), "closed"]


@pytest.fixture
def training(tmp_path) -> list[str]:
    """Arguments of a short `sievit train`, all but --out."""
    folder = tmp_path / "photos"
    for name, array in zip(photos(8).names, photos(8).arrays, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return ["train", "--images", str(folder), "--model", "deit_tiny", "--weights", "random",
            "--image-size", "64", "--learn-crops", "4", "--steps", "2",
            "--batch-size", "2"]  # fmt: skip


def test_the_command_trains_and_says_what_it_wrote(training, tmp_path):
    arguments = [*training, "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "mask, trained" in done.output
    names = {p.name for p in Path(tmp_path / "out").iterdir()}
    assert names == {"mask", "model.safetensors", "attachments.safetensors", "training.json"}
    done = CliRunner().invoke(app, [*arguments, "--sparsity", "0.5"])
    assert done.exit_code == 1
    assert "sparsity was 0.9, is 0.5" in " ".join(done.output.split())


def in_processes(count: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv_backend=c10d",
               "--rdzv_endpoint=127.0.0.1:0", f"--nproc_per_node={count}", "-m",
               "sievit.cli"]  # fmt: skip
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_the_command_in_two_processes(training, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    training = [*training, "--mode", "joint"]
    done = in_processes(2, [*training, "--out", str(two)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("mask + codec, trained") == 1  # the first process alone reports
    assert done.stdout.count("Codec under the mask, mean of the layers: error Q 0.") == 1
    assert CliRunner().invoke(app, [*training, "--out", str(one)]).exit_code == 0
    logs = [json.loads((out / "training.json").read_text()) for out in (one, two)]
    assert logs[1]["losses"]["joint"] == pytest.approx(logs[0]["losses"]["joint"], rel=0.01)
    masks = [Attachments.load(out / "attachments.safetensors").mask for out in (one, two)]
    for one_layer, two_layer in zip(masks[0].keep, masks[1].keep, strict=True):
        assert np.mean(one_layer == two_layer) > 0.99
    assert len(list((two / "joint").glob("log.csv"))) == 1
    done = in_processes(3, [*training, "--out", str(tmp_path / "three")])
    assert done.returncode != 0
    assert "3 processes cannot share micro-batches of 2 photos" in done.stderr


def test_a_trained_model_is_simulated_and_trained_further_from_its_files(tmp_path):
    heads, tokens = 3, 17
    codecs = torch.nn.ModuleList(QKCodec(HeadCodec(heads, 2)) for _ in range(12))
    mask = random_mask([(heads, tokens, tokens)] * 12, sparsity=0.7)
    bare, coded, codec = (tmp_path / f"{n}.safetensors" for n in ("bare", "coded", "codec"))
    Attachments(64, mask).save(bare)
    Attachments(64, mask, codecs).save(coded)
    Attachments(64, None, codecs).save(codec)

    def traffic(*arguments) -> dict:
        report = tmp_path / "report.json"
        command = ["simulate", "--model", "deit_tiny", "--json", str(report), *arguments]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        return json.loads(report.read_text())["vitcod"]["attention"]["traffic"]

    mask.save(tmp_path / "mask.npz")
    plain = ["--mask", str(tmp_path / "mask.npz"), "--image-size", "64"]
    assert traffic("--mask", str(bare)) == traffic(*plain)
    assert traffic("--mask", str(coded)) == traffic(*plain, "--latent-heads", "2")
    assert traffic("--mask", str(coded)) != traffic(*plain)
    done = CliRunner().invoke(app, ["compare", "deit_tiny", "--mask", str(bare)])
    assert done.exit_code == 0, done.output
    assert "no codec" in done.output
    done = CliRunner().invoke(app, ["compare", "deit_tiny", "--mask", str(coded)])
    assert "codec 3 -> 2 heads" in done.output
    done = CliRunner().invoke(app, ["simulate", "--mask", str(codec)])
    assert done.exit_code == 1
    assert "holds codecs, but no mask" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["train", "--mask", str(bare), "--sparsity", "0.5"])
    assert done.exit_code == 1
    assert "either --mask or --sparsity" in done.output
