"""What banks and the codec's MACs are worth, where the silicon is counted.

    python examples/studies/silicon.py TINY.npy DINOV2.npz --out silicon.json

TINY: the published DeiT-Tiny mask at 95 %. DINOV2: a mask of the ViT-S/14 at 224 px. Three
questions: 32 or 64 banks; a codec beside the lines or its MACs as lines; and a memory of 9.6 GB/s,
with synthetic masks of DeiT-Small and DeiT-Base at 95 %, on buffers of 53 and of 64 KB. Attention,
default schedule, flat DRAM; keys are global that more than half of the queries keep. Everything is
simulated: no device.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sievit.accel import Hardware, Report, area, compare, energy, presets
from sievit.accel.report.silicon import codec_words, cut_words, uses_codec
from sievit.files import write_json
from sievit.pipeline.networks import sparse_workload
from sievit.provenance import versions
from sievit.workload import AttentionMask, Workload

MACHINES = ("vitcod_plain", "vitcod_no_codec", "vitcod")
SLOW = replace(presets["vitcod"], name="vitcod_9_6_gb", dram_bytes_per_s=9_600_000_000)
LARGER = replace(
    SLOW,
    name="vitcod_9_6_gb_64_kb",
    q_buffer_bytes=64 * 1024,
    k_buffer_bytes=64 * 1024,
    v_buffer_bytes=64 * 1024,
)
"""Room for the latents of all 12 heads of a DeiT-Base layer, and for two decoded heads."""

TOTALS = (512, 832)
"""MACs of the lines; and those with the codec's."""


def row(study: str, network: str, report: Report) -> dict:
    """One machine of one comparison."""
    hardware = report.hardware
    return {
        "study": study,
        "network": network,
        "hardware": hardware.name,
        "simulator": report.simulator,
        "macs": cut_words(hardware, uses_codec(report)),
        "attention_cycles": report.attention_cycles,
        "attention_dram_kb": round(report.dram_bytes() / 1e3),
        "attention_uj": round(energy(report).total_pj() / 1e6, 1),
        "network_ms": round(report.seconds * 1e3, 3),
        "area_mm2": round(area(hardware).total_mm2, 2),
    }


def rows_of(study: str, network: str, reports: Sequence[Report]) -> list[dict]:
    made = [row(study, network, report) for report in reports]
    for one in made:
        print(*one.values(), sep="; ", flush=True)
    print(codec_words(reports[-1], reports[-2]), flush=True)
    return made


def study(
    learned: dict[str, Workload], slow: dict[str, Workload], base: Hardware = presets["vitcod"]
) -> list[dict]:
    """``learned`` on all machines; ``slow`` at 9.6 GB/s."""
    rows = []
    for name, workload in learned.items():
        for hardware in (base, presets["vitcod_64_banks"]):
            rows += rows_of("banks", name, compare(workload, hardware, MACHINES))
        for total in TOTALS:
            made = compare(workload, base, MACHINES, equal="macs", total_macs=total)
            rows += rows_of(f"{total} MACs in all", name, made)
    for name, workload in slow.items():
        rows += rows_of("9.6 GB/s", name, compare(workload, SLOW, MACHINES))
        rows += rows_of("9.6 GB/s, larger buffers", name, compare(workload, LARGER, MACHINES))
        made = compare(workload, SLOW, MACHINES, equal="macs")
        rows += rows_of("9.6 GB/s, 512 MACs in all", name, made)
    return rows


def workload_of(name: str, mask: AttentionMask | float, size: int = 224) -> Workload:
    return sparse_workload(name, mask, image_size=size, global_threshold=0.5)[0]


def main(tiny: str, dinov2: str, out: str) -> None:
    learned = {
        "deit_tiny": workload_of("deit_tiny", AttentionMask.load(tiny)),
        "dinov2_small": workload_of("dinov2_small", AttentionMask.load(dinov2)),
    }
    slow = {name: workload_of(name, 0.95) for name in ("deit_small", "deit_base")}
    record = {"versions": versions(), "device": "simulated", "seed": 0}
    record["masks"] = [Path(tiny).name, Path(dinov2).name, "synthetic, 95 %"]
    write_json(record | {"rows": study(learned, slow)}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tiny")
    parser.add_argument("dinov2")
    parser.add_argument("--out", default="silicon.json")
    arguments = parser.parse_args()
    main(arguments.tiny, arguments.dinov2, arguments.out)
