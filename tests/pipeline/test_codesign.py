"""The whole path on a small network, and what it writes."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sievit.accel import presets
from sievit.images import Photos
from sievit.models import create, features, trace
from sievit.pipeline import Attachments
from sievit.pipeline.codesign import codesign, learn_mask, learn_mask_within
from sievit.pipeline.networks import attention_cycles, simulate_model
from sievit.pipeline.settings import Settings
from sievit.pipeline.stages import SIMULATORS
from sievit.sparsify import attach
from sievit.sparsify.budgeted_masks import tile_area
from sievit.workload import HeadCodec

SMALL = Settings(
    image_size=32,
    sparsity=0.6,
    global_threshold=8,
    learn_crops=6,
    judge_crops=4,
    codec_steps=2,
    recovery_steps=2,
    batch_size=3,
)


def network(image_size: int = 32):
    torch.manual_seed(0)
    return create(
        "vit_tiny", image_size=image_size, patch_size=8, dim=32, depth=2, heads=4, num_classes=0
    ).eval()


def photos(count: int = 6) -> Photos:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(c).resize((48, 40), 2)) for c in coarse]
    return Photos(tuple(f"photo {i}" for i in range(count)), tuple(smooth))


@pytest.fixture(scope="module")
def result():
    return codesign(network(), photos(), settings=SMALL, name="small")


def test_integers_are_those_of_the_hardware_or_left_out_with_the_reason(result):
    assert "as above, attention in int8" in result.fidelity
    wide = replace(presets["vitcod"], operand_bytes=2)
    settings = replace(SMALL, codec=False, recovery_steps=1, measure=False)
    with pytest.warns(UserWarning, match=r"not judged in integers: .* more than 32 bits hold"):
        judged = codesign(network(), photos(), settings=settings, hardware=wide).fidelity
    assert not any("attention in int" in name for name in judged)


def test_the_path_is_complete(result):
    assert list(result.fidelity) == [
        "random mask, rows as learned",
        "random mask, uniform",
        "learned mask",
        "codec alone, heads not rotated",
        "codec alone",
        "learned mask + codec",
        "learned mask + codec, recovered",
        "as above, attention in int8",
    ]
    assert list(result.reports) == list(SIMULATORS)
    assert result.recovery_log.steps == result.codec_log.steps == 2
    assert result.judged_on == ("photo 3",)
    assert not set(result.judged_on) & set(result.learned_from)
    assert result.mask.sparsity == pytest.approx(0.6, abs=0.02)
    assert [op.codec for op in result.workload.attention] == [HeadCodec(4, 2)] * 2
    for layer, heads in zip(result.mask.keep, result.polarized, strict=True):
        assert np.array_equal(np.stack([head.dense() for head in heads]), layer)
    assert {row.batch for row in result.measured} == {1, 3}


def test_integers_cost_little_and_errors_of_the_codec_are_told(result):
    recovered, integers = list(result.fidelity.values())[-2:]
    assert integers.patch_cosine == pytest.approx(recovered.patch_cosine, abs=0.02)
    assert integers != recovered
    errors = result.to_dict()["codec"]["errors"]
    assert len(errors) == 2
    assert all(0 < row[name] < 1 for row in errors for name in ("q", "k", "attention"))


class _WritesItOut(torch.nn.Module):
    """One block whose softmax is written out, as LeViT's is."""

    def __init__(self):
        super().__init__()
        self.image_size = 32
        self.embed = torch.nn.Conv2d(3, 32, 8, 8)
        self.qkv = torch.nn.Linear(32, 96)

    def forward_features(self, images):
        tokens = self.embed(images).flatten(2).mT
        q, k, v = self.qkv(tokens).view(len(images), -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT * 8**-0.5).softmax(-1) @ v
        return tokens + mixed.transpose(1, 2).flatten(2)

    forward = forward_features


