"""Masks and codecs in models of timm, Hugging Face and torchvision, as their sources are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sievit.ae import attach_codec, fit_codecs, head_moments
from sievit.models.training.blocks import block_outputs, transformer_blocks
from sievit.models.training.recipe import Recipe
from sievit.pipeline import Attachments
from sievit.sparsify import attach, average_attention, finetune, threshold
from sievit.workload import AttentionMask

SIZES = {"dim": 48, "depth": 2, "heads": 3, "mlp": 96}
PATCH = {"patch_size": 8, "image_size": 32}


def timm_vit(timm, distilled: bool = False) -> nn.Module:
    kind = timm.models.deit.VisionTransformerDistilled if distilled else None
    kind = kind or timm.models.vision_transformer.VisionTransformer
    return kind(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)


def timm_levit(timm) -> nn.Module:
    return timm.create_model("levit_128s", num_classes=5)


def timm_swin(timm) -> nn.Module:
    kind = timm.models.swin_transformer.SwinTransformer
    return kind(img_size=56, patch_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4))


def torchvision_vit(timm) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=5)


def hugging_face(name: str, written_out: bool, timm) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        attn_implementation="eager" if written_out else "sdpa",
    )
    return getattr(transformers, f"{name}Model")(config)


MODELS: dict[str, tuple[Callable[..., nn.Module], int, int]] = {  # (make, size, prefix)
    "timm ViT": (timm_vit, 32, 1),
    "timm DeiT, distilled": (partial(timm_vit, distilled=True), 32, 2),
    "timm LeViT": (timm_levit, 224, 0),
    "timm Swin": (timm_swin, 56, 0),
    "torchvision ViT": (torchvision_vit, 32, 1),
    **{
        f"Hugging Face {name}{', eager' if eager else ''}": (
            partial(hugging_face, name, eager),
            32,
            2 if name == "DeiT" else 1,
        )
        for name in ("ViT", "DeiT", "Dinov2")
        for eager in (False, True)
    },
}


@pytest.fixture(params=MODELS)
def case(request, timm) -> tuple[nn.Module, Tensor, int]:
    """(model, images, prefix tokens)."""
    make, size, prefix = MODELS[request.param]
    torch.manual_seed(0)
    model = make(timm).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and 1e-5 would hide what attention does
            parameter.add_(0.2 * torch.randn_like(parameter) * (parameter.ndim < 3))
    return model, torch.randn(3, 3, size, size), prefix


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    found = model(images)
    return found if isinstance(found, Tensor) else found.last_hidden_state


def learned(model: nn.Module, images: Tensor, prefix: int) -> tuple:
    maps = average_attention(model, images.split(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few tokens cannot reach every sparsity
        return maps, threshold(maps, sparsity=0.7, prefix_tokens=prefix)


def test_a_mask_goes_in_acts_and_comes_out(case):
    model, images, prefix = case
    keys, plain = list(model.state_dict()), outputs(model, images)
    maps, mask = learned(model, images, prefix)
    assert all(np.abs(layer.sum(axis=-1) - 1).max() < 1e-4 for layer in maps)
    size, scale = images.shape[-1], plain.abs().max()
    found = []
    for backend in ("auto", "dense"):
        with attach(model, mask, backend=backend, image_size=size):
            found.append(outputs(model, images))
            assert list(model.state_dict()) == keys
    with attach(model, mask, backend="dense", image_size=size):
        inside = average_attention(model, [images])
    assert all((m[~k] == 0).all() for m, k in zip(inside, mask.keep, strict=True))
    assert (found[0] - found[1]).abs().max() < 1e-4 * scale
    assert (found[0] - plain).abs().max() > 1e-3 * scale
    assert torch.equal(outputs(model, images), plain)
    everything = AttentionMask(tuple(np.ones_like(keep) for keep in mask.keep))
    with attach(model, everything, image_size=size):
        assert (outputs(model, images) - plain).abs().max() < 1e-4 * scale


def test_gradients_pass_through_the_mask(case):
    model, images, prefix = case
    _, mask = learned(model, images, prefix)
    grads = []
    for backend in ("auto", "dense"):
        changed = copy.deepcopy(model)
        with attach(changed, mask, backend=backend, image_size=images.shape[-1]):
            found = changed(images)
            found = found if isinstance(found, Tensor) else found.last_hidden_state
            found.square().mean().backward()
        grads.append([p.grad for p in changed.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    scale = max(float(g.abs().max()) for g in grads[1])
    assert all((a - b).abs().max() < 1e-4 * scale for a, b in zip(*grads, strict=True))


def test_training_lowers_the_distance_to_the_dense_model(case):
    """Tokens of the end and of every block; by labels where a model gives no tokens."""
    model, images, prefix = case
    _, mask = learned(model, images, prefix)
    student = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in student.parameters():  # the mask alone hardly moves LeViT
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    attach(student, mask, image_size=images.shape[-1])
    recipe = Recipe(learning_rate=2e-5, warmup_steps=0, full_rate_loss=0.0, bf16=False)
    teacher, batch = model, images
    if type(model).__module__.startswith("torchvision"):
        teacher, batch = None, (images, torch.tensor([0, 1, 2]))
    told = []
    log = finetune(
        student, [batch] * 8, teacher=teacher, steps=8, recipe=recipe,
        listener=lambda step, rate, terms, share: told.append(terms),
    )  # fmt: skip
    assert log.losses[-1] < 0.99 * log.losses[0]
    assert set(told[0]) == ({"labels"} if teacher is None else {"tokens", "blocks"})
    if teacher is not None:
        blocks = [block for block in transformer_blocks(model) if block is not model]
        with block_outputs(model) as given:
            outputs(model, images)
        assert len(given) == len(blocks) > 1


def test_mask_and_codec_come_back_from_a_file(case, tmp_path):
    model, images, prefix = case
    _, mask = learned(model, images, prefix)
    if len({keep.shape[0] for keep in mask.keep}) > 1:
        codecs = None  # one number of latent heads would not fit all layers
    else:
        codecs = fit_codecs(head_moments(model, images.split(2)), rotation=False).codecs
    made = Attachments(images.shape[-1], mask, codecs, {"sparsity": 0.7})
    made.save(tmp_path / "attachments.safetensors")
    with made.attach(model):
        before = outputs(model, images)
    with Attachments.load(tmp_path / "attachments.safetensors").attach(model):
        assert torch.equal(outputs(model, images), before)
    if codecs is not None:
        with attach_codec(model, codecs, images.shape[-1]):
            assert not torch.equal(outputs(model, images), before)
