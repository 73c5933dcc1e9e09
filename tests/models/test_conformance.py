"""One set of checks for every registered model, and for a small one of each family."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sievit.models import create, load_weights, names, prefix_tokens, trace
from sievit.models.families.resnet import CONFIGS as RESNETS

SMALL = {  # family: name, overrides, two image sizes
    "vit": ("deit_tiny", {"depth": 2, "image_size": 64}, (64, 96)),
    "dinov2": ("dinov2_small_registers", {"depth": 2, "image_size": 70}, (70, 98)),
    "levit": ("levit_128s", {"depths": (1, 1, 1), "image_size": 64}, (64, 64)),
    "efficientvit": ("efficientvit_m0", {"image_size": 112, "depths": (1, 1, 1)}, (112, 112)),
    "internimage": ("internimage_t", {"channels": 16, "depths": (1, 1, 2, 1)}, (64, 96)),
    "internimage post": ("internimage_s", {"channels": 16, "depths": (1, 1, 2, 1)}, (64, 96)),
    "internimage clip": (
        "internimage_h",
        {"channels": 32, "depths": (1, 1, 2, 1), "normed_blocks": (0,)},
        (64, 96),
    ),
    "flash_internimage": (
        "flash_internimage_b",
        {"channels": 16, "depths": (1, 1, 2, 1)},
        (64, 96),
    ),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 2, 1)}, (64, 96)),
    "regnetx": ("regnetx_002", {}, (64, 96)),
    "regnety": ("regnety_002", {}, (64, 96)),
    "regnetz": ("regnetz_005", {}, (64, 96)),
    "efficientnet": ("efficientnet_b0", {}, (64, 96)),
    "resnet": ("resnet50", {"config": replace(RESNETS["resnet50"], depths=(1,) * 4)}, (64, 96)),
}


def small(family: str, **more) -> nn.Module:
    name, overrides, _ = SMALL[family]
    torch.manual_seed(0)
    return create(name, **overrides, **more)


def images(family: str, count: int = 2, which: int = 0) -> torch.Tensor:
    size = SMALL[family][2][which]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", names())
def test_every_model_builds_and_is_counted(name):
    with torch.device("meta"):
        model = create(name)
    assert model.registered_name == name
    assert model.training
    assert isinstance(model.image_size, int)
    assert prefix_tokens(model) == model.num_prefix_tokens
    parameters = list(model.parameters())
    assert all(p.is_meta and p.requires_grad for p in parameters)
    workload = trace(model)
    assert workload.params == sum(p.numel() for p in parameters) > 2e6
    assert workload.macs > 2e7
    assert workload.unknown == ()


@pytest.mark.parametrize("family", SMALL)
def test_forward_at_two_sizes_and_evaluation_repeats(family):
    model = small(family).eval()
    with torch.no_grad():
        for which in (0, 1):
            x = images(family, which=which)
            out = model(x)
            assert out.shape[0] == 2
            assert out.ndim == 2
            assert torch.isfinite(out).all()
            assert torch.equal(model(x), out)
            alone = model(x[:1])
            torch.testing.assert_close(alone, out[:1], rtol=1e-3, atol=1e-4)
        assert model.forward_features(x).shape[0] == 2


@pytest.mark.parametrize("family", SMALL)
def test_backward_reaches_every_parameter(family):
    model = small(family)
    output = model(images(family))
    outputs = output if isinstance(output, tuple) else (output,)
    sum(out.square().sum() for out in outputs).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("family", SMALL)
def test_state_dict_round_trip(family, tmp_path):
    model = small(family).eval()
    path = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, path)
    other = small(family).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    report = load_weights(other, path)
    assert report.loaded == tuple(model.state_dict())
    assert report.left_out == ()
    with torch.no_grad():
        assert torch.equal(other(images(family)), model(images(family)))


@pytest.mark.parametrize("family", SMALL)
def test_other_numbers_of_classes(family):
    with torch.no_grad():
        assert small(family, num_classes=7).eval()(images(family)).shape == (2, 7)
        assert small(family, num_classes=0).eval()(images(family)).ndim == 2


@pytest.mark.parametrize("family", SMALL)
def test_half_precision(family):
    """bfloat16 and float16 forwards stay near float32, in units of the largest logit."""
    model = small(family).eval()
    x = images(family)
    with torch.no_grad():
        exact = model(x)
        for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
            low = copy.deepcopy(model).to(dtype)(x.to(dtype))
            assert low.dtype == dtype
            assert (low.float() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("family", SMALL)
def test_traced_parameters_are_the_models(family):
    model = small(family)
    workload = trace(model, SMALL[family][2][0])
    assert workload.params == sum(p.numel() for p in model.parameters())
    assert workload.macs > 0


@pytest.mark.parametrize("family", SMALL)
def test_export_gives_the_same_logits(family):
    model = small(family).eval()
    x = images(family)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), model(x))


TRACED = {  # MACs as published or as the reference libraries count them: all, without attention
    "efficientvit_m0": (79193600, 76845696),
    "levit_128": (405321728, 364390400),
    "efficientnet_b0": (385814752, 385814752),
    "regnety_004": (401842848, 401842848),
    "regnetz_005": (507203840, 507203840),
    "flash_internimage_t": (4868442112, 4868442112),
}


@pytest.mark.parametrize("name", TRACED)
def test_traced_macs_are_the_published_ones(name):
    with torch.device("meta"):
        workload = trace(create(name))
    attention = sum(op.macs for op in workload.attention)
    assert (workload.macs, workload.macs - attention) == TRACED[name]


def real_macs(model: nn.Module, size: int) -> int:
    """PyTorch's own counter over a forward on meta tensors, attention written out."""
    counter = FlopCounterMode(display=False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model.eval()(torch.empty(1, 3, size, size, device="meta"))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "attention_layers"),
    [
        ("deit_tiny_patch16_224", 12),
        ("levit_128s", 11),
        ("swin_tiny_patch4_window7_224", 12),
        ("mobilenetv3_small_100", 0),
    ],
)
def test_models_of_timm_are_traced(timm, name, attention_layers):
    with torch.device("meta"):
        model = timm.create_model(name)
    workload = trace(model, 224)
    assert workload.macs == real_macs(model, 224)
    assert workload.params == sum(p.numel() for p in model.parameters())
    assert workload.unknown == ()
    assert len(workload.attention) == attention_layers


@pytest.mark.parametrize(
    ("name", "attention_layers"), [("resnet18", 0), ("vit_b_16", 12), ("swin_t", 12)]
)
def test_models_of_torchvision_are_traced(timm, name, attention_layers):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = getattr(models, name)()
    workload = trace(model, 224)
    assert workload.macs == real_macs(model, 224)
    assert workload.params == sum(p.numel() for p in model.parameters())
    assert workload.unknown == ()
    assert len(workload.attention) == attention_layers


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("levit_128s", 224),
        ("efficientvit_m0", 224),
        ("convnext_tiny", 64),
        ("regnetx_002", 64),
        ("regnety_004", 64),
        ("regnetz_040_h", 64),
        ("efficientnet_b0", 64),
        ("resnet50", 64),
    ],
)
def test_the_same_weights_give_timms_logits(timm, name, size):
    theirs = timm.create_model(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise + 0.5 if tensor.ndim < 2 else tensor + 0.02 * (noise - 0.5))
    ours = create(name).eval()
    load_weights(ours, theirs.eval().state_dict())
    x = torch.randn(2, 3, size, size, generator=generator)
    with torch.no_grad():
        expected = theirs(x)
        assert (ours(x) - expected).abs().max() <= 1e-6 * expected.abs().max()