def test_what_cannot_be_judged_in_integers_is_said_and_left_out():
    settings = replace(SMALL, codec=False, recovery_steps=0, measure=False, sparsity=0.4)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="not judged in integers: .*softmax"):
        result = codesign(_WritesItOut(), photos(), settings=settings)
    assert list(result.fidelity)[-1] == "learned mask"
    without = codesign(network(), photos(), settings=replace(settings, int8=False))
    assert list(without.fidelity)[-1] == "learned mask"


def test_a_report_is_json_with_what_made_it(result):
    report = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert report["settings"]["sparsity"] == 0.6
    assert report["versions"]["torch"] == torch.__version__
    assert report["threads"] == torch.get_num_threads()
    assert report["mask"]["sparsity"] == result.mask.sparsity
    assert report["simulation"]["vitcod"]["attention"]["cycles"] > 0
    assert report["simulation"]["vitcod"]["hardware"]["lines"] == 64
    assert report["simulation"]["vitcod"]["energy"]["profile"] == "aladdin-28nm"
    assert report["simulation"]["vitcod"]["area"]["total_mm2"] > 0
    assert report["photos"]["note"] == (
        "judged on 4 crops of 1 photos (photo 3), too few to judge a model by"
    )


def test_the_same_run_gives_the_same_figures(result):
    model = network()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    images = torch.randn(2, 3, 32, 32)
    dense = features(model, images)
    again = codesign(model, photos(), settings=SMALL, name="small")
    first, second = result.to_dict(), again.to_dict()
    del first["measured"], second["measured"]
    assert first == second
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.equal(features(model, images), dense)


def test_files_load_back_to_the_same_model(result, tmp_path):
    paths = result.save(tmp_path / "new" / "out")
    names = {p.name for p in paths}
    assert names >= {"report.json", "attachments.safetensors", "model.safetensors"}
    assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(names)
    assert all(p.stat().st_size > 0 for p in paths)
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert min(picture.size) > 300
    loaded = Attachments.load(paths[0])
    assert loaded.mask == result.mask
    model = network()
    model.load_state_dict(load_file(tmp_path / "new" / "out" / "model.safetensors"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, result.student.state_dict()[name])
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), loaded.attach(model):
        assert torch.equal(features(model, images), features(result.student, images))


def test_without_codec_and_recovery():
    settings = replace(
        SMALL, codec=False, recovery_steps=0, measure=False, sparsity=None, theta=0.8
    )
    result = codesign(network(), (photos(3), photos(2)), settings=settings)
    assert result.codecs is None
    assert result.to_dict()["codec"] is None
    assert "learned mask + codec" not in result.fidelity
    assert result.recovery_log is None
    assert result.measured == ()
    with torch.no_grad(), attach(network(), result.mask, image_size=32):
        pass


def test_recovery_without_codec_is_named_so():
    settings = replace(SMALL, codec=False, recovery_steps=1, measure=False)
    result = codesign(network(), photos(), settings=settings, sparsity=0.5)
    assert list(result.fidelity)[-2] == "learned mask, recovered"
    assert result.settings.sparsity == 0.5


def test_masks_alone_and_their_simulation():
    mask = learn_mask(network(), photos(), SMALL)
    assert mask.shapes == ((4, 17, 17),) * 2
    with pytest.raises(ValueError, match="deit_tiny has 12 attention layers, the mask has 2"):
        simulate_model("deit_tiny", mask, image_size=64)
    reports = simulate_model("deit_tiny", image_size=64, simulators=("systolic",), batch=2)
    assert reports["systolic"].batch == 2
    with pytest.raises(ValueError, match="simulator must be one of"):
        simulate_model("deit_tiny", image_size=64, simulators=("abacus",))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sparsity", 1.0),
        ("sparsity", -0.5),
        ("theta", 0.5),
        ("learn_crops", 0),
        ("recovery_steps", -1),
        ("recovery_seconds", 0.0),
        ("recovery_rate", -1.0),
        ("batch_size", 2.5),
        ("groups", 0),
        ("granularity", (0, 1)),
    ],
)
def test_settings_check_themselves(field, value):
    with pytest.raises(ValueError, match=f"{field}.*{re.escape(str(value))}"):
        Settings(**{field: value})
    with pytest.raises(ValueError, match="sparsity, theta, cycles, tile_entries, got none"):
        Settings(sparsity=None)


