"""InternImage and FlashInternImage: published counts, released outputs, block forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sievit.models.families.dcn import DeformSampling, deform_core
from sievit.models.families.internimage import MODELS, Block, BlockStyle, InternImage

FLASH = BlockStyle("dcnv4", bias=False)
COUNTS = {  # parameters, image size, multiply-accumulates with 5 n K c for a sampling
    "internimage_t": (29918424, 224, 4885100544),
    "internimage_s": (50079880, 224, 8305966080),
    "internimage_b": (97461832, 224, 16182426624),
    "internimage_l": (223334810, 384, 107791887360),
    "internimage_xl": (334819780, 384, 162929534976),
    "internimage_h": (1089636760, 224, 181964316672),
    "flash_internimage_t": (29815528, 224, 4868442112),
    "flash_internimage_s": (50067496, 224, 8313241600),
    "flash_internimage_b": (97448960, 224, 16198232064),
    "flash_internimage_l": (223297080, 384, 107821378560),
}


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(name: str) -> nn.Module:
    """The model without data; its sampling gives a tensor of the right shape at no cost."""
    with torch.device("meta"):
        return MODELS[name](core=lambda value, offset, weight, **geometry: value).eval()


@torch.no_grad()
def macs_by_kind(model: nn.Module, image_size: int) -> dict[type, int]:
    """The authors' count, from the shapes that each layer was seen to produce."""
    totals = {nn.Conv2d: 0, nn.Linear: 0, DeformSampling: 0}

    def count(module, _, out):
        per_output = {
            nn.Conv2d: lambda: module.weight[0].numel(),
            nn.Linear: lambda: module.in_features,
            DeformSampling: lambda: 5 * module.samples,
        }[type(module)]
        totals[type(module)] += out.numel() * per_output()

    for module in model.modules():
        if type(module) in totals:
            module.register_forward_hook(count)
    model(torch.empty(1, 3, image_size, image_size, device="meta"))
    return totals


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_macs_are_the_published_ones(name):
    expected, image_size, macs = COUNTS[name]
    model = on_meta(name)
    assert params(model) == expected
    assert model.image_size == image_size
    # The centre scale of H and the attention of its head are no part of the published rule.
    assert sum(macs_by_kind(model, image_size).values()) == macs


def test_giant_model_has_the_published_size():
    model = on_meta("internimage_g")
    assert round(params(model) / 1e9) == 3
    assert sum(macs_by_kind(model, 512).values()) == pytest.approx(2700e9, rel=0.01)


def test_huge_model_at_its_published_image_size():
    total = sum(macs_by_kind(on_meta("internimage_h"), 640).values())
    assert total == pytest.approx(1478e9, rel=0.01)


def test_parts_of_the_tiny_model():
    model = on_meta("internimage_t")
    kinds = macs_by_kind(model, 224)
    assert list(kinds.values()) == [281186304, 4504565760, 99348480]
    assert params(model.patch_embed) == 19584
    assert [params(level) for level in model.levels] == [271920, 1074272, 15082080, 12306816]
    assert params(model.conv_head) == 394752
    assert params(model.head) == 769000
    assert params(model.levels[0].blocks[0]) == 49452
    maps = model.forward_stages(torch.empty(1, 3, 224, 224, device="meta"))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (56, 56, 64),
        (28, 28, 128),
        (14, 14, 256),
        (7, 7, 512),
    ]


@pytest.mark.parametrize(
    ("file", "case", "style"),
    [
        ("internimage_mini", "mini_prenorm_T", BlockStyle()),
        ("flashinternimage_mini", "mini_T", FLASH),
    ],
)
def test_small_networks_give_the_released_outputs(golden, file, case, style):
    """The whole network, or the one part of it that is stored."""
    with np.load(golden(f"golden/{file}.npz")) as data:
        stored = {k.removeprefix(case + "/"): data[k] for k in data}
    part = str(stored.pop("part", ""))
    arrays = {name: torch.tensor(array) for name, array in stored.items()}
    state = {k.removeprefix("sd/"): v for k, v in arrays.items() if k.startswith("sd/")}
    model = InternImage(16, (1, 1, 2, 1), style, num_classes=10)
    model = model.get_submodule(part).double().eval()
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    error = (model(arrays["x"]) - arrays["y"]).abs().max() / arrays["y"].abs().max()
    assert error < 1e-5


