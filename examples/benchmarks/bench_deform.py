"""The deformable operator, timed beside its baselines, on the CPU or GPU at hand.

    python examples/benchmarks/bench_deform.py [--out FILE.json] [--device cpu]

The operator shapes of the DCNv4 paper (arXiv 2401.06197, section 5), 3 x 3 samples. Every
kernel computes the same sampling in the same run, in turns, and its output is compared with
ours first: deform_conv on DCNv4's merged tensor; deform_core on offsets and weights apart;
the plain grid_sample reference of the models; torchvision's deform_conv2d, where it can be
imported, with a weight of ones for each channel (it adds a product that DCNv4 does not
have). Times are medians with the fastest and slowest pass, forward and backward.

The floor of a row is the largest of: bytes that must move at the rate of a copy; the 36
values that an output number reads from the first-level cache, at 128 bytes a clock and
multiprocessor (GPU); 36 multiply-adds at the rate of a float32 matmul. Rates of copy and
matmul are measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sievit.accel.kernels import deform_conv, deform_core
from sievit.files import write_json
from sievit.models.families import dcn
from sievit.provenance import device_name, versions

SAMPLES = 9
SHAPES = ((56, 128, 4), (56, 128, 8), (28, 256, 16), (14, 512, 32), (7, 1024, 64), (14, 768, 48))
"""Side of the map, channels, groups."""


@dataclass(frozen=True)
class Row:
    """A kernel on a shape, one direction. ``speedup`` of ours is against the fastest other."""

    side: int
    channels: int
    groups: int
    batch: int
    kernel: str
    direction: str
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    passes: int
    memory_floor_ms: float
    cache_floor_ms: float | None
    arithmetic_floor_ms: float
    speedup: float | None = None
    peak_mib: float | None = None

    @property
    def floor_ms(self) -> float:
        return max(self.memory_floor_ms, self.cache_floor_ms or 0.0, self.arithmetic_floor_ms)


def made(side: int, channels: int, groups: int, batch: int, device, dtype) -> list[torch.Tensor]:
    """value and DCNv4's tensor: offsets of a pixel and a half, padded to a multiple of 8."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(batch, side, side, channels, generator=generator)
    by_group = torch.randn(batch, side, side, groups, 3 * SAMPLES, generator=generator)
    by_group[..., : 2 * SAMPLES] *= 1.5
    joined = by_group.flatten(-2)
    joined = torch.nn.functional.pad(joined, (0, -joined.shape[-1] % 8))
    return [t.to(device, dtype) for t in (value, joined)]


Call = Callable[[], torch.Tensor]


def kernels(value: torch.Tensor, joined: torch.Tensor, groups: int) -> dict[str, tuple]:
    """name -> (call, the tensors it differentiates, its output as ours)."""
    leaf = [t.detach().requires_grad_() for t in (value, joined)]
    parts = dcn.split_offset_mask(joined, groups, SAMPLES)
    apart = [t.detach().contiguous().requires_grad_() for t in (value, *parts)]
    found = {
        "sievit": (lambda: deform_conv(*leaf, groups=groups), leaf, _same),
        "sievit apart": (lambda: deform_core(*apart, groups=groups), apart, _same),
        "grid_sample": (lambda: dcn.deform_core(*apart, groups=groups), apart, _same),
    }
    try:
        from torchvision.ops import deform_conv2d
    except Exception as error:  # a build for another torch fails in many ways
        print(f"  torchvision is left out: {str(error).splitlines()[0][:90]}", file=sys.stderr)
        return found
    planes = _planes(value, *parts, groups)
    ones = value.new_ones(value.shape[-1], 1, 3, 3)

    def call() -> torch.Tensor:
        image, offset, mask = planes
        return deform_conv2d(image, offset, ones, padding=1, mask=mask)

    return found | {"torchvision": (call, planes, lambda out: out.permute(0, 2, 3, 1))}


def _same(out: torch.Tensor) -> torch.Tensor:
    return out


def _planes(value, offset, weight, groups: int) -> list[torch.Tensor]:
    """As torchvision takes them: channels first, (y, x), samples row by row."""
    batch, rows, columns, _ = value.shape
    offset = offset.view(batch, rows, columns, groups, 3, 3, 2).transpose(4, 5).flip(-1)
    weight = weight.view(batch, rows, columns, groups, 3, 3).transpose(4, 5)
    moved = (t.reshape(batch, rows, columns, -1).permute(0, 3, 1, 2) for t in (offset, weight))
    planes = (value.permute(0, 3, 1, 2), *moved)
    return [t.detach().contiguous().requires_grad_() for t in planes]


def checked(found: dict[str, tuple], dtype: torch.dtype) -> dict[str, tuple]:
    """The kernels that run here and give what ours gives."""
    with torch.no_grad():
        ours = found["sievit"][0]().double()
    good = {}
    for name, (call, leaves, as_ours) in found.items():
        try:
            with torch.no_grad():
                error = (as_ours(call()).double() - ours).norm() / ours.norm()
        except Exception as problem:  # a baseline that does not run here is a finding
            print(f"  {name} does not run: {str(problem).splitlines()[0][:90]}", file=sys.stderr)
            continue
        limit = 1e-4 if dtype == torch.float32 else 3e-2
        if not error < limit:
            raise SystemExit(f"{name} is off by {error:.1e}")
        good[name] = (call, leaves)
    return good


