"""How fast machines are simulated here, beside other simulators.

    python examples/benchmarks/bench_simulator.py
    python examples/benchmarks/bench_simulator.py --mask info_0.95.npy --json out.json
    python examples/benchmarks/bench_simulator.py --peer-python /path/to/python

Each case runs in a process of its own with one thread, after compiling: seconds are medians
of --repeats (4,096 tokens: one run), "CPU s" those that the process itself worked (of the
exploration: its workers, start included), memory the most that it held, Python, PyTorch and
the making of the masks included. Masks are synthetic
(`sievit.sparsify.synthetic`, or for 4,096 tokens as `_long_mask` says) unless --mask gives
ViTCoD's for DeiT-Tiny. --peer-python is a Python that has SCALE-Sim (pip install scalesim
"numpy<2", which this package cannot share); where the running Python has it, it is used.

Cycles a second are simulated cycles of the array over wall time. They are not the same work:
a cycle of ours steps every line, bank and transfer; SCALE-Sim writes down a dense array's
operands; the released script's formulas step nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

SPARSE, BASE_SPARSE = 0.95, 0.90
EXPLORED = 240
JOBS = 2

BARS = {
    "DeiT-Tiny attention, 95 %": ("seconds", 0.050),
    "DeiT-Base network, 90 %": ("seconds", 1.0),
    "12 x 6 heads x 4,096 tokens, 95 %": ("seconds", 60.0),
    f"explore, DeiT-Tiny, {JOBS} processes": ("configurations_per_s", 20.0),
}
"""Aims of this project."""

QUOTED = {
    "simulator": "published script, 12 of 36 heads of DeiT-Tiny",
    "cycles": 9492,
    "seconds": 0.27,
    "note": "not run here: measured once on another machine of two cores, scipy and numpy alone",
}


def deit_tiny(mask: str | None, codec=None):
    """DeiT-Tiny with ViTCoD's mask of a file, or a synthetic one at 95 %."""
    from sievit.models import create, trace
    from sievit.studies.variants import masks_by_chance
    from sievit.workload import AttentionMask

    dense = replace(trace(create("deit_tiny"), 224), name="deit_tiny")
    made = masks_by_chance(dense, [SPARSE], 1)[SPARSE] if mask is None else AttentionMask.load(mask)
    return dense.with_attention(made, codec)


def attention_case(mask: str | None, repeats: int) -> dict:
    workload = deit_tiny(mask)
    return timed(replace(workload, ops=workload.attention), "vitcod", repeats)


def network_case(mask: str | None, repeats: int) -> dict:
    from sievit.models import create, trace
    from sievit.studies.variants import masks_by_chance

    dense = replace(trace(create("deit_base"), 224), name="deit_base")
    return timed(
        dense.with_attention(masks_by_chance(dense, [BASE_SPARSE], 1)[BASE_SPARSE]),
        "vitcod",
        repeats,
    )


def long_case(mask: str | None, repeats: int) -> dict:
    import numpy as np

    from sievit.workload import Attention, Workload, polarize_head

    layers = []
    for layer in range(12):
        generator = np.random.default_rng(layer)
        heads = tuple(polarize_head(_long_mask(64, generator), 0.25) for _ in range(6))
        layers.append(Attention(f"{layer}", 6, 4096, 4096, 64, 64, masks=heads))
    return timed(Workload("4,096 tokens", tuple(layers)), "vitcod", 1)


