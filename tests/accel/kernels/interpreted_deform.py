"""Run by `test_deform_gpu` in a process of its own with TRITON_INTERPRET=1: the GPU
kernels on the CPU, JSON of [case, type, errors by norm of output and
gradients]."""

import json
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F

from sievit.accel.kernels import deform_gpu
from sievit.accel.kernels.deform_shapes import Geometry
from sievit.accel.kernels.deform_torch import sampled

PLAIN = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 2, 1.0, False)
UNEVEN = Geometry((3, 3), (2, 1), (1, 1), (1, 2), 3, 0.7, True)
EVEN = Geometry((4, 2), (1, 1), (2, 0), (1, 1), 1, 2.0, False)
STEPS = Geometry((3, 3), (2, 2), (1, 1), (1, 1), 1, 1.0, False)

# geometry, size, channels, batch, type, width of the merged tensor's tail or None
CASES = {
    "dcnv3": (PLAIN, (5, 6), 32, 2, "float32", None),
    "dcnv4": (PLAIN, (7, 9), 16, 1, "float32", 5),
    "uneven, centre removed": (UNEVEN, (7, 9), 15, 1, "float32", 0),
    "even kernel": (EVEN, (6, 5), 24, 1, "float64", None),
    "one pixel": (replace(PLAIN, groups=1), (1, 1), 3, 2, "float32", None),
    "wide group": (STEPS, (4, 5), 160, 1, "float32", 2),
    "half": (PLAIN, (4, 6), 32, 1, "float16", None),
    "bfloat16": (PLAIN, (4, 6), 32, 1, "bfloat16", 2),
}


def inputs(shape, size, channels, batch, dtype, tail):
    rows, columns = shape.out_size(*size)
    each = shape.groups * shape.samples
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(batch, *size, channels, generator=generator)
    offset = 1.5 * torch.randn(batch, rows, columns, shape.groups, 2 * each // shape.groups,
                               generator=generator)  # fmt: skip
    offset = offset.floor() + 0.25 + offset.remainder(1) / 2  # where the slope does not jump
    weight = torch.randn(*offset.shape[:-1], each // shape.groups, generator=generator)
    grad = torch.randn(batch, rows, columns, channels, generator=generator)
    if tail is None:
        tensors = [value, offset.flatten(-2), weight.flatten(-2), grad]
    else:
        joined = torch.cat((offset, weight), -1).flatten(-2)
        tensors = [value, F.pad(joined, (0, tail), value=float("nan")), None, grad]
    return [t if t is None else t.to(getattr(torch, dtype)) for t in tensors]


def expected(value, offset, weight, grad, shape):
    """The same out of PyTorch's operations in float64."""
    leaves = [t.double().requires_grad_() for t in (value, offset, weight) if t is not None]
    groups, samples = shape.groups, shape.samples
    if weight is None:
        joined = leaves[1][..., : 3 * groups * samples].unflatten(-1, (groups, 3 * samples))
        places = joined[..., : 2 * samples].unflatten(-1, (samples, 2))
        shares = joined[..., 2 * samples :]
    else:
        places = leaves[1].unflatten(-1, (groups, samples, 2))
        shares = leaves[2].unflatten(-1, (groups, samples))
    out = sampled(leaves[0], places, shares, shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def run(shape, size, channels, batch, dtype, tail) -> list[float]:
    value, offset, weight, grad = inputs(shape, size, channels, batch, dtype, tail)
    found = [deform_gpu.forward(value, offset, weight, shape)]
    found += deform_gpu.backward(grad, value, offset, weight, shape)
    wanted = expected(value, offset, weight, grad, shape)
    pairs = zip([t for t in found if t is not None], wanted, strict=True)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


def strided(shape, size, channels) -> list[float]:
    """Value and offsets as views of larger tensors, read where they are."""
    value, offset, weight, _ = inputs(shape, size, channels, 2, "float32", None)
    apart = deform_gpu.forward(value, offset, weight, shape)
    wide = F.pad(value, (4, 4, 1, 2), value=float("nan"))[:, :, 1:-2, 4:-4]
    deep = F.pad(offset, (1, 2), value=float("nan"))[..., 1:-2]
    found = deform_gpu.forward(wide, deep, weight, shape)
    turned = value.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    again = deform_gpu.forward(turned, offset, weight, shape)
    return [float((apart - t).abs().max()) for t in (found, again)]


def not_numbers() -> list[float]:
    """Rows of the output that a NaN position, an infinite one and a far one leave wrong."""
    shape = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1, 1.0, False)
    offset = torch.zeros(1, 1, 4, 2)
    offset[0, 0, :3, 0] = torch.tensor([float("nan"), float("inf"), -1e30])
    value, weight = torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 1)
    out = deform_gpu.forward(value, offset, weight, shape)[0, 0]
    wrong = [not out[0].isnan().all(), out[1].any(), out[2].any(), not (out[3] == 1).all()]
    return [float(w) for w in wrong]


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # what is allocated starts as NaN
    assert torch.empty(2).isnan().all()
    results = [[name, case[4], run(*case)] for name, case in CASES.items()]
    results.append(["strides", "exact", strided(PLAIN, (5, 6), 16)])
    results.append(["not numbers", "exact", not_numbers()])
    json.dump(results, sys.stdout)
