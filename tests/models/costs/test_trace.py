"""What a module costs, read off its own forward, against counts by hand and by torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sievit.models import create, trace
from sievit.workload import Attention, Conv, Elementwise, Gemm, Unknown

PUBLISHED = {  # timm's counts: params, MACs, of these in convolutions and linear layers
    "deit_tiny": (5_717_416, 1_253_683_200, 1_074_851_328),
    "deit_small": (22_050_664, 4_598_882_304, 4_241_218_560),
    "deit_base": (86_567_656, 17_563_828_224, 16_848_500_736),
}


def learned_macs(workload):
    return sum(
        op.macs
        for op in workload.ops
        if isinstance(op, Conv) or (isinstance(op, Gemm) and op.weight)
    )


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def torch_macs(model, *inputs):
    """PyTorch's own counter over a real run, with attention written out as products."""
    counter = FlopCounterMode(display=False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model.eval()(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts_to_the_unit(name):
    with torch.device("meta"):
        model = create(name)
    workload = trace(model)
    got = (workload.params, workload.macs, learned_macs(workload))
    assert got == PUBLISHED[name]
    assert workload.name == name
    assert workload.unknown == ()
    heads = model.blocks[0].attn.heads
    assert [(a.name, a.heads, a.queries, a.keys, a.key_dim, a.value_dim, a.windows) for a in
            workload.attention] == [
        (f"blocks.{i}.attn", heads, 197, 197, 64, 64, 1) for i in range(12)
    ]  # fmt: skip


def test_the_operations_of_a_vision_transformer_in_order():
    workload = trace(create("deit_tiny", depth=1, num_classes=10), 32)
    n, d = 5, 192
    tokens = n * d
    assert workload.ops == (
        # the stored 14 x 14 positions, resampled
        Elementwise("upsample", "upsample", 0, 4 * d, 196 * d),
        Conv("patch_embed.proj", 3, d, (32, 32), (2, 2), (16, 16), (16, 16), bias=True),
        Elementwise("add", "add", 2 * 4 * d, 4 * d),
        Elementwise("add_2", "add", 0, d, 2 * d),
        Elementwise("cat", "cat", tokens, tokens),
        Elementwise("blocks.0.norm1", "layer_norm", tokens, tokens, 2 * d),
        Gemm("blocks.0.attn.qkv", n, d, 3 * d, bias=True),
        Attention("blocks.0.attn", 3, n, n, 64, 64),
        Gemm("blocks.0.attn.proj", n, d, d, bias=True),
        Elementwise("blocks.0.add", "add", 2 * tokens, tokens),
        Elementwise("blocks.0.norm2", "layer_norm", tokens, tokens, 2 * d),
        Gemm("blocks.0.mlp.fc1", n, d, 4 * d, bias=True),
        Elementwise("blocks.0.mlp.act", "gelu", 4 * tokens, 4 * tokens),
        Gemm("blocks.0.mlp.fc2", n, 4 * d, d, bias=True),
        Elementwise("blocks.0.add_2", "add", 2 * tokens, tokens),
        Elementwise("norm", "layer_norm", tokens, tokens, 2 * d),
        Gemm("head", 1, d, 10, bias=True),
    )


@pytest.mark.parametrize(
    ("name", "overrides", "size"),
    [
        ("deit_tiny_distilled", {"depth": 2}, 64),
        ("dinov2_small", {"depth": 2}, 56),
        ("dinov2_small_registers", {"depth": 1}, 56),
        ("efficientvit_m0", {}, 224),
        ("efficientvit_m1", {}, 256),
        ("levit_128s", {}, 224),
        ("resnet50", {}, 64),
        ("regnety_002", {}, 64),
        ("efficientnet_b0", {}, 64),
        ("convnext_tiny", {}, 64),
    ],
)
def test_products_equal_torchs_own_count(name, overrides, size):
    with torch.device("meta"):
        model = create(name, **overrides)
        image = torch.empty(1, 3, size, size)
    workload = trace(model, size)
    assert workload.macs == torch_macs(model, image)
    assert workload.params == parameters(model)
    assert workload.unknown == ()


def traced(model, *inputs):
    workload = trace(model, inputs)
    assert workload.params == parameters(model)
    return workload


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (
            nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6),
            (1, 6, 9, 7),
            Conv("conv", 6, 6, (9, 7), (5, 4), (3, 3), (2, 2), groups=6, bias=True),
        ),
        (
            nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, bias=False),
            (1, 4, 5, 5),
            Conv("conv", 4, 6, (5, 5), (10, 10), (4, 4), (2, 2), transposed=True),
        ),
        (
            nn.Conv1d(4, 8, 3, bias=False),
            (1, 4, 10),
            Conv("conv", 4, 8, (1, 10), (1, 8), (1, 3)),
        ),
        (
            nn.Conv3d(2, 4, (2, 3, 3), bias=False),
            (1, 2, 4, 5, 6),
            Conv("conv", 2, 4, (20, 6), (9, 4), (6, 3)),
        ),
        (nn.Linear(8, 5, bias=False), (1, 3, 2, 8), Gemm("linear", 6, 8, 5)),
        (nn.BatchNorm2d(4), (1, 4, 3, 3), Elementwise("batch_norm", "batch_norm", 44, 36, 8)),
        (nn.GroupNorm(2, 4), (1, 4, 3, 3), Elementwise("group_norm", "group_norm", 36, 36, 8)),
        (nn.MaxPool2d(2), (1, 4, 6, 6), Elementwise("max_pool", "max_pool", 144, 36)),
        (nn.AvgPool2d(2), (1, 4, 6, 6), Elementwise("avg_pool", "avg_pool", 144, 36)),
        (nn.AdaptiveAvgPool2d(1), (1, 4, 6, 6), Elementwise("mean", "mean", 144, 4)),
        (nn.Upsample(scale_factor=2), (1, 4, 3, 3), Elementwise("u", "upsample", 36, 144)),
        (nn.Hardswish(), (1, 4), Elementwise("h", "hardswish", 4, 4)),
        (nn.Dropout(0.5), (1, 4), None),
        (nn.Flatten(), (1, 4, 2), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_single_layers(layer, shape, expected):
    workload = traced(nn.Sequential(layer), torch.empty(shape))
    wanted = () if expected is None else (type(expected)(**{**vars(expected), "name": "0"}),)
    assert workload.ops == wanted
    assert workload.macs == torch_macs(layer, torch.empty(shape))


def test_a_transposed_convolution_equals_its_definition():
    layer = nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1)
    (op,) = traced(layer, torch.empty(1, 4, 5, 5)).ops
    assert op.macs == 5 * 5 * 4 * 6 * 4 * 4
    assert op.inner == 2 * 2 * 4  # of 16 taps, those that meet an input
    assert op.params == 4 * 6 * 16 + 6