FORMS = {
    "pre": (BlockStyle(), lambda f, norm, outer, gamma, x: f(norm(x))),
    "post": (BlockStyle(norm="post"), lambda f, norm, outer, gamma, x: norm(f(x))),
    "pre, scaled": (
        BlockStyle(layer_scale=0.3),
        lambda f, norm, outer, gamma, x: gamma * f(norm(x)),
    ),
    "post, scaled": (
        BlockStyle(norm="post", layer_scale=0.3),
        lambda f, norm, outer, gamma, x: gamma * norm(f(x)),
    ),
    "res post": (
        BlockStyle(norm="res_post"),
        lambda f, norm, outer, gamma, x: outer(f(norm(x))),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operator", ["dcnv3", "dcnv4"])
def test_block_forms_are_their_equations(form, operator):
    style, branch = FORMS[form]
    torch.manual_seed(0)
    block = Block(16, 1, replace(style, operator=operator)).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    outer = [getattr(block, f"res_post_norm{i}", None) for i in (1, 2)]
    x = torch.randn(1, 4, 5, 16)
    expected = x + branch(block.dcn, block.norm1, outer[0], block.gamma1, x)
    expected = expected + branch(block.mlp, block.norm2, outer[1], block.gamma2, expected)
    torch.testing.assert_close(block(x), expected)


def test_norms_inside_and_after_a_stage():
    post = on_meta("internimage_s").levels[2]
    assert isinstance(post.norm, nn.Identity)
    huge = on_meta("internimage_h").levels[2]
    assert huge.normed_blocks == (5, 11, 17, 23, 29)
    assert len(huge.post_norms) == 5
    assert isinstance(huge.norm[0], nn.LayerNorm)
    assert on_meta("internimage_g").levels[2].normed_blocks[-1] == 47
    assert isinstance(on_meta("internimage_g").levels[0].norm[0], nn.LayerNorm)


def test_clip_head_runs_and_uses_both_last_stages():
    torch.manual_seed(0)
    style = BlockStyle(norm="res_post", dw_kernel=5, center_scale=True)
    model = InternImage(16, (1, 1, 2, 1), style, normed_blocks=(1,), clip_head=True, num_classes=4)
    x = torch.randn(2, 3, 64, 96)
    out = model.eval()(x)
    assert out.shape == (2, 4)
    nn.init.zeros_(model.dcnv3_head_x4[0].weight)
    assert not torch.equal(model(x), out)
    nn.init.zeros_(model.dcnv3_head_x3.weight)
    torch.testing.assert_close(model(x)[0], model(x)[1])
    with pytest.raises(ValueError, match=r"multiples of 32, got \(64, 80\)"):
        model(x[..., :80])


@pytest.mark.parametrize("style", [BlockStyle(), replace(FLASH, offset_scale=0.5)])
def test_the_core_passed_in_is_used_by_every_block(style):
    calls = []

    def core(*tensors, **geometry):
        calls.append(geometry["groups"])
        return deform_core(*tensors, **geometry)

    torch.manual_seed(0)
    model = InternImage(16, (1, 1, 2, 1), style, num_classes=3, core=core).eval()
    x = torch.randn(1, 3, 64, 64)
    out = model(x)
    assert calls == [1, 2, 4, 4, 8]
    for module in model.modules():
        if isinstance(module, DeformSampling):
            module.core = deform_core
    torch.testing.assert_close(model(x), out)
    assert len(calls) == 5


def test_drop_path_rises_linearly_over_the_blocks():
    model = on_meta("internimage_t")
    rates = [block.drop for level in model.levels for block in level.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.1, 30).tolist())


def test_what_cannot_be_built_is_named():
    with pytest.raises(ValueError, match="channels 48 are not divisible by group_channels 32"):
        InternImage(48, (1, 1, 1, 1), BlockStyle(), group_channels=32)
    with pytest.raises(ValueError, match=r"normed_blocks \(5,\) go beyond the 2 blocks"):
        InternImage(16, (1, 1, 2, 1), BlockStyle(), normed_blocks=(5,))
    with pytest.raises(ValueError, match="norm must be one of"):
        BlockStyle(norm="middle")
    with pytest.raises(ValueError, match="operator must be one of"):
        BlockStyle("dcnv2")
