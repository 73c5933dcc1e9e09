"""LeViT: published counts, its two attentions against plain ones, rectangular maps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sievit.models import create_for, find_attention
from sievit.models.families.conv_layers import fuse
from sievit.models.families.levit import MODELS, Attention, AttentionSubsample

PARAMS = {
    "levit_128s": 7777058,
    "levit_128": 9213936,
    "levit_192": 10947069,
    "levit_256": 18893876,
    "levit_384": 39128836,
}


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(noise + 0.5 if "var" in name else (noise - 0.5) * 0.6)
    return module.eval()


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_are_the_published_ones(name):
    with torch.device("meta"):
        model = MODELS[name]()
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]


def test_state_dict_has_the_released_names():
    with torch.device("meta"):
        names = set(MODELS["levit_128"]().state_dict())
    assert {
        "patch_embed.0.c.weight",
        "patch_embed.6.bn.running_var",
        "blocks.0.m.attention_biases",
        "blocks.0.m.attention_bias_idxs",
        "blocks.0.m.qkv.c.weight",
        "blocks.0.m.proj.1.bn.weight",
        "blocks.1.m.0.c.weight",
        "blocks.1.m.2.bn.bias",
        "blocks.8.kv.c.weight",
        "blocks.8.q.1.c.weight",
        "blocks.8.proj.1.c.weight",
        "blocks.8.attention_biases",
        "head.bn.weight",
        "head.l.bias",
        "head_dist.l.weight",
    } <= names


def plain_attention(q, k, v, biases, places):
    """One image, head after head and query after query; places (y, x) of queries, keys."""
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype)
    width = max(x for _, x in places[1]) + 1
    for head in range(q.shape[0]):
        for i, (y, x) in enumerate(places[0]):
            bias = [biases[head, abs(y - b) * width + abs(x - a)] for b, a in places[1]]
            scores = q[head, i] @ k[head].T * q.shape[2] ** -0.5 + torch.stack(bias)
            out[head, i] = scores.softmax(0) @ v[head]
    return out


def test_attention_is_its_equation():
    module = randomised(Attention(12, heads=2, key_dim=4, resolution=3).double())
    x = torch.randn(1, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    qkv = module.qkv(x)[0].view(9, 2, 16).transpose(0, 1)
    q, k, v = qkv.split([4, 4, 8], dim=2)
    places = [(i // 3, i % 3) for i in range(9)]
    mixed = plain_attention(q, k, v, module.attention_biases, (places, places))
    expected = module.proj(mixed.transpose(0, 1).reshape(1, 9, 16))
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("resolution", [4, 5])
def test_subsampling_attention_is_its_equation(resolution):
    module = randomised(AttentionSubsample(12, 20, 2, 4, resolution).double())
    tokens, small = resolution**2, (resolution + 1) // 2
    x = torch.randn(1, tokens, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    k, v = module.kv(x)[0].view(tokens, 2, 20).transpose(0, 1).split([4, 16], dim=2)
    keys = [(i // resolution, i % resolution) for i in range(tokens)]
    queries = [(2 * i, 2 * j) for i in range(small) for j in range(small)]
    chosen = x[:, [y * resolution + column for y, column in queries]]
    q = module.q[1](chosen)[0].view(small**2, 2, 4).transpose(0, 1)
    mixed = plain_attention(q, k, v, module.attention_biases, (queries, keys))
    expected = module.proj(mixed.transpose(0, 1).reshape(1, small**2, 32))
    assert expected.shape == (1, small**2, 20)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


def test_attention_shapes_shrink_with_the_stages():
    with torch.device("meta"):
        model = MODELS["levit_128"]()
    calls = find_attention(model, 224)
    shapes = [(c.heads, c.queries, c.keys, c.key_dim, c.value_dim) for c in calls]
    assert shapes == (
        [(4, 196, 196, 16, 32)] * 4
        + [(8, 49, 196, 16, 64)]
        + [(8, 49, 49, 16, 32)] * 4
        + [(16, 16, 49, 16, 64)]
        + [(12, 16, 16, 16, 32)] * 4
    )


def test_fused_model_gives_the_same_logits():
    model = randomised(MODELS["levit_128s"](image_size=64, num_classes=10))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    expected, fused = model(x), fuse(model)
    assert (fused(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in fused.modules())


def test_two_heads_are_averaged_in_evaluation_and_both_given_in_training():
    model = randomised(MODELS["levit_128s"](image_size=64, num_classes=10))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    pooled = model.forward_features(x).mean(1)
    torch.testing.assert_close(model(x), (model.head(pooled) + model.head_dist(pooled)) / 2)
    assert len(model.train()(x)) == 2
    single = MODELS["levit_128s"](image_size=64, num_classes=10, distillation=False)
    assert single(x).shape == (2, 10)


def test_an_image_of_another_size_is_named():
    model = MODELS["levit_128s"](image_size=64)
    with pytest.raises(ValueError, match="built for a map of 4 x 4 tokens, got 5 x 5"):
        model(torch.zeros(1, 3, 80, 80))
    with pytest.raises(ValueError, match="needs a width, a depth and heads"):
        MODELS["levit_128s"](depths=(1, 2))


def test_a_model_is_built_for_the_size_it_is_asked_for():
    assert create_for("levit_128s", 256).forward_features(torch.zeros(1, 3, 256, 256)).ndim == 3
    assert create_for("levit_128s").image_size == 224
    assert create_for("deit_tiny", (192, 256)).image_size == 224  # takes any
    with pytest.raises(ValueError, match="levit_128s takes square images, got 192 x 256"):
        create_for("levit_128s", (192, 256))
