"""The kernel inside real models: `attach` with backend auto gives what dense masking gives."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from sievit.models import create, find_attention
from sievit.sparsify import adapt, attach, random_mask
from sievit.workload import AttentionMask


@pytest.fixture
def calls(monkeypatch) -> list:
    """Notes each call of the kernel."""
    made: list = []
    real = adapt.sparse_attention

    def noted(q, k, v, plan, scale):
        made.append(tuple(q.shape))
        return real(q, k, v, plan, scale)

    monkeypatch.setattr(adapt, "sparse_attention", noted)
    return made


def small_vit():
    torch.manual_seed(0)
    return create("deit_tiny", image_size=64, dim=48, depth=3, heads=3, num_classes=5)


def normalized(photo: np.ndarray) -> torch.Tensor:
    """One photo, uint8 [height, width, 3], as the ViT takes it."""
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    scaled = (photo / 255.0 - mean) / deviation
    return torch.from_numpy(scaled).float().permute(2, 0, 1)[None]


def mask_for(model, sparsity=0.8) -> AttentionMask:
    shapes = tuple((call.heads, call.queries, call.keys) for call in find_attention(model))
    return random_mask(shapes, sparsity=sparsity, seed=0)


def test_outputs_and_gradients_are_those_of_dense_masking(calls):
    model = small_vit()
    mask = mask_for(model)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    results = []
    for backend in ("dense", "auto"):
        with attach(model, mask, backend=backend):
            model.zero_grad()
            out = model(images)
            out.square().sum().backward()
            results.append((out.detach(), model.blocks[0].attn.qkv.weight.grad.clone()))
    assert calls == [(2, 3, 17, 16)] * 3
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    difference = (results[0][1] - results[1][1]).norm() / results[0][1].norm()
    assert difference < 1e-4


def test_a_query_without_keys_is_named():
    model = small_vit()
    keep = [layer.copy() for layer in mask_for(model).keep]
    keep[1][2, 5] = False
    with (
        pytest.warns(UserWarning, match="for 1 queries, the first query 5 of layer 1, head 2"),
        attach(model, AttentionMask(tuple(keep))),
    ):
        assert model(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_a_copy_computes_with_the_kernel_too(calls):
    model = small_vit()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with attach(model, mask_for(model)):
        copied = copy.deepcopy(model)
        wanted = model(images)
    assert torch.equal(copied(images), wanted)
    assert len(calls) == 6
    model(images)
    assert len(calls) == 6  # detached


def test_a_written_out_softmax_stays_dense(calls):
    model = create("levit_128s", num_classes=0).eval()
    mask = mask_for(model)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        outs = []
        for backend in ("dense", "auto"):
            with attach(model, mask, backend=backend):
                outs.append(model(images))
    assert torch.equal(*outs)
    assert calls == []


def test_the_pretrained_vit(golden, calls):
    """ViT-S/14, synthetic masks of 90 %: 257 tokens, the reference photo."""
    reference = np.load(golden("dinov2-vits14/golden_astronaut_224.npz"))
    model = create(
        "dinov2_small",
        image_size=224,
        pretrained=golden("dinov2-vits14/vits14_fp16.safetensors"),
    ).eval()
    images = normalized(reference["input_u8"])
    mask = mask_for(model, 0.9)
    outs = []
    with torch.inference_mode():
        for backend in ("dense", "auto"):
            with attach(model, mask, backend=backend):
                outs.append(model.forward_features(images))
    assert len(calls) == 12
    assert (outs[0] - outs[1]).norm() / outs[0].norm() < 1e-5
