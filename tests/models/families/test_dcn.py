"""The deformable operator and its modules: golden outputs, a naive twin, and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_data import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.models.families.dcn import DCNv3, DCNv4, deform_core, kernel_points, split_offset_mask

CASES = cases("golden/dcn_core.npz")


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_pixel(image, y, x):
    """Bilinear value of ``image`` [height, width, channels] at (y, x); zero outside."""
    total = torch.zeros(image.shape[-1], dtype=image.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column]
    return total


def naive_core(value, offset, weight, *, kernel, stride, padding, dilation, groups, offset_scale):
    """The sampling equation, one output number after the other; (height, width) pairs."""
    batch, _, _, channels = value.shape
    (kh, kw), dim = kernel, channels // groups
    half_y, half_x = dilation[0] * (kh - 1) // 2, dilation[1] * (kw - 1) // 2
    out = torch.zeros(*offset.shape[:3], channels, dtype=value.dtype)
    for n, i, j, g in np.ndindex(batch, *offset.shape[1:3], groups):
        image = value[n, :, :, g * dim : (g + 1) * dim]
        for a in range(kw):
            for b in range(kh):
                k = g * kh * kw + a * kh + b
                dx, dy = offset[n, i, j, 2 * k].item(), offset[n, i, j, 2 * k + 1].item()
                x = j * stride[1] - padding[1] + half_x
                y = i * stride[0] - padding[0] + half_y
                x += offset_scale * (a * dilation[1] - half_x + dx)
                y += offset_scale * (b * dilation[0] - half_y + dy)
                out[n, i, j, g * dim : (g + 1) * dim] += weight[n, i, j, k] * naive_pixel(
                    image, y, x
                )
    return out


@pytest.mark.parametrize("case", CASES)
def test_core_and_gradients_are_the_released_ones(core_cases, case):
    arrays, geometry = core_cases[case]
    inputs = [arrays[name].clone().requires_grad_() for name in ("input", "offset", "mask")]
    out = deform_core(*inputs, **geometry)
    assert (out - arrays["output_exact"]).abs().max() < 1e-10
    assert (out - arrays["output"]).abs().max() < 2e-5
    out.backward(arrays["cotangent"])
    for tensor, name in zip(inputs, ("input", "offset", "mask"), strict=True):
        assert (tensor.grad - arrays[f"grad_{name}"]).abs().max() < 2e-5, name


@pytest.mark.parametrize("case", CASES)
def test_merged_tensor_of_dcnv4_is_the_released_one(core_cases, case):
    arrays, geometry = core_cases[case]
    samples = len(kernel_points(geometry["kernel"], geometry["remove_center"]))
    offset, weight = split_offset_mask(arrays["dcnv4_offset_mask"], geometry["groups"], samples)
    out = deform_core(arrays["input"], offset, weight, **geometry)
    assert (out - arrays["dcnv4_output_exact"]).abs().max() < 1e-10
    assert (out - arrays["dcnv4_output"]).abs().max() < 2e-5


MODULES = {
    ("dcnv3_module", "plain"): lambda: DCNv3(32, 2),
    ("dcnv3_module", "cfs_dw5"): lambda: DCNv3(32, 2, dw_kernel=5, center_feature_scale=True),
    ("dcnv4_module", "plain_g2"): lambda: DCNv4(32, 2),
    ("dcnv4_module", "cfs"): lambda: DCNv4(32, 2, center_feature_scale=True),
}


@pytest.mark.parametrize(
    ("file", "case"),
    [(f, c) for f in ("dcnv3_module", "dcnv4_module") for c in cases(f"golden/{f}.npz")],
)
def test_modules_give_the_released_outputs(golden, file, case):
    with np.load(golden(f"golden/{file}.npz")) as data:
        arrays = {k.removeprefix(case + "/"): torch.tensor(data[k]) for k in data if case in k}
    module = MODULES[file, case]().double().eval()
    state = {k.removeprefix("sd/"): v for k, v in arrays.items() if k.startswith("sd/")}
    assert list(module.state_dict()) == list(state)
    module.load_state_dict(state)
    error = (module(arrays["x"]) - arrays["y"]).abs().max() / arrays["y"].abs().max()
    assert error < 1e-5


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(derandomize=True, deadline=None, max_examples=15)
@given(kernel=pairs, stride=pairs, padding=pairs, dilation=pairs, groups=st.integers(1, 3))
def test_core_is_its_equation(kernel, stride, padding, dilation, groups):
    height, width = 6, 8
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    rows = (height + 2 * padding[0] - spans[0] - 1) // stride[0] + 1
    columns = (width + 2 * padding[1] - spans[1] - 1) // stride[1] + 1
    samples = kernel[0] * kernel[1]
    value = rand(1, height, width, 2 * groups)
    offset = 1.5 * rand(1, rows, columns, groups * samples * 2, seed=1)
    weight = rand(1, rows, columns, groups * samples, seed=2)
    geometry = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    geometry |= {"groups": groups, "offset_scale": 0.7}
    out = deform_core(value, offset, weight, **geometry)
    expected = naive_core(value, offset, weight, **geometry)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_zero_offsets_and_equal_weights_are_average_pooling():
    value = rand(2, 5, 7, 4)
    out = deform_core(value, torch.zeros(2, 5, 7, 36).double(), torch.full((2, 5, 7, 18), 1 / 9),
                      groups=2)  # fmt: skip
    expected = F.avg_pool2d(value.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=True)
    torch.testing.assert_close(out, expected.permute(0, 2, 3, 1), rtol=0, atol=1e-8)


def test_weight_one_at_the_centre_is_the_identity():
    value = rand(1, 5, 7, 4)
    weight = F.one_hot(torch.tensor(4), 9).double().expand(1, 5, 7, 9)
    out = deform_core(value, torch.zeros(1, 5, 7, 18).double(), weight)
    torch.testing.assert_close(out, value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dx", "dy"), [(1, 0), (0, 1), (2, 0), (-1, 2)])
def test_whole_offsets_shift_x_first(dx, dy):
    value = rand(1, 6, 9, 2)
    weight = F.one_hot(torch.tensor(4), 9).double().expand(1, 6, 9, 9)
    offset = torch.tensor([dx, dy] * 9).double().expand(1, 6, 9, 18)
    padded = F.pad(value, (0, 0, 3, 3, 3, 3))
    expected = padded[:, 3 + dy : 9 + dy, 3 + dx : 12 + dx]
    torch.testing.assert_close(deform_core(value, offset, weight), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1, 2])
def test_samples_run_down_the_columns_and_scale_with_the_offset_scale(scale):
    value = rand(1, 6, 9, 2)
    padded = F.pad(value, (0, 0, 2, 2, 2, 2))
    for k, (a, b) in enumerate((a, b) for a in range(3) for b in range(3)):
        weight = F.one_hot(torch.tensor(k), 9).double().expand(1, 6, 9, 9)
        offset = torch.zeros(1, 6, 9, 18).double()
        out = deform_core(value, offset, weight, offset_scale=float(scale))
        y, x = 2 + scale * (b - 1), 2 + scale * (a - 1)
        torch.testing.assert_close(out, padded[:, y : y + 6, x : x + 9], rtol=0, atol=1e-12)


def test_gradients_by_finite_differences():
    value, offset = rand(1, 4, 3, 4), 0.4 * torch.rand(1, 4, 3, 36, dtype=torch.float64) + 0.1
    weight = rand(1, 4, 3, 18, seed=1)
    inputs = [t.requires_grad_() for t in (value, offset, weight)]
    assert torch.autograd.gradcheck(lambda *t: deform_core(*t, groups=2), inputs)


def test_output_is_linear_in_the_weights():
    value, offset = rand(1, 5, 6, 4), rand(1, 5, 6, 18, seed=1)
    one, two = rand(1, 5, 6, 9, seed=2), rand(1, 5, 6, 9, seed=3)
    both = deform_core(value, offset, 2 * one - 3 * two)
    alone = 2 * deform_core(value, offset, one) - 3 * deform_core(value, offset, two)
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-12)


def test_dcnv4_with_softmax_weights_is_dcnv3():
    value, offset = rand(2, 5, 6, 8), rand(2, 5, 6, 36, seed=1)
    logits = rand(2, 5, 6, 2, 9, seed=2)
    merged = torch.cat((offset.view(2, 5, 6, 2, 18), logits.softmax(-1)), dim=-1).flatten(-2)
    merged = F.pad(
        merged, (0, 2), value=7.25
    )  # 54 entries, padded to 56 with what must not be read
    v4 = deform_core(value, *split_offset_mask(merged, 2, 9), groups=2)
    v3 = deform_core(value, offset, logits.softmax(-1).flatten(-2), groups=2)
    torch.testing.assert_close(v4, v3, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_lose_only_their_own_rounding(dtype):
    value, offset, weight = rand(1, 40, 40, 4), rand(1, 40, 40, 18, seed=1), rand(1, 40, 40, 9)
    low = [t.to(dtype) for t in (value, offset, weight)]
    out = deform_core(*low)
    assert out.dtype == dtype
    expected = deform_core(*(t.double() for t in low))
    worst = (out - expected).abs().max() / expected.abs().max()
    assert worst < torch.finfo(dtype).eps


def test_a_fresh_dcnv3_is_the_mean_of_the_window():
    module = DCNv3(8, 2)
    x = torch.randn(1, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    value = module.input_proj(x).permute(0, 3, 1, 2)
    mean = F.avg_pool2d(value, 3, 1, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x), module.output_proj(mean))


def test_dcnv4_reads_maps_and_tokens_alike():
    torch.manual_seed(0)
    module = DCNv4(32, 2, dw_kernel=3)
    torch.nn.init.normal_(module.offset_mask.weight, std=0.1)
    x = torch.randn(2, 4, 6, 32)
    out = module(x)
    torch.testing.assert_close(module(x.flatten(1, 2), (4, 6)), out.flatten(1, 2))
    assert not torch.allclose(module(x.flatten(1, 2), (6, 4)), out.flatten(1, 2))
    square = x[:, :, :4].contiguous()
    torch.testing.assert_close(module(square.flatten(1, 2)), module(square).flatten(1, 2))


def test_dcnv4_without_projections_is_the_bare_operator():
    module = DCNv4(16, 1, pointwise=False)
    torch.nn.init.normal_(module.offset_mask.bias, std=0.5)
    x = torch.randn(1, 4, 5, 16, generator=torch.Generator().manual_seed(0))
    parts = split_offset_mask(module.offset_mask(x), 1, 9)
    torch.testing.assert_close(module(x), deform_core(x, *parts))
    assert [name for name, _ in module.named_parameters()] == [
        "offset_mask.weight",
        "offset_mask.bias",
    ]


def test_parameters_are_the_published_ones():
    assert sum(p.numel() for p in DCNv3(64, 4).parameters()) == 16108
    assert DCNv4(64, 4).offset_mask.weight.shape == (112, 64)
    assert DCNv4(64, 4, remove_center=True).offset_mask.weight.shape == (96, 64)


def test_a_core_can_be_passed_in_and_sees_the_geometry():
    seen = {}

    def core(value, offset, weight, **geometry):
        seen.update(geometry, shapes=(value.shape, offset.shape, weight.shape))
        return value

    DCNv3(32, 2, kernel=5, dilation=2, offset_scale=0.5, core=core)(torch.zeros(1, 6, 7, 32))
    assert seen["shapes"] == ((1, 6, 7, 32), (1, 6, 7, 100), (1, 6, 7, 50))
    assert {k: seen[k] for k in seen if k != "shapes"} == {
        "kernel": 5, "stride": 1, "padding": 4, "dilation": 2, "groups": 2,
        "offset_scale": 0.5, "remove_center": False,
    }  # fmt: skip


def test_what_does_not_fit_is_named():
    value = torch.zeros(1, 4, 4, 8)
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 36\) and \(1, 4, 4, 18\)"):
        deform_core(value, torch.zeros(1, 4, 4, 18), torch.zeros(1, 4, 4, 18), groups=2)
    with pytest.raises(ValueError, match="divisible by groups = 3"):
        deform_core(value, torch.zeros(1, 4, 4, 54), torch.zeros(1, 4, 4, 27), groups=3)
    with pytest.raises(ValueError, match="odd square kernel, got 2 x 3"):
        kernel_points((2, 3), remove_center=True)
    with pytest.raises(ValueError, match="kernel must be odd"):
        DCNv3(8, 2, kernel=4)
    with pytest.raises(ValueError, match="channels 10 are not divisible by groups 4"):
        DCNv4(10, 4)