class Bias(nn.Module):
    """Attention with a learned table gathered into a bias; scores ``eager`` or fused."""

    def __init__(self, eager):
        super().__init__()
        self.eager = eager
        self.qkv = nn.Linear(8, 24, bias=False)
        self.table = nn.Parameter(torch.zeros(2, 9))
        self.register_buffer("index", torch.arange(25).reshape(5, 5) % 9)

    def forward(self, x):
        q, k, v = self.qkv(x).view(1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        bias = self.table[:, self.index]
        if self.eager:
            return (q @ k.transpose(-1, -2) * 0.5 + bias).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])


@pytest.mark.parametrize("eager", [True, False])
def test_a_learned_bias_belongs_to_its_attention(eager):
    workload = traced(Bias(eager), torch.empty(1, 5, 8))
    assert workload.ops == (
        Gemm("qkv", 5, 8, 24),
        Elementwise("gather", "gather", 50, 50),
        *([] if not eager else [op for op in workload.ops if op.name.startswith("copy")]),
        Attention("attention", 2, 5, 5, 4, 4, bias_params=18),
    )
    assert workload.macs == torch_macs(Bias(eager), torch.empty(1, 5, 8))


class Forms(nn.Module):
    """One attention, three ways to write it."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.mha = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        if self.form.startswith("mha"):
            return self.mha(x, x, x, need_weights=self.form == "mha with weights")[0]
        q, k, v = F.linear(x, self.mha.in_proj_weight, self.mha.in_proj_bias).chunk(3, -1)
        q, k, v = (t.view(1, -1, 4, 4).transpose(1, 2) for t in (q, k, v))
        if self.form == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.form == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) / 2
            y = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        else:
            y = F.dropout((q / 2 @ k.mT).softmax(-1), 0.1, self.training) @ v
        return self.mha.out_proj(y.transpose(1, 2).reshape(1, -1, 16))


@pytest.mark.parametrize("form", ["fused", "eager", "einsum", "mha", "mha with weights"])
def test_each_form_is_one_attention(form):
    model, x = Forms(form), torch.empty(1, 7, 16)
    workload = traced(model, x)
    (attention,) = workload.attention
    shape = (attention.heads, attention.queries, attention.keys, attention.key_dim)
    assert (*shape, attention.value_dim, attention.windows) == (4, 7, 7, 4, 4, 1)
    products = [op for op in workload.ops if isinstance(op, Gemm)]
    assert [(op.rows, op.inner, op.cols, op.bias, op.weight) for op in products] == [
        (7, 16, 48, True, True),
        (7, 16, 16, True, True),
    ]
    assert not any(getattr(op, "kind", "") == "softmax" for op in workload.ops)
    assert workload.macs == torch_macs(model, torch.empty(1, 7, 16))
    first, last = (workload.ops.index(op) for op in products)
    assert first < workload.ops.index(attention) < last


def test_products_of_activations_and_other_softmaxes():
    class Gates(nn.Module):
        def forward(self, x):
            return x.softmax(-1) @ x.mT

    workload = traced(Gates(), torch.empty(1, 5, 8))
    assert workload.ops == (
        Elementwise("softmax", "softmax", 40, 40),
        Gemm("matmul", 5, 8, 5, weight=False),
    )


def test_views_are_free_and_copies_are_not():
    class Layout(nn.Module):
        def forward(self, x):
            y = x.transpose(1, 2).reshape(1, 2, 6).unsqueeze(0).expand(2, 1, 2, 6)
            return torch.cat([y, y.contiguous()]).roll(1, 0)

    workload = traced(Layout(), torch.empty(1, 4, 3))
    assert [(op.kind, op.inputs, op.outputs) for op in workload.ops] == [
        ("copy", 12, 12),
        ("copy", 12, 24),
        ("cat", 36, 48),
        ("roll", 48, 48),
    ]


def test_an_operation_of_unknown_cost_is_listed():
    class Spectral(nn.Module):
        def forward(self, x):
            return torch.fft.rfft2(x).real + 1

    workload = traced(Spectral(), torch.empty(1, 8, 8))
    assert workload.unknown == (Unknown("_fft_r2c", "_fft_r2c", 64, 40),)


def test_sampling_pooling_and_a_users_own_functions():
    class Squeeze(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            gate = self.fc(F.adaptive_avg_pool2d(x, 1)).sigmoid()
            grid = torch.zeros(1, 3, 3, 2)
            return F.grid_sample(x * gate, grid, align_corners=False)

    workload = traced(Squeeze(), torch.empty(1, 4, 6, 6))
    assert [getattr(op, "kind", "conv") for op in workload.ops] == [
        "mean", "conv", "sigmoid", "fill", "mul", "grid_sample",
    ]  # fmt: skip
    assert workload.ops[4].inputs == 144 + 4
    assert (workload.ops[5].inputs, workload.ops[5].outputs) == (144 + 18, 36)