BUDGET = {"sparsity": None, "tile_entries": 2000.0}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"cycles": 900.0}, "exactly one of .* got sparsity=0.9, cycles=900.0"),
        ({**BUDGET, "tile_entries": 0.0}, "tile_entries must be above 0, got 0.0"),
        ({**BUDGET, "tile": 24}, "tile must be one of 16, 32, 64, got 24"),
        ({**BUDGET, "rule": "ratio"}, r"budget \(tile_entries\) takes no rule, got 'ratio'"),
        ({**BUDGET, "grid": (4, 4)}, r"takes no grid, got \(4, 4\)"),
        ({**BUDGET, "granularity": (32, 1)}, r"takes no granularity, got \(32, 1\)"),
        (
            {"sparsity": None, "cycles": 900.0, "global_threshold": 7},
            "global_threshold is 'all', got 7",
        ),
    ],
)
def test_a_budget_refuses_what_it_would_ignore(settings, match):
    with pytest.raises(ValueError, match=match):
        Settings(**settings)


def test_a_run_within_a_budget_has_the_mask_that_the_budget_makes():
    quick = replace(SMALL, codec=False, recovery_steps=0, measure=False, int8=False)
    within = quick.with_amount(tile_entries=4000.0)
    result = codesign(network(), photos(), settings=replace(within, tile=16))
    alone = learn_mask(network(), photos(), replace(within, tile=16))
    again = learn_mask_within(network(), photos().take([0, 1, 2, 4, 5]), settings=quick,
                              tile_entries=4000.0, tile=16)  # fmt: skip
    assert result.mask.digest == again.mask.digest != alone.digest
    assert 0.9 * 4000 <= again.cost == tile_area(16)(result.mask) <= 4000
    assert result.to_dict()["settings"]["tile_entries"] == 4000.0
    assert result.mask.global_threshold == 8  # the settings' own


def test_global_keys_that_cost_time_are_warned_of(tmp_path):
    quick = replace(SMALL, codec=False, recovery_steps=0, measure=False, int8=False)
    low = replace(quick, image_size=96, sparsity=0.9, global_threshold=2)
    with pytest.warns(UserWarning, match=r"on vitcod global keys \(kept by more than 2 queries\)"):
        codesign(network(image_size=96), photos(), settings=low)


@pytest.mark.parametrize("lines", [64, 32])
def test_cycles_are_counted_on_the_hardware_with_keys_that_every_query_keeps(lines):
    model, hardware = network(image_size=96), replace(presets["vitcod"], lines=lines)
    within = replace(SMALL, image_size=96, sparsity=None, cycles=6000.0, global_threshold="all")
    mask = learn_mask(model, photos(), within, hardware=hardware)
    assert mask.global_threshold == "all"
    assert 0.9 * 6000 <= attention_cycles(trace(model, 96), hardware)(mask) <= 6000


def test_one_photo_is_not_enough():
    with pytest.raises(ValueError, match="at least 2 photos"):
        codesign(network(), photos(1), settings=SMALL)


def test_a_machine_too_small_says_what_is_short():
    sides = ("q_buffer_bytes", "k_buffer_bytes", "v_buffer_bytes", "other_buffer_bytes")
    tiny = replace(presets["vitcod"], **dict.fromkeys(sides, 4))
    with pytest.raises(ValueError, match=re.escape(f"{' + '.join(sides)} is 16, one pass")):
        codesign(network(), photos(), tiny, replace(SMALL, measure=False, recovery_steps=0))
