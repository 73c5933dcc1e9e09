"""Attention under a fixed mask, timed beside PyTorch's own, on the CPU or GPU at hand.

    python examples/benchmarks/bench_attention.py [--out FILE.json] [--masks info_0.95.npy]

Every kernel computes the same call in the same run, in turns: sparse_attention; dense
scaled_dot_product_attention, without a mask (which computes something else, and is the
least that dense costs) and with it; FlexAttention with a block mask; and eager attention,
scores written out. Times are medians with the fastest and slowest pass, forward and
backward. What a plan takes to make, once a mask, stands beside them. The floor of a row is
what the device's own copy and matmul rates, measured in the same run, would need for the
bytes of Q, K, V and the output and for the kept entries alone.

With --out each case is kept as soon as it is there, and what the file holds is not measured
again; --show prints a file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sievit.accel.kernels import AttentionPlan, choose_kernel, plan_attention, sparse_attention
from sievit.files import write_json
from sievit.provenance import device_name, versions
from sievit.sparsify import synthetic_maps, threshold
from sievit.sparsify.granularity import by_vectors
from sievit.workload import AttentionMask

REAL = Path(__file__).resolve().parents[3] / "shared/data/vitcod-deit-tiny-masks/info_0.95.npy"
DIM = 64


@dataclass(frozen=True)
class Case:
    """One layer's mask, made when it is needed, and how many images go through it."""

    name: str
    make: Callable[[], np.ndarray]
    images: int
    granularity: tuple[int, int] | None = None


@dataclass(frozen=True)
class Row:
    """A kernel on a case, one direction. ``speedup`` is against the fastest of the others."""

    case: str
    images: int
    heads: int
    tokens: int
    density: float
    area: float
    kernel: str
    direction: str
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    passes: int
    floor_ms: float
    load_average: float
    speedup: float | None = None
    peak_mib: float | None = None


