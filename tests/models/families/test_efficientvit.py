"""EfficientViT against its published counts and the released modules' outputs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from golden_data import cases
from torch import nn

from sievit.models import find_attention, trace
from sievit.models.families.conv_layers import ConvBN, fuse
from sievit.models.families.efficientvit import (
    FFN,
    MODELS,
    Block,
    CascadedGroupAttention,
    LocalWindowAttention,
    PatchMerging,
    cut_windows,
    join_windows,
)
from sievit.workload import Conv, Gemm

PARAMS = {  # plain, fused, with two heads; stem, three stages, head
    "m0": (2349436, 2334916, 2542820, (24648, 44548, 496392, 1590464, 193384)),
    "m1": (2980560, 2964256, 3173944, (97680, 166082, 841782, 1681632, 193384)),
    "m2": (4187554, 4168338, 4413002, (97680, 162564, 1239558, 2462304, 225448)),
    "m3": (6900722, 6875890, 7222362, (97680, 162692, 1741526, 4577184, 321640)),
    "m4": (8804228, 8776340, 9189996, (97680, 162564, 1922056, 6236160, 385768)),
    "m5": (12473772, 12436260, 12859540, (219096, 359267, 3550665, 7958976, 385768)),
}
COSTS = {  # MACs with both attention products; of convolutions, one window each; activations
    "m0": (79193600, 75364800, 192000, 768768),
    "m1": (167051840, 159828064, 192000, 1192032),
    "m2": (201035712, 193789600, 224000, 1293280),
    "m3": (262662208, 254972480, 320000, 1432576),
    "m4": (299308544, 291370816, 384000, 1500096),
    "m5": (521583104, 507691456, 384000, 2167680),
}
PARTS = ("patch_embed", "blocks1", "blocks2", "blocks3", "head")


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic away from its first value, so that no branch is idle."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(noise + 0.5 if "var" in name else (noise - 0.5) * 0.6)
    return module.eval()


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_are_the_published_ones(name):
    plain, fused, two_heads, parts = PARAMS[name]
    with torch.device("meta"):
        model = MODELS[f"efficientvit_{name}"]()
        distilled = MODELS[f"efficientvit_{name}"](distillation=True)
    assert params(model) == plain
    assert params(fuse(model)) == fused
    assert params(distilled) == two_heads
    assert tuple(params(getattr(model, part)) for part in PARTS) == parts


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_the_published_ones(name):
    """The published columns for convolutions count the windows of stage 1 as one."""
    with torch.device("meta"):
        model = MODELS[f"efficientvit_{name}"]().eval()
    seen = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda layer, _, out: seen.append((layer, out)))
    model(torch.empty(1, 3, 224, 224, device="meta"))
    convs = [(layer.weight[0].numel(), out) for layer, out in seen if isinstance(layer, nn.Conv2d)]
    (linear,) = [layer.weight.numel() for layer, _ in seen if isinstance(layer, nn.Linear)]
    products = sum(
        call.windows * call.heads * call.queries * call.keys * (call.key_dim + call.value_dim)
        for call in find_attention(model)
    )
    everything, one_window, classifier, activations = COSTS[name]
    assert sum(macs * out.numel() for macs, out in convs) + linear + products == everything
    assert sum(macs * out[0].numel() for macs, out in convs) == one_window
    assert linear == classifier
    assert sum(out[0].numel() for _, out in convs) == activations


@pytest.mark.parametrize("name", COSTS)
def test_traced_costs_count_every_window(name):
    """All MACs are the published ones; the published columns of convolutions hold one of the
    four windows that stage 1's attention is cut into, the trace all four."""
    with torch.device("meta"):
        workload = trace(MODELS[f"efficientvit_{name}"]())
    everything, macs, classifier, activations = COSTS[name]
    convs = [op for op in workload.ops if isinstance(op, Conv)]
    windowed = [op for op in convs if op.name.startswith("blocks1.") and ".attn." in op.name]
    assert workload.macs == everything
    assert [op.macs for op in workload.ops if isinstance(op, Gemm)] == [classifier]
    assert sum(op.macs for op in convs) - sum(op.macs for op in windowed) * 3 // 4 == macs
    left_out = sum(op.activations for op in windowed) * 3 // 4
    assert sum(op.activations for op in convs) - left_out == activations
    assert {call.windows for call in workload.attention} == {1, 4}


def test_parameters_of_the_parts():
    assert params(CascadedGroupAttention(64, 4, 7, (5, 5, 5, 5))) == 9604
    assert params(CascadedGroupAttention(144, 3, 7, (7, 5, 3))) == 34595
    assert params(CascadedGroupAttention(224, 2, 4, (7, 5))) == 84736
    assert params(PatchMerging(64, 128)) == 85824
    assert params(FFN(64)) == 16768
    assert params(Block(128, 4, 14, (5, 5, 5, 5))) == 162692


