"""Head similarity against a plain loop, on our ViT, on windows and on cascaded heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sievit.models import AttentionHook, create, find_attention, intercept
from sievit.sparsify.similarity import head_similarity, plot_similarity, similarities


def images(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def vit() -> nn.Module:
    torch.manual_seed(0)
    settings = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 4}
    model = create("vit_tiny", **settings, num_classes=3)
    for block in model.blocks:
        block.attn.qkv.weight.data *= 8
    return model


def naive(maps: np.ndarray) -> np.ndarray:
    """[images, heads, entries] -> mean over images of the largest cosine to another head."""
    count, heads, _ = maps.shape
    values = np.zeros((count, heads))
    for image in range(count):
        for i in range(heads):
            a = maps[image, i]
            values[image, i] = max(
                a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                for j, b in enumerate(maps[image])
                if j != i
            )
    return values.mean(0)


def observed(model: nn.Module, x: torch.Tensor) -> list[np.ndarray]:
    """Every call's probabilities, as the interception API gives them."""
    seen: list[np.ndarray] = []
    calls = find_attention(model, x[:1])
    hook = AttentionHook(observe=lambda p: seen.append(p.detach().double().numpy()))
    with intercept(model, [hook] * len(calls), calls), torch.no_grad():
        model.eval()(x)
    return seen


def test_heads_of_a_vit():
    model, x = vit(), images(5, 32)
    result = head_similarity(model, [x[:2], (x[2:], None)])
    assert result.images == 5
    assert result.blocks == ("blocks.0.attn", "blocks.1.attn")
    assert model.training
    for values, maps in zip(result.values, observed(model, x), strict=True):
        np.testing.assert_allclose(values, naive(maps.reshape(5, 4, -1)), atol=1e-6)
    np.testing.assert_allclose(result.by_block, [v.mean() for v in result.values])
    assert result.rows()[1]["heads"] == result.values[1].tolist()


def test_cascaded_heads_and_windows_of_an_efficientvit():
    torch.manual_seed(0)
    model = create("efficientvit_m0", image_size=160, depths=(1, 1, 1), num_classes=3)
    for name, parameter in model.named_parameters():
        if "qkvs" in name and name.endswith("c.weight"):
            parameter.data *= 30
    x = images(2, 160)
    result = head_similarity(model, [x])
    assert [len(values) for values in result.values] == [4, 4, 4]
    assert result.blocks[0] == "blocks1.0.mixer.m.attn"
    seen = observed(model, x)
    for block, values in enumerate(result.values):
        heads = [maps.reshape(2, -1) for maps in seen[4 * block : 4 * block + 4]]
        np.testing.assert_allclose(values, naive(np.stack(heads, axis=1)), atol=1e-6)


def test_equal_heads_and_orthogonal_heads():
    same = torch.tensor([[[1.0, 0.0, 2.0], [2.0, 0.0, 4.0], [0.0, 3.0, 0.0]]])
    np.testing.assert_allclose(similarities(same).numpy(), [[1, 1, 0]], atol=1e-7)


def test_picture_is_written(tmp_path):
    result = head_similarity(vit(), [images(2, 32)])
    plot_similarity(result, tmp_path / "similarity.png")
    assert (tmp_path / "similarity.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_compared_is_named():
    with pytest.raises(ValueError, match="needs images"):
        head_similarity(vit(), [])
    torch.manual_seed(0)
    settings = {"image_size": 32, "patch_size": 8, "dim": 16, "depth": 1, "heads": 1}
    with pytest.raises(ValueError, match=r"blocks\.0\.attn has one head"):
        head_similarity(create("vit_tiny", **settings), [images(1, 32)])
    with pytest.raises(ValueError, match="softmax attention"):
        head_similarity(nn.Conv2d(3, 4, 3), [images(1, 32)])