def _long_mask(side: int, generator):
    """bool [side**2, side**2], 5 % kept: about a third each the nearest tokens on the grid,
    keys that half of the queries keep, and any others."""
    import numpy as np

    tokens = side * side
    rows, columns = np.divmod(np.arange(tokens), side)
    squared = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2
    keep = squared <= side * side / 190
    liked = generator.choice(tokens, tokens // 30, replace=False)
    keep[:, liked] |= generator.random((tokens, liked.size), np.float32) < 0.5
    missing = max(0.05 - keep.mean(), 0.0) / (1.0 - keep.mean())
    keep |= generator.random((tokens, tokens), np.float32) < missing
    return keep


def released_case(mask: str | None, repeats: int) -> dict:
    from sievit.workload import HeadCodec

    return timed(deit_tiny(mask, HeadCodec(3, 2)), "released", repeats)


def explore_case(mask: str | None, repeats: int) -> dict:
    """Configurations a second: all, the start of the processes included, and between the
    first tenth and the last."""
    from sievit.accel import explore, grid

    machines = grid(
        {
            "lines": (32, 64, 128),
            "dram_bytes_per_s": tuple(int(gb * 1e9) for gb in (19.2, 38.4, 57.6, 76.8, 153.6)),
            "q_banks+k_banks+v_banks": (8, 16, 32, 64),
            "index_entries_per_cycle": (4, 8),
            "softmax_lanes": (4, 8),
        }
    )
    assert len(machines) == EXPLORED
    workload, ended = deit_tiny(mask), []
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        found = explore(
            {"deit_tiny": workload},
            machines,
            results=Path(folder) / "r.jsonl",
            jobs=JOBS,
            progress=lambda point, done, total: ended.append(time.perf_counter()),
        )
        seconds = time.perf_counter() - begin
    if found.failed:
        raise RuntimeError(found.failed[0].error)
    cycles = sum(point.figures["cycles"] for point in found.done)
    tenth = len(ended) // 10
    steady = (len(ended) - 1 - tenth) / (ended[-1] - ended[tenth])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "cycles": cycles,
        "seconds": seconds,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "configurations": len(machines),
        "configurations_per_s": len(machines) / seconds,
        "configurations_per_s_once_started": steady,
    }


CASES: dict[str, Callable[[str | None, int], dict]] = {
    "DeiT-Tiny attention, 95 %": attention_case,
    "DeiT-Base network, 90 %": network_case,
    "12 x 6 heads x 4,096 tokens, 95 %": long_case,
    f"explore, DeiT-Tiny, {JOBS} processes": explore_case,
    "released script's formulas, ours": released_case,
}


def timed(workload, simulator: str, repeats: int) -> dict:
    """Simulate: compile on a small workload first, then count."""
    from sievit.accel import presets, simulate
    from sievit.accel.explore.sweep import _compile

    _compile()
    walls, processors = [], []
    for _ in range(repeats):
        forget()
        wall, processor = time.perf_counter(), time.process_time()
        report = simulate(workload, presets["vitcod"], simulator)
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return {
        "cycles": report.cycles,
        "seconds": statistics.median(walls),
        "fastest_seconds": min(walls),
        "processor_seconds": statistics.median(processors),
        "runs": repeats,
    }


def forget() -> None:
    """Index lists and assignments of the run before: every run makes its own."""
    from sievit.accel.vitcod import mapper, pattern

    pattern.PATTERNS.clear()
    mapper.WORK.clear()
    pattern.ASSIGNMENTS.clear()


SCALE_SIM = """
import json, sys, time
from scalesim.scale_sim import scalesim
files = dict(config="run.cfg", topology="gemm.csv", layout="layout.csv")
run = scalesim(save_disk_space=True, verbose=False, input_type_gemm=True, **files)
begin = time.perf_counter()
run.run_scale(top_path="out")
seconds = time.perf_counter() - begin
cycles = int(float(run.runner.single_layer_sim_object_list[0].get_compute_report_items()[1]))
print(json.dumps({"cycles": cycles + 1, "seconds": seconds}))
"""
"""SCALE-Sim prints the index of the last cycle: one is added."""