@pytest.mark.parametrize("name", cases("golden/efficientvit_state_shapes.json"))
def test_state_dict_is_the_released_one(golden, name):
    released = json.loads(golden("golden/efficientvit_state_shapes.json").read_text())[name]
    with torch.device("meta"):
        state = MODELS[f"efficientvit_{name.lower()}"]().state_dict()
    assert [(k, list(v.shape)) for k, v in state.items()] == list(released.items())


MODULES = {
    "cga_m0_stage1": lambda: CascadedGroupAttention(64, 4, 7, (5, 5, 5, 5)),
    "lwa_10_w7_pad": lambda: LocalWindowAttention(64, 4, 10, (5, 5, 5, 5)),
    "patchmerging_64_128": lambda: PatchMerging(64, 128),
    "ffn_64": lambda: FFN(64),
}


@pytest.mark.parametrize("case", cases("golden/efficientvit_modules.npz"))
def test_modules_give_the_released_outputs(golden, case):
    with np.load(golden("golden/efficientvit_modules.npz")) as data:
        arrays = {k: torch.tensor(data[k]) for k in data.files if k.startswith(case + "/")}
    prefix = f"{case}/sd/"
    module = MODULES[case]().double().eval()
    module.load_state_dict({k[len(prefix) :]: v for k, v in arrays.items() if prefix in k})
    expected = arrays[f"{case}/y"]
    error = (module(arrays[f"{case}/x"]) - expected).abs().max() / expected.abs().max()
    assert error < 1e-10


def test_bias_is_indexed_by_distance():
    attention = CascadedGroupAttention(64, 4, 3, (3, 3, 3, 3))
    index = attention.attention_bias_idxs
    for query in range(9):
        for key in range(9):
            dy, dx = abs(query // 3 - key // 3), abs(query % 3 - key % 3)
            assert index[query, key] == 3 * dy + dx


def test_a_chunk_reaches_only_its_own_and_later_heads():
    attention = randomised(CascadedGroupAttention(64, 4, 4, (5, 5, 3, 3)))
    seen = []
    attention.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(1))
    attention(x)
    for chunk in range(4):
        changed = x.clone()
        changed[:, 16 * chunk : 16 * (chunk + 1)] += 1.0
        attention(changed)
        moved = (seen[-1] - seen[0]).abs().amax((0, 2, 3)).view(4, 16).amax(1)
        assert (moved > 0).tolist() == [head >= chunk for head in range(4)]


def test_a_fresh_block_is_the_identity():
    torch.manual_seed(0)
    block = Block(64, 4, 4, (5, 5, 5, 5))
    x = torch.randn(2, 64, 4, 4)
    assert torch.equal(block.eval()(x), x)
    assert torch.equal(block.train()(x), x)


def test_windows_join_to_the_map_they_were_cut_from():
    x = torch.arange(2 * 3 * 14 * 21.0).view(2, 3, 14, 21)
    windows = cut_windows(x, 7)
    assert windows.shape == (12, 3, 7, 7)
    assert torch.equal(windows[4], x[0, :, 7:14, 7:14])
    assert torch.equal(join_windows(windows, 7, (14, 21)), x)


def test_fused_model_gives_the_same_logits():
    model = randomised(MODELS["efficientvit_m0"](image_size=64, distillation=True, num_classes=10))
    fused = fuse(model)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    expected = model(x)
    assert (fused(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in fused.modules())
    assert any(isinstance(m, ConvBN) for m in model.modules())


def test_two_heads_are_averaged_in_evaluation_and_both_given_in_training():
    model = randomised(MODELS["efficientvit_m0"](image_size=64, distillation=True, num_classes=10))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    pooled = model.forward_features(x).mean((2, 3))
    mean = (model.head(pooled) + model.head_dist(pooled)) / 2
    torch.testing.assert_close(model(x), mean)
    assert [tuple(t.shape) for t in model.train()(x)] == [(2, 10), (2, 10)]


def test_other_image_sizes_work_where_the_bias_tables_fit():
    model = randomised(MODELS["efficientvit_m0"](num_classes=3))
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 3)
    assert model(torch.zeros(1, 3, 256, 256)).shape == (1, 3)  # maps of 16, 8 and 4
    with pytest.raises(ValueError, match="5 x 5 tokens does not fit attention over 4 x 4"):
        model(torch.zeros(1, 3, 288, 288))
    assert MODELS["efficientvit_m0"](image_size=288)(torch.zeros(2, 3, 288, 288)).shape[0] == 2


def test_shapes_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="width 100 is not divisible by heads 3"):
        CascadedGroupAttention(100, 3, 7, (3, 3, 3))
    with pytest.raises(ValueError, match="4 heads need 4 query kernels"):
        CascadedGroupAttention(64, 4, 7, (3, 3, 3))
    with pytest.raises(ValueError, match="at least 16, got 8"):
        MODELS["efficientvit_m0"](image_size=8)


def test_no_weight_decay_on_the_bias_tables():
    names = MODELS["efficientvit_m0"]().no_weight_decay()
    assert len(names) == 6
    assert "blocks1.0.mixer.m.attn.attention_biases" in names
