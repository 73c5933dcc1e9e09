"""The compiled deformable operator: golden outputs, naive twins, PyTorch's own checks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_data import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.accel.kernels import deform, deform_conv, deform_core
from sievit.accel.kernels.deform_shapes import Geometry
from sievit.accel.kernels.deform_torch import sampled
from sievit.models.families import dcn
from sievit.models.families.internimage import BlockStyle, InternImage
from sievit.pipeline.networks import create_to_run

CASES = cases("golden/dcn_core.npz")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(geometry: Geometry, size: tuple[int, int], channels: int, batch: int = 1, spread=1.5):
    """value, offset, weight of random numbers, no offset near a whole one: there the slope
    jumps, and the reference's positions are not exact enough to tell the sides apart."""
    rows, columns = geometry.out_size(*size)
    each = geometry.groups * geometry.samples
    offset = spread * rand(batch, rows, columns, 2 * each, seed=1)
    offset = offset.floor() + 0.25 + offset.remainder(1) / 2
    return (
        rand(batch, *size, channels),
        offset,
        rand(batch, rows, columns, each, seed=2),
    )


def options(geometry: Geometry) -> dict:
    return {name: getattr(geometry, name) for name in Geometry.__dataclass_fields__}


def geometry(**changes) -> Geometry:
    return replace(Geometry((3, 3), (1, 1), (1, 1), (1, 1), 2, 1.0, False), **changes)