SCALE_SIM_CONFIG = """
[general]
run_name = run
[architecture_presets]
ArrayHeight = 64
ArrayWidth = 8
IfmapSramSzkB = 64
FilterSramSzkB = 64
OfmapSramSzkB = 64
IfmapOffset = 0
FilterOffset = 10000000
OfmapOffset = 20000000
Bandwidth = 10
Dataflow = os
ReadRequestBuffer = 512
WriteRequestBuffer = 512
[layout]
IfmapCustomLayout = False
IfmapSRAMBankBandwidth = 10
IfmapSRAMBankNum = 10
IfmapSRAMBankPort = 2
FilterCustomLayout = False
FilterSRAMBankBandwidth = 10
FilterSRAMBankNum = 10
FilterSRAMBankPort = 2
[sparsity]
SparsitySupport = false
SparseRep = ellpack_block
OptimizedMapping = false
BlockSize = 8
RandomNumberGeneratorSeed = 0
[run_presets]
InterfaceBandwidth = CALC
UseRamulatorTrace = False
"""


def scale_sim(python: str) -> dict | None:
    """SCALE-Sim on one head's dense Q K^T (197 x 197 x 64, 64 x 8 array); None without it."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in {
            "run.cfg": SCALE_SIM_CONFIG,
            "gemm.csv": "Layer,M,N,K,\nqk,197,197,64,\n",
            "layout.csv": "Layer,\nqk," + "1," * 13 + "\n",
        }.items():
            Path(folder, name).write_text(text)
        done = subprocess.run(
            [python, "-c", SCALE_SIM], cwd=folder, capture_output=True, text=True, check=False
        )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output"
        print(f"SCALE-Sim was not run: {reason}", file=sys.stderr)
        return None
    made = json.loads(done.stdout.strip().splitlines()[-1])
    return {"simulator": "SCALE-Sim, one dense head's Q K^T", **made}


def run_case(name: str, mask: str | None, repeats: int) -> dict:
    """A case in a process of its own."""
    command = [sys.executable, __file__, "--case", name, "--repeats", str(repeats)]
    command += [] if mask is None else ["--mask", mask]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return {"simulator": name, **json.loads(done.stdout.strip().splitlines()[-1])}


def show(row: dict) -> str:
    """A line of the table."""
    rate = row["cycles"] / row["seconds"]
    memory = f"{row['most_memory_bytes'] / 1e9:7.2f}" if "most_memory_bytes" in row else "      -"
    own = f"{row['processor_seconds']:9.3f}" if "processor_seconds" in row else "        -"
    line = (
        f"{row['simulator']:<46} {row['cycles']:>13,} {row['seconds']:>9.3f} {own} {rate:>13,.0f}"
    )
    line += f" {memory}"
    if row["simulator"] in BARS:
        figure, bar = BARS[row["simulator"]]
        relation = "of at least" if figure != "seconds" else "of at most"
        line += f"   {figure.replace('_', ' ')} {row[figure]:.3g} {relation} {bar:g}"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mask", help="ViTCoD's mask of DeiT-Tiny at 95 %% (.npy), or .npz")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        made = CASES[given.case](given.mask, given.repeats)
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 1 if sys.platform == "darwin" else 1024
        print(json.dumps(made | {"most_memory_bytes": kilobytes * unit}))
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    rows = []
    print(f"{'':<46} {'cycles':>13} {'seconds':>9} {'CPU s':>9} {'cycles a s':>13} {'GB':>7}")
    for name in CASES:
        if given.only is None or given.only in name:
            rows.append(run_case(name, given.mask, given.repeats))
            print(show(rows[-1]), flush=True)
    for peer in (scale_sim(given.peer_python), QUOTED) if given.only is None else ():
        if peer is not None:
            rows.append(peer)
            print(show(peer))
    if given.json is not None:
        write(rows, given, given.json)


def write(rows: list[dict], given: argparse.Namespace, path: Path) -> None:
    from sievit.files import write_json
    from sievit.provenance import versions

    about = {
        "mask": "synthetic" if given.mask is None else Path(given.mask).name,
        "load_average": os.getloadavg()[0],
        "versions": versions(),
    }
    write_json({"about": about, "rows": rows, "bars": BARS}, path)


if __name__ == "__main__":
    main()
