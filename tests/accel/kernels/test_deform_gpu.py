"""The GPU kernels of the deformable operator, without a GPU: run by Triton's interpreter,
and compiled for compute capability 9.0 with the instructions that came out looked at."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed (the extra 'gpu')")

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2, "exact": 0}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def test_interpreted_kernels_are_the_reference():
    script = Path(__file__).with_name("interpreted_deform.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 10
    for name, kind, errors in found:
        assert all(math.isfinite(e) for e in errors), name
        assert max(errors) <= TOLERANCE[kind], (name, errors)


VARIANTS = [  # type, channels a group, kernel side, DCNv4's merged tensor
    (torch.bfloat16, 16, 3, True),
    (torch.bfloat16, 32, 3, False),
    (torch.float16, 64, 5, False),
    (torch.float32, 16, 3, True),
    (torch.float32, 32, 5, False),
]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("dtype", "channels", "kernel", "merged"), VARIANTS)
def test_compiled_kernels_spill_nothing_and_read_wide(direction, dtype, channels, kernel, merged):
    used, code = compiled(direction, dtype, channels, kernel, merged)
    assert used["STACK"] == 0
    assert used["REG"] <= 128
    wide = re.findall(r"LDG\S*\.128", code)
    assert len(wide) >= 4  # the corners of a sample, 16 bytes a thread and read
    if direction == "backward":
        atomics = re.findall(r"\b(?:RED|ATOM)G?\.\S*F32\S*", code)
        assert atomics
        assert all("x4" in a or "128" in a or "V4" in a.upper() for a in atomics)


def compiled(direction: str, dtype: torch.dtype, channels: int, kernel: int, merged: bool):
    """What a kernel uses, and its machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sievit.accel.kernels import deform_gpu
    from sievit.accel.kernels.deform_shapes import Geometry

    shape = Geometry((kernel,) * 2, (1, 1), (kernel // 2,) * 2, (1, 1), 4, 1.0, False)
    constants = deform_gpu.constants(shape, 4 * channels, dtype, merged, far=False)
    constants |= deform_gpu.LAUNCH[direction]
    options = {n: constants.pop(n) for n in ("num_warps", "maxnreg") if n in constants}
    function = getattr(deform_gpu, f"_{direction}")
    signature = {name: argument_type(name, dtype, constants) for name in function.arg_names}
    names = list(signature)
    even = [n for n in names if signature[n][0] == "*" or n.startswith("value_")]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in even},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    usage, code = disassembled(made.asm["cubin"])
    return {n: int(v) for n, v in re.findall(r"(REG|STACK):(\d+)", usage)}, code


def argument_type(name: str, dtype: torch.dtype, constants: dict) -> str:
    if name in constants:
        return "constexpr"
    if name == "BY_VALUE":
        return "*fp32"
    return POINTERS[dtype] if name.isupper() else "i32"


def disassembled(cubin: bytes) -> tuple[str, str]:
    """Resources used and instructions, by the tool that Triton brings along."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        runs = [
            subprocess.run([tool, option, file], capture_output=True, text=True, check=True)
            for option in ("-res-usage", "-sass")
        ]
    return runs[0].stdout + runs[0].stderr, runs[1].stdout