def timed(calls: dict[str, Call], passes: int, device: torch.device) -> dict[str, list[float]]:
    """name -> seconds of each pass; the calls take turns, the first warms up."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return {
            name: [1e-3 * ms for ms in do_bench(call, warmup=20, rep=100, return_mode="all")]
            for name, call in calls.items()
        }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(passes + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return times


def rates_of(device: torch.device, dtype: torch.dtype) -> dict[str, float | None]:
    """Bytes a second of a copy and, on a GPU, of all first-level caches; float32 FLOP/s."""
    big = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
    other = torch.empty_like(big)
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    calls = {"copy": lambda: other.copy_(big), "matmul": lambda: a @ b}
    spent = {name: statistics.median(t) for name, t in timed(calls, 7, device).items()}
    cache = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        clock_hz = 1e3 * getattr(properties, "clock_rate", 1_755_000)  # H200's, in kHz
        cache = properties.multi_processor_count * 128 * clock_hz
    return {
        "copy_bytes_per_s": 2 * big.numel() * big.element_size() / spent["copy"],
        "cache_bytes_per_s": cache,
        "flop_per_s": 2 * side**3 / spent["matmul"],
        "element_bytes": dtype.itemsize,
    }


def floors(value: torch.Tensor, joined: torch.Tensor, direction: str, rates: dict) -> dict:
    """The least times in ms, as the file's first lines define them."""
    reads = 4 * SAMPLES * value.numel()
    passes = 1 if direction == "forward" else 2  # each tensor's gradient is as large as itself
    moved = passes * (value.numel() + joined.numel()) + value.numel()
    cache = rates["cache_bytes_per_s"]
    work = 1 if direction == "forward" else 2  # a product with grad, and what value receives
    return {
        "memory_floor_ms": 1e3 * moved * rates["element_bytes"] / rates["copy_bytes_per_s"],
        "cache_floor_ms": cache and 1e3 * work * reads * rates["element_bytes"] / cache,
        "arithmetic_floor_ms": 1e3 * work * 2 * reads / rates["flop_per_s"],
    }


def run_shape(shape, batch: int, device, dtype, rates: dict, passes: int) -> list[Row]:
    value, joined = made(*shape, batch, device, dtype)
    found = checked(kernels(value, joined, shape[2]), dtype)
    with torch.no_grad():
        times = {"forward": timed({n: call for n, (call, _) in found.items()}, passes, device)}
    peaks = {name: peak_mib(*kernel, device) for name, kernel in found.items()}
    ready = {name: backward(*kernel) for name, kernel in found.items()}
    times["backward"] = timed(ready, passes, device)
    rows = []
    for direction, spent in times.items():
        theirs = [statistics.median(t) for n, t in spent.items() if not n.startswith("sievit")]
        for name, t in spent.items():
            middle = statistics.median(t)
            rows.append(
                Row(
                    *shape, batch, name, direction, 1e3 * middle, 1e3 * min(t), 1e3 * max(t),
                    len(t), **floors(value, joined, direction, rates),
                    speedup=min(theirs) / middle if name.startswith("sievit") else None,
                    peak_mib=peaks[name],
                )
            )  # fmt: skip
    return rows


def backward(call: Call, leaves: list[torch.Tensor]) -> Call:
    out = call()
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return lambda: torch.autograd.grad(out, leaves, slope, retain_graph=True)


def peak_mib(call: Call, leaves: list[torch.Tensor], device: torch.device) -> float | None:
    """What a forward and backward pass holds at most beside its inputs; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    torch.autograd.grad(call().sum(), leaves)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def summary(rows: list[Row]) -> str:
    """A line a shape and direction: every kernel's median, our speed-up, our floors."""
    lines = []
    for shape in dict.fromkeys((r.side, r.channels, r.groups) for r in rows):
        for direction in ("forward", "backward"):
            some = [r for r in rows if (r.side, r.channels, r.groups) == shape]
            some = [r for r in some if r.direction == direction]
            ours = next(r for r in some if r.kernel == "sievit")
            medians = ", ".join(f"{r.kernel} {r.median_ms:.3f}" for r in some)
            name = "{0}x{0}x{1}, {2} groups".format(*shape)
            lines.append(
                f"{name:24} {direction:8} {ours.speedup:5.2f}x, "
                f"{ours.median_ms / ours.floor_ms:4.1f} floors; ms: {medians}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file for everything measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="default: 64 on a GPU, 8 on a CPU")
    parser.add_argument("--threads", type=int, help="of PyTorch, on a CPU")
    parser.add_argument("--passes", type=int, default=9)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    on_gpu = device.type == "cuda"
    batch, rows = given.batch or (64 if on_gpu else 8), []
    record = {"device": device_name(device), "threads": 0 if on_gpu else torch.get_num_threads()}
    record |= {"seed": 0, "versions": versions(), "rates": {}}
    for dtype in (torch.bfloat16, torch.float32) if on_gpu else (torch.float32,):
        name = str(dtype).removeprefix("torch.")
        record["rates"][name] = rates = rates_of(device, dtype)
        some = [r for s in SHAPES for r in run_shape(s, batch, device, dtype, rates, given.passes)]
        print(f"{record['device']}, {name}, batch {batch}\n{summary(some)}")
        rows += [asdict(row) | {"dtype": name} for row in some]
    if given.out is not None:
        write_json(record | {"rows": rows}, given.out)


if __name__ == "__main__":
    main()