def cases(real: Path | None, images: int, heads: int, longest: int) -> Iterator[Case]:
    """The published DeiT-Tiny masks, then masks of synthetic maps."""
    if real is not None and real.exists():
        for layer, keep in enumerate(AttentionMask.load(real).keep):
            many = max(1, images * heads // 3 if heads > 3 else 4 * images)
            yield Case(f"DeiT-Tiny layer {layer}", lambda keep=keep: keep, many)
    for tokens, prefix in ((577, 1), (1025, 1), (4096, 0)):
        if tokens > longest:
            return
        some = max(1, min(images, images * 1024 // tokens))
        for sparsity, rows in ((0.95, 1), (0.9, 1), (0.95, 32)):
            make = partial(synthetic, heads, tokens, prefix, sparsity, rows)
            vectors = (f", {rows}x1", (rows, 1)) if rows > 1 else ("", None)
            yield Case(f"synthetic {tokens}, {sparsity:.0%}{vectors[0]}", make, some, vectors[1])


def synthetic(heads: int, tokens: int, prefix: int, sparsity: float, rows: int) -> np.ndarray:
    """bool [heads, tokens, tokens] of synthetic maps, in vectors of ``rows`` queries."""
    maps = by_vectors(synthetic_maps([(heads, tokens, tokens)], prefix), rows, prefix)
    return threshold(maps, sparsity=sparsity, prefix_tokens=prefix).keep[0]


Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def kernels(plan: AttentionPlan, keep: torch.Tensor, device: torch.device, flex: bool):
    """name -> call, all with (q, k, v)."""
    found: dict[str, Call] = {"sievit": lambda q, k, v: sparse_attention(q, k, v, plan)}
    found["sdpa"] = F.scaled_dot_product_attention
    if device.type == "cuda":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def only(backend: SDPBackend) -> Call:
            def call(q, k, v):
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v)

            return call

        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            found[f"sdpa {name.split('_')[0].lower()}"] = only(getattr(SDPBackend, name))
        for kind in ("short", "tiles"):
            if kind == "tiles" or plan.words.numel():
                found[f"sievit {kind}"] = lambda q, k, v, kind=kind: sparse_attention(
                    q, k, v, plan, kernel=kind
                )
    mask = keep[None]
    found["sdpa masked"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def eager(q, k, v):
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -math.inf)
        return scores.softmax(dim=-1) @ v

    found["eager masked"] = eager
    if flex:
        found["flex"] = _flex(keep, device)
    return found


def _flex(keep: torch.Tensor, device: torch.device) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def allowed(b, h, i, j):
        return keep[h, i, j]

    blocks = create_block_mask(allowed, None, *keep.shape, device=device, BLOCK_SIZE=128)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks)


def timed(calls: dict[str, Callable[[], object]], passes: int, device: torch.device):
    """name -> seconds of each pass; the calls take turns, the first pass warms up.

    A call that fails is left out and named on stderr."""
    if device.type == "cuda":
        from triton.testing import do_bench

        def measure(call):
            return do_bench(call, warmup=10, rep=60, return_mode="all")

        working = _working(calls)
        return {name: [1e-3 * ms for ms in measure(call)] for name, call in working.items()}
    working = _working(calls)
    times: dict[str, list[float]] = {name: [] for name in working}
    for _ in range(passes):
        for name, call in working.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return times


def _working(calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    good = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:  # a baseline that does not run here is a finding
            print(f"  {name} does not run: {str(error).splitlines()[0][:120]}", file=sys.stderr)
        else:
            good[name] = call
    return good


def run_case(case: Case, device, dtype, rates, passes: int, flex: bool) -> list[Row]:
    """All rows of a case."""
    kept = np.array(case.make())
    heads, tokens, _ = kept.shape
    plan = plan_attention(kept, granularity=case.granularity).to(device)
    keep = torch.from_numpy(kept).to(device)
    choice = choose_kernel(plan, device, dtype)
    print(f"{case.name}: {choice.kernel} ({choice.reason})", file=sys.stderr, flush=True)
    generator = torch.Generator().manual_seed(0)
    q, k, v, slope = (
        torch.randn(case.images, heads, tokens, DIM, generator=generator).to(device, dtype)
        for _ in range(4)
    )
    found = kernels(plan, keep, device, flex)
    forward = {name: lambda c=call: c(q, k, v) for name, call in found.items()}
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    outs = {n: c for n, c in found.items() if not (n == "flex" and device.type == "cpu")}

    def backward(call: Call) -> Callable[[], object]:
        out = call(*leaves)
        return lambda: torch.autograd.grad(out, leaves, slope, retain_graph=True)

    rows = []
    with torch.no_grad():
        times = timed(forward, passes, device)
    rows += _rows(case, plan, times, "forward", rates)
    ready = {}
    for name, call in outs.items():
        try:
            ready[name] = backward(call)
        except Exception as error:
            print(f"  {name} has no backward: {str(error).splitlines()[0][:120]}", file=sys.stderr)
    rows += _rows(case, plan, timed(ready, passes, device), "backward", rates)
    if device.type == "cuda":
        ready.clear()
        peaks = {name: _peak_mib(call, leaves, slope) for name, call in outs.items()}
        rows = [replace(row, peak_mib=peaks[row.kernel]) for row in rows]
    return rows


def _peak_mib(call: Call, leaves: list[torch.Tensor], slope: torch.Tensor) -> float | None:
    """Memory of one training step of the call, above what its operands take."""
    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(call(*leaves), leaves, slope)
    except Exception:  # it was named when it was timed
        return None
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _rows(case: Case, plan: AttentionPlan, times, direction: str, rates) -> list[Row]:
    """All rows of a case and direction; the speed-up stands in our own."""
    heads, tokens = plan.heads, plan.queries
    entries = case.images * plan.kept
    moved = case.images * heads * tokens * DIM * rates["element_bytes"]
    forward = direction == "forward"
    floor = max(
        (4 if forward else 8) * moved / rates["copy_bytes_per_s"],
        (4 if forward else 10) * DIM * entries / rates["matmul_flop_per_s"],
    )
    theirs = [statistics.median(t) for name, t in times.items() if not name.startswith("sievit")]
    return [
        Row(
            case=case.name,
            images=case.images,
            heads=heads,
            tokens=tokens,
            density=round(plan.density, 4),
            area=round(plan.area, 4),
            kernel=name,
            direction=direction,
            median_ms=1e3 * statistics.median(t),
            fastest_ms=1e3 * min(t),
            slowest_ms=1e3 * max(t),
            passes=len(t),
            floor_ms=1e3 * floor,
            load_average=round(os.getloadavg()[0], 1),
            speedup=min(theirs) / statistics.median(t) if name.startswith("sievit") else None,
        )
        for name, t in times.items()
    ]


def plan_seconds() -> dict[str, float]:
    """To plan 12 layers of 12 heads at 197 tokens and one of 12 heads at 4,096, at 95 %."""
    masks = {
        "12 x 12 heads x 197 tokens": 12 * [synthetic(12, 197, 1, 0.95, 1)],
        "12 heads x 4,096 tokens": [synthetic(12, 4096, 0, 0.95, 1)],
    }
    plan_attention(masks["12 x 12 heads x 197 tokens"][0])  # compiles
    spent = {}
    for name, layers in masks.items():
        begin = time.perf_counter()
        for keep in layers:
            plan_attention(keep)
        spent[name] = time.perf_counter() - begin
    return spent


def device_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second of a large copy (read and written) and FLOP a second of a matmul."""
    big = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
    other = torch.empty_like(big)
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    calls = {"copy": lambda: other.copy_(big), "matmul": lambda: a @ b}
    spent = {n: statistics.median(t) for n, t in timed(calls, 7, device).items()}
    return {
        "copy_bytes_per_s": 2 * big.numel() * big.element_size() / spent["copy"],
        "matmul_flop_per_s": 2 * side**3 / spent["matmul"],
        "element_bytes": float(a.element_size()),
    }


def summary(rows: list[Row]) -> str:
    """One line a case and direction: every kernel's median, our speed-up and our distance
    from the floor."""
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        for direction in ("forward", "backward"):
            some = [r for r in rows if r.case == case and r.direction == direction]
            ours = next(r for r in some if r.kernel == "sievit")
            medians = ", ".join(f"{r.kernel} {r.median_ms:.2f}" for r in some)
            lines.append(
                f"{case:24} kept {ours.density:6.1%} {direction:8} {ours.speedup:5.2f}x, "
                f"{ours.median_ms / ours.floor_ms:4.1f} floors; ms: {medians}"
            )
    real = [r for r in rows if r.case.startswith("DeiT") and r.kernel == "sievit"]
    for direction in ("forward", "backward"):
        some = [r.speedup for r in real if r.direction == direction]
        if some:
            mean = statistics.mean(some)
            lines.append(f"DeiT-Tiny, mean over {len(some)} layers, {direction}: {mean:.2f}x")
    return "\n".join(lines)


def measure(given: argparse.Namespace, device: torch.device) -> list[Row]:
    """Every case that the file does not hold; the file is written after each."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    images, heads = given.images or (64 if on_gpu else 16), given.heads or (12 if on_gpu else 3)
    record = {
        "device": device_name(device),
        "threads": 0 if on_gpu else torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": 0,
        "versions": versions(),
        "rates": device_rates(device, dtype),
        "plan_seconds": plan_seconds() if given.longest >= 4096 else {},
    }
    for name, seconds in record["plan_seconds"].items():
        print(f"planned {name} in {seconds:.2f} s", file=sys.stderr, flush=True)
    rows = read(given.out) if given.out is not None and given.out.exists() else []
    done = {row.case for row in rows}
    for case in cases(given.masks, images, heads, given.longest):
        if case.name in done:
            continue
        rows += run_case(case, device, dtype, record["rates"], given.passes, not given.no_flex)
        if given.out is not None:
            write_json({**record, "rows": [asdict(row) for row in rows]}, given.out)
    return rows


def read(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file for everything measured")
    parser.add_argument("--show", type=Path, help="print such a file, measure nothing")
    parser.add_argument("--masks", type=Path, default=REAL, help="ViTCoD's info_0.95.npy")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, help="default: 64 on a GPU, 16 on a CPU")
    parser.add_argument("--heads", type=int, help="default: 12 on a GPU, 3 on a CPU")
    parser.add_argument("--longest", type=int, default=4096, help="leave longer ones out")
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--no-flex", action="store_true", help="FlexAttention compiles long")
    given = parser.parse_args()
    print(summary(read(given.show) if given.show else measure(given, torch.device(given.device))))


if __name__ == "__main__":
    main()
