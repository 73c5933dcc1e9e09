"""What the model of the DRAM and the address map do to sparse attention.

    python examples/studies/memory_models.py MASK.npy --out memory_models.json

MASK: 12 layers of 3 heads of 197 tokens (the published DeiT-Tiny mask at 95 %). Attention
alone, 64 dimensions a head, with and without a codec of ratio 2/3, on the flat memory and on
four channels of DDR4-2400 under three address maps; beside it the share of its peak that a
long stream of reads reaches. Everything is simulated: no device, no chance.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from sievit.accel import presets, simulate
from sievit.accel.dram.bandwidth import stream_efficiency
from sievit.files import write_json
from sievit.provenance import versions
from sievit.workload import Attention, AttentionMask, HeadCodec, Workload, polarize_head

MAPS = ("groups_interleaved", "rows_interleaved", "ro-ch-ra-ba-bg-co")
"""The last is DRAMsim3's default: a channel holds 256 KB in a row before the next one does."""


def machines() -> dict[str, object]:
    ddr4 = presets["vitcod_ddr4"]
    return {"flat": presets["vitcod"]} | {name: replace(ddr4, dram_map=name) for name in MAPS}


def attention(mask: AttentionMask, codec: HeadCodec | None) -> Workload:
    """The calls of all layers."""
    calls = []
    for layer, keep in enumerate(mask.keep):
        heads, queries, keys = keep.shape
        masks = tuple(polarize_head(head, mask.global_threshold) for head in keep)
        calls.append(
            Attention(f"layer {layer}", heads, queries, keys, 64, 64, masks=masks, codec=codec)
        )
    return Workload("attention", tuple(calls))


def study(mask: AttentionMask) -> list[dict]:
    """A row for each codec and memory."""
    rows = []
    for ratio, codec in (("-", None), ("2/3", HeadCodec(3, 2))):
        workload = attention(mask, codec)
        for name, hardware in machines().items():
            report = simulate(workload, hardware)
            moved = {"dram_lines": 0, "dram_row_hits": 0}
            for op in report.ops:
                for count in moved:
                    moved[count] += op.details.get(count, 0)
            rows.append({"codec": ratio, "memory": name, "cycles": report.cycles} | moved)
    return rows


def streams() -> dict[str, float]:
    return {name: float(stream_efficiency("ddr4_2400", name, 4)) for name in MAPS}


def main(path: str, out: str) -> None:
    rows = study(AttentionMask.load(path))
    flat = {row["codec"]: row["cycles"] for row in rows if row["memory"] == "flat"}
    for row in rows:
        hits = row["dram_row_hits"] / row["dram_lines"] if row["dram_lines"] else None
        shown = "" if hits is None else f", {hits:.1%} of {row['dram_lines']:,} lines hit a row"
        slower = row["cycles"] / flat[row["codec"]] - 1
        print(
            f"codec {row['codec']:4} {row['memory']:20} {row['cycles']:>8,} cycles "
            f"({slower:+.1%}){shown}"
        )
    for name, share in streams().items():
        print(f"a stream of reads under {name}: {share:.1%} of the peak")
    record = {"versions": versions(), "device": "simulated", "seed": None, "mask": Path(path).name}
    record |= {"rows": rows, "stream_share_of_peak": streams()}
    write_json(record, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mask")
    parser.add_argument("--out", default="memory_models.json")
    arguments = parser.parse_args()
    main(arguments.mask, arguments.out)