def merged(offset: torch.Tensor, weight: torch.Tensor, groups: int, tail: int = 0) -> torch.Tensor:
    """DCNv4's tensor of ``offset`` and ``weight``; its tail is not to be read."""
    parts = offset.unflatten(-1, (groups, -1)), weight.unflatten(-1, (groups, -1))
    joined = torch.cat(parts, -1).flatten(-2)
    return torch.cat((joined, joined.new_full((*joined.shape[:-1], tail), math.nan)), -1)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, by norm."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def gradients(core, inputs, **given) -> list[torch.Tensor]:
    """The output, then the gradients of a fixed random product with it."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = core(*inputs, **given)
    out.backward(rand(*out.shape, seed=9).to(out))
    return [out.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("case", CASES)
def test_core_and_gradients_are_the_released_ones(core_cases, case):
    arrays, given = core_cases[case]
    inputs = [arrays[name].clone().requires_grad_() for name in ("input", "offset", "mask")]
    out = deform_core(*inputs, **given)
    assert (out - arrays["output_exact"]).abs().max() < 1e-10
    assert (out - arrays["output"]).abs().max() < 2e-5
    out.backward(arrays["cotangent"])
    for tensor, name in zip(inputs, ("input", "offset", "mask"), strict=True):
        assert (tensor.grad - arrays[f"grad_{name}"]).abs().max() < 2e-5, name


@pytest.mark.parametrize("case", CASES)
def test_merged_tensor_is_the_released_one(core_cases, case):
    arrays, given = core_cases[case]
    out = deform_conv(arrays["input"], arrays["dcnv4_offset_mask"], **given)
    assert (out - arrays["dcnv4_output_exact"]).abs().max() < 1e-10
    assert (out - arrays["dcnv4_output"]).abs().max() < 2e-5


def naive(value, offset, weight, shape: Geometry) -> torch.Tensor:
    """The equation, one sample after the other; value [batch, height, width, channels]."""
    _, height, width, channels = value.shape
    groups, samples = shape.groups, shape.samples
    out = torch.zeros(*offset.shape[:3], channels, dtype=value.dtype)
    kernel_points = dcn.kernel_points(shape.kernel, shape.remove_center)
    half = [d * (k - 1) // 2 for d, k in zip(shape.dilation, shape.kernel, strict=True)]
    for n, i, j, g in np.ndindex(*offset.shape[:3], groups):
        own = slice(g * channels // groups, (g + 1) * channels // groups)
        for k, (a, b) in enumerate(kernel_points):
            dx, dy = offset[n, i, j, 2 * (g * samples + k) :][:2].tolist()
            x = j * shape.stride[1] - shape.padding[1] + half[1]
            y = i * shape.stride[0] - shape.padding[0] + half[0]
            x += shape.offset_scale * (a * shape.dilation[1] - half[1] + dx)
            y += shape.offset_scale * (b * shape.dilation[0] - half[0] + dy)
            for row in (math.floor(y), math.floor(y) + 1):
                for column in (math.floor(x), math.floor(x) + 1):
                    if 0 <= row < height and 0 <= column < width:
                        share = (1 - abs(y - row)) * (1 - abs(x - column))
                        share *= weight[n, i, j, g * samples + k]
                        out[n, i, j, own] += share * value[n, row, column, own]
    return out


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    kernel=pairs,
    stride=pairs,
    padding=pairs,
    dilation=pairs,
    groups=st.integers(1, 3),
    each=st.integers(1, 5),
    scale=st.sampled_from((0.5, 1.0, 2.0)),
)
def test_any_geometry_is_its_equation(kernel, stride, padding, dilation, groups, each, scale):
    shape = Geometry(kernel, stride, padding, dilation, groups, scale, False)
    inputs = tensors(shape, (5, 7), each * groups)
    expected = naive(*inputs, shape)
    out = deform_core(*inputs, **options(shape))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    out = deform_conv(inputs[0], merged(*inputs[1:], groups, tail=3), **options(shape))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    plain = [t.unflatten(-1, (groups, shape.samples, -1)) for t in inputs[1:]]
    out = sampled(inputs[0], plain[0], plain[1].squeeze(-1), shape)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    each=st.integers(1, 40),
    kernel=st.sampled_from((1, 3, 5)),
    removed=st.booleans(),
    dtype=st.sampled_from((torch.float64, torch.float32)),
)
def test_output_and_gradients_are_the_references(size, batch, groups, each, kernel, removed, dtype):
    shape = geometry(
        kernel=(kernel, kernel), padding=(kernel // 2,) * 2, groups=groups,
        remove_center=removed and kernel > 1, offset_scale=0.7,
    )  # fmt: skip
    inputs = [t.to(dtype) for t in tensors(shape, size, each * groups, batch)]
    found = gradients(deform_core, inputs, **options(shape))
    expected = gradients(dcn.deform_core, [t.double() for t in inputs], **options(shape))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert error(a, b) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_types_lose_only_their_own_rounding(dtype):
    shape = geometry(groups=4)
    inputs = [t.to(dtype) for t in tensors(shape, (30, 41), 64)]
    found = gradients(deform_core, inputs, **options(shape))
    expected = gradients(dcn.deform_core, [t.double() for t in inputs], **options(shape))
    assert [t.dtype for t in found] == [dtype] * 4
    assert max(map(error, found, expected)) < TOLERANCE[dtype]


def test_a_far_pixel_is_as_exact_as_a_near_one():
    shape = geometry(groups=1, padding=(0, 0), kernel=(1, 1))
    offset = torch.full((1, 1, 4096, 2), 0.3)
    value = torch.arange(4096.0).remainder(2).view(1, 1, 4096, 1)
    out = deform_core(value, offset * torch.tensor([1.0, 0.0]), torch.ones(1, 1, 4096, 1),
                      **options(shape))  # fmt: skip
    expected = torch.tensor([0.3, 0.7]).repeat(2048)[:-1]
    torch.testing.assert_close(out.flatten()[:-1], expected, rtol=0, atol=1e-6)


def test_reference_and_kernel_agree_by_finite_differences():
    shape = geometry(kernel=(3, 2), dilation=(1, 2), stride=(2, 1))
    inputs = [t.requires_grad_() for t in tensors(shape, (4, 5), 6, spread=0.3)]
    assert torch.autograd.gradcheck(lambda *t: deform_core(*t, **options(shape)), inputs)
    joined = merged(*inputs[1:], shape.groups).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *t: deform_conv(*t, **options(shape)), (inputs[0], joined)
    )


def test_merged_gradients_are_those_of_its_parts_and_zero_beyond():
    shape = geometry(groups=3)
    value, offset, weight = tensors(shape, (6, 7), 12, batch=2)
    found = gradients(deform_conv, (value, merged(offset, weight, 3, tail=5)), **options(shape))
    apart = gradients(deform_core, (value, offset, weight), **options(shape))
    assert torch.equal(found[0], apart[0])
    assert torch.equal(found[1], apart[1])
    assert torch.equal(found[2][..., :-5], merged(apart[2], apart[3], 3))
    assert not found[2][..., -5:].any()


def test_threads_do_not_change_a_bit():
    shape = geometry(groups=2)
    inputs = [t.float() for t in tensors(shape, (9, 11), 16, batch=3)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7, 16):
            torch.set_num_threads(threads)
            results.append(gradients(deform_core, inputs, **options(shape)))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


def test_every_element_is_written():
    shape = geometry(groups=3, stride=(2, 2))
    inputs = [t.float() for t in tensors(shape, (7, 9), 15, batch=2)]
    joined = torch.nn.functional.pad(merged(*inputs[1:], 3), (0, 4))
    torch.use_deterministic_algorithms(True)  # what is allocated starts as NaN
    try:
        assert torch.empty(3).isnan().all()
        results = gradients(deform_core, inputs, **options(shape))
        results += gradients(deform_conv, (inputs[0], joined), **options(shape))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(t.isnan().any() for t in results)


def test_inputs_of_any_strides():
    shape = geometry(groups=2)
    inputs = tensors(shape, (5, 7), 8, batch=2)
    expected = gradients(deform_core, inputs, **options(shape))
    strided = [t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in inputs]
    assert not any(t.is_contiguous() for t in strided)
    found = gradients(deform_core, strided, **options(shape))
    assert all(map(torch.equal, found, expected))
    value = inputs[0].clone().requires_grad_()
    deform_core(value, *inputs[1:], **options(shape)).sum().backward()  # an expanded gradient
    ones = inputs[0].clone().requires_grad_()
    out = dcn.deform_core(ones, *inputs[1:], **options(shape))
    out.backward(torch.ones_like(out))
    torch.testing.assert_close(value.grad, ones.grad)


def test_what_is_not_a_number_stays_where_it_is():
    shape = geometry(groups=1, kernel=(1, 1), padding=(0, 0))
    value, weight = torch.ones(1, 4, 6, 2), torch.ones(1, 4, 6, 1)
    offset = torch.full((1, 4, 6, 2), 0.25)
    value[0, 2, 3, 1] = math.inf
    out = deform_core(value, offset, weight, **options(shape))
    reached = torch.zeros(4, 6, 2, dtype=bool)
    reached[1:3, 2:4, 1] = True
    assert torch.equal(~out[0].isfinite(), reached)
    offset[0, 0, 0, 0] = math.nan
    out = deform_core(torch.ones(1, 4, 6, 2), offset, weight, **options(shape))
    assert torch.equal(out[0].isnan().any(-1).nonzero(), torch.tensor([[0, 0]]))
    offset[0, 0, 0, 0], offset[0, 1, 1, 1] = math.inf, -1e30
    out = deform_core(torch.ones(1, 4, 6, 2), offset, weight, **options(shape))
    assert not out[0, 0, 0].any()
    assert not out[0, 1, 1].any()
    assert out.isfinite().all()


def test_empty_batch():
    out = deform_core(torch.zeros(0, 4, 5, 4), torch.zeros(0, 4, 5, 36), torch.zeros(0, 4, 5, 18),
                      groups=2)  # fmt: skip
    assert out.shape == (0, 4, 5, 4)


@pytest.mark.parametrize("joined", [False, True])
def test_pytorch_accepts_the_operator(joined):
    shape = geometry(groups=2)
    value, offset, weight = (t.float() for t in tensors(shape, (4, 5), 6))
    numbers = [[3, 3], [1, 1], [1, 1], [1, 1], 2, 1.0, False]
    inputs = (value, merged(offset, weight, 2), None) if joined else (value, offset, weight)
    inputs = [t if t is None else t.requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.sievit.deform_conv.default, (*inputs, *numbers))


def test_a_compiled_and_an_exported_module_hold_it_whole():
    torch.manual_seed(0)
    module = dcn.DCNv3(8, 2, core=deform_core)
    torch.nn.init.normal_(module.offset.weight, std=0.2)
    x = torch.randn(2, 6, 7, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    compiled(x).square().sum().backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(x).square().sum().backward()
    torch.testing.assert_close(found, [p.grad for p in module.parameters()])
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert "sievit.deform_conv" in str(program.graph)
    torch.testing.assert_close(program.module()(x[:1]), module(x[:1]))


def test_autocast_casts_what_a_softmax_left_in_float32():
    module = dcn.DCNv3(8, 2, core=deform_core)
    x = torch.randn(1, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert error(out, module(x).double()) < 2e-2
    out.sum().backward()


@pytest.mark.parametrize("style", [BlockStyle(), BlockStyle("dcnv4", bias=False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_whole_networks_with_the_kernel_as_their_core(style, dtype):
    torch.manual_seed(0)
    model = InternImage(16, (1, 1, 2, 1), style, num_classes=10).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 3, 64, 96, dtype=dtype)
    expected = model(x)
    for module in model.modules():
        if isinstance(module, dcn.DeformSampling):
            module.core = deform_core
    assert error(model(x), expected.double()) < (1e-12 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("name", ["internimage_t", "flash_internimage_t"])
def test_networks_that_run_have_the_kernel(name):
    torch.manual_seed(0)
    model = create_to_run(name).double().eval()
    samplings = [m for m in model.modules() if isinstance(m, dcn.DeformSampling)]
    assert len(samplings) == 30
    assert all(m.core is deform_core for m in samplings)
    for parameter in model.parameters():
        if not parameter.any():  # the first values leave offsets, or the operator, at zero
            torch.nn.init.normal_(parameter, std=0.05)
    x = rand(1, 3, 96, 64)
    with torch.inference_mode():
        found = model(x)
        for module in samplings:
            module.core = dcn.deform_core
        assert error(found, model(x)) < 1e-9
    given = create_to_run(name, core=dcn.deform_core)
    assert next(m for m in given.modules() if isinstance(m, dcn.DeformSampling)).core is (
        dcn.deform_core
    )


def test_a_core_without_a_merged_form_gets_the_parts():
    torch.manual_seed(0)
    module = dcn.DCNv4(16, 2, core=deform_core).double()
    torch.nn.init.normal_(module.offset_mask.weight, std=0.3)
    x = rand(1, 4, 5, 16)
    merged_form = module(x)
    module.sampling.core = lambda *tensors, **geometry: deform_core(*tensors, **geometry)
    assert torch.equal(module(x), merged_form)


def test_where_no_kernel_is_present_pytorch_does_it(monkeypatch, caplog):
    shape = geometry(groups=2)
    inputs = tensors(shape, (5, 7), 8, batch=2)
    expected = gradients(deform_core, inputs, **options(shape))
    joined = (inputs[0], merged(*inputs[1:], 2, tail=2))
    expected += gradients(deform_conv, joined, **options(shape))
    monkeypatch.setitem(deform.PRESENT, "numba", False)
    deform._say_slower.cache_clear()
    found = gradients(deform_core, inputs, **options(shape))
    found += gradients(deform_conv, joined, **options(shape))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert caplog.text.count("numba is not installed") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": torch.zeros(1, 4, 4, 18)}, r"offset of shape \(1, 4, 4, 36\), got"),
        ({"weight": torch.zeros(1, 4, 4, 9)}, r"weight of shape .*18\), got \(1, 4, 4, 9\)"),
        ({"offset": torch.zeros(1, 5, 4, 36)}, r"got \(1, 5, 4, 36\)"),
        ({"weight": torch.zeros(1, 4, 4, 18).double()}, "is torch.float64 and value torch.float32"),
        ({"offset": torch.zeros(1, 4, 4, 36, device="meta")}, "offset is on meta and value on cpu"),
        ({"value": torch.zeros(1, 4, 4, 8).long()}, "floating type, got torch.int64"),
        ({"value": torch.zeros(4, 4, 8)}, r"got \(4, 4, 8\)"),
        ({"groups": 3}, "divisible by groups = 3"),
        ({"groups": 0}, "groups must be 1 or more, got 0"),
        ({"stride": 0}, r"stride must be .* of 1 or more, got \(0, 0\)"),
        ({"kernel": (3, 2), "remove_center": True}, "odd square kernel, got 3 x 2"),
        ({"kernel": 9}, "a map of 4 x 4 is smaller than the kernel"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, message):
    given = {
        "value": torch.zeros(1, 4, 4, 8),
        "offset": torch.zeros(1, 4, 4, 36),
        "weight": torch.zeros(1, 4, 4, 18),
        "groups": 2,
    } | change
    with pytest.raises(ValueError, match=message):
        deform_core(**given)


def test_a_narrow_merged_tensor_is_named():
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4, 54\) or wider, got \(1, 4, 4, 53\)"):
        deform_conv(torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 4, 53), groups=2)
