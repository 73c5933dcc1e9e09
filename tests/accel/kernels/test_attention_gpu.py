"""The Triton kernels: right in the interpreter, and compiled for sm_90 without a GPU.

The interpreter must be chosen before a kernel's module is imported, so that those tests run
in a process of their own. Where a GPU is at hand, the last tests run on it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is the extra 'gpu'")

from sievit.accel.kernels import (  # noqa: E402
    attention_gpu,
    plan_attention,
    reference_attention,
    sparse_attention,
)

INTERPRETED = """
import numpy as np, torch
from sievit.accel.kernels import (
    SparseAttention, plan_attention, reference_attention, sparse_attention
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

def relative(got, wanted):
    return float(((got.double() - wanted).norm() / wanted.norm()).detach())

def case(seed, queries, keys, dims, tile, dtype, kernel, share=0.15):
    generator = torch.Generator().manual_seed(seed)
    keep = np.random.default_rng(seed).random((2, queries, keys)) < share
    keep[0, 0], keep[1, -1] = True, False
    plan = plan_attention(keep, tile=tile)
    sizes = (queries, dims[0]), (keys, dims[0]), (keys, dims[1])
    packed = [torch.randn(2, n, 2, d, generator=generator).to(dtype) for n, d in sizes]
    q, k, v = (t.transpose(1, 2).requires_grad_() for t in packed)  # strided, as in a ViT
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    wanted = reference_attention(*exact, torch.from_numpy(keep))
    empty = torch.Tensor.new_empty
    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made
    torch.Tensor.new_empty = poisoned
    out = sparse_attention(q, k, v, plan, kernel=kernel)
    slope = torch.randn(out.shape, generator=generator).to(dtype)
    grads = torch.autograd.grad(out, (q, k, v), slope)
    torch.Tensor.new_empty = empty
    assert (out[:, 1, -1] == 0).all()
    exact_grads = torch.autograd.grad(wanted, exact, slope.double())
    worst = max(relative(a, b) for a, b in zip((out, *grads), (wanted, *exact_grads)))
    assert worst < TOLERANCE[dtype], (queries, keys, dims, tile, dtype, kernel, worst)
    return plan, (q, k, v), out

SHAPES = [
    (37, 45, (16, 16), 16), (20, 67, (24, 40), 32), (70, 33, (64, 20), 64), (2, 3, (16, 16), 16)
]
combinations = [("tiles", d) for d in TOLERANCE]
combinations += [("short", torch.float16), ("short", torch.bfloat16)]
for seed, (kernel, dtype) in enumerate(combinations):
    for shape in (SHAPES[seed % 4], SHAPES[(seed + 1) % 4]):
        case(seed, *shape, dtype, kernel)

plan, (q, k, v), out = case(99, 5, 6, (16, 16), 16, torch.float32, "tiles", 0.5)
arguments = (q, k, v, plan.by_query.listed(), plan.by_key.listed(), plan.words[:0], 0.25)
torch.library.opcheck(torch.ops.sievit.attention_by_tiles.default, arguments)
module = torch.compile(SparseAttention(plan, "tiles"), fullgraph=True, backend="aot_eager")
assert torch.equal(module(q, k, v), out)
assert torch.equal(torch.autograd.grad(module(q, k, v).sum(), q)[0],
                   torch.autograd.grad(sparse_attention(q, k, v, plan, kernel="tiles").sum(), q)[0])

keep = np.random.default_rng(5).random((1, 20, 24)) < 0.3
plan = plan_attention(keep, tile=16)
q, k, v = (
    torch.rand(1, 1, n, 16, generator=torch.Generator().manual_seed(n)) for n in (20, 24, 24)
)
hit = torch.from_numpy(keep[0, :, 7])
for which in (1, 2):
    for value in (float("nan"), float("inf")):
        operands = [q, k.clone(), v.clone()]
        operands[which][0, 0, 7] = value
        out = sparse_attention(*operands, plan, kernel="tiles")
        assert not out[0, 0, hit].isfinite().any(), (which, value)

try:
    sparse_attention(q, k, v, plan, kernel="short")
except ValueError as error:
    assert "in float16 or bfloat16, got 24 in torch.float32" in str(error), error
else:
    raise AssertionError("float32 was taken")
print("all right")
"""


def _whole(version: str) -> tuple[int, int]:
    return tuple(int(part) for part in version.split(".")[:2])


@pytest.mark.skipif(
    _whole(triton.__version__) < (3, 8) and _whole(np.__version__) >= (2, 4),
    reason="the interpreter of Triton before 3.8 does not loop to a loaded bound with numpy 2.4",
)
def test_the_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "all right"


# ------------------------------------------------------------------ compiled for sm_90

GATHERS = ("gather_forward", "gather_backward_queries", "gather_backward_keys")
INDEX = {"head", "rows", "start", "count", "columns", "bits", "words"}


def compiled(name: str, dim: int, dtype: str, launch: dict[str, int]):
    """The kernel for sm_90, addresses and strides multiples of 16 as in a ViT."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(attention_gpu, name)
    options = {key: launch[key] for key in ("num_warps", "num_stages")}
    constants = {key: value for key, value in launch.items() if key not in options}
    constants |= attention_gpu._dims(dim, dim)
    constants |= {"UPCAST": False, "PRECISION": "tf32x3"}
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        stem = argument.removesuffix("_ptr")
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            kind = "fp32" if stem in ("lse", "delta") else "i32" if stem in INDEX else dtype
            signature[argument] = f"*{kind}"
        else:
            signature[argument] = "fp32" if argument.endswith("scale") else "i32"
        if argument.endswith("_ptr") or re.fullmatch(r"[a-z]+_[bhn]", argument):
            attributes[(position,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(kernel, tmp_path: Path) -> dict[str, int]:
    """REG, STACK, LOCAL as the assembler gave them; what is spilled goes to the stack."""
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run(
        [tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    )
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", done.stdout)}


def check(kernel, tmp_path: Path, instruction: str) -> None:
    used = resources(kernel, tmp_path)
    assert used["STACK"] == 0
    assert used["LOCAL"] == 0
    assert re.search(instruction, kernel.asm["ptx"])
    assert kernel.metadata.shared <= 227 * 1024


@pytest.mark.parametrize("name", GATHERS)
@pytest.mark.parametrize(
    ("tile", "dim", "dtype"),
    [(16, 64, "bf16"), (32, 64, "bf16"), (64, 64, "bf16"), (32, 128, "fp16"), (32, 64, "fp32")],
)
def test_gather_kernels_compile_without_spills(name, tile, dim, dtype, tmp_path):
    launch = attention_gpu.gather_launch(tile, attention_gpu._dims(dim, dim), dtype == "fp32")
    kernel = compiled(name, dim, dtype, launch)
    check(kernel, tmp_path, r"wgmma\.mma_async" if tile == 64 else r"mma\.sync")


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_the_short_kernel_compiles_without_spills(dim, tmp_path):
    launch = attention_gpu.short_launch(256, attention_gpu._dims(dim, dim))
    check(compiled("short_forward", dim, "bf16", launch), tmp_path, r"mma\.sync")


# ------------------------------------------------------------------ on a GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@on_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kernel", ["short", "tiles"])
@pytest.mark.parametrize("dims", [(64, 64), (24, 40), (128, 32)])
def test_on_the_gpu(dtype, kernel, dims):
    if (kernel, dtype) == ("short", torch.float32):
        pytest.skip("short takes 16-bit floats")
    keep = np.random.default_rng(0).random((3, 197, 197)) < 0.1
    keep[0, 0], keep[2, 3] = True, False
    plan = plan_attention(keep).to("cuda")
    generator = torch.Generator().manual_seed(0)
    operands = [
        torch.randn(4, 3, 197, d, generator=generator).to("cuda", dtype).requires_grad_()
        for d in (dims[0], *dims)
    ]
    exact = [t.detach().double().requires_grad_() for t in operands]
    wanted = reference_attention(*exact, torch.from_numpy(keep).cuda())
    out = sparse_attention(*operands, plan, kernel=kernel)
    slope = torch.randn_like(out)
    got = (out, *torch.autograd.grad(out, operands, slope))
    right = (wanted, *torch.autograd.grad(wanted, exact, slope.double()))
    for one, other in zip(got, right, strict=True):
        assert (one.double() - other).norm() / other.norm() < TOLERANCE[dtype]


@on_gpu
@pytest.mark.parametrize("kernel", ["short", "tiles"])
def test_in_a_cuda_graph(kernel):
    plan = plan_attention(np.random.default_rng(1).random((3, 197, 197)) < 0.1).to("cuda")
    q, k, v = torch.randn(3, 4, 3, 197, 64, device="cuda", dtype=torch.bfloat16)
    wanted = sparse_attention(q, k, v, plan, kernel=kernel)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_attention(q, k, v, plan, kernel=kernel)
    out.zero_()
    graph.replay()
    assert torch.equal(out, wanted)


def test_lists_are_in_the_order_the_kernels_take():
    plan = plan_attention(np.ones((1, 4, 4), bool))
    names = [f.name for f in fields(plan.by_query)]
    for kernel in GATHERS:
        arguments = getattr(attention_gpu, kernel).arg_names
        first = arguments.index("head_ptr")
        assert arguments[first : first + 6] == [f"{name}_ptr" for name in names]
