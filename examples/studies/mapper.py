"""What it gains, and costs, to step more of the mapper's candidates than the first.

    python examples/studies/mapper.py MASK.npy --out mapper.json

MASK is a mask of DeiT-Tiny's attention. Cycles of its 12 layers on machines that are short
of one thing each, with the 1, 2, 4 and 8 best candidates stepped, and with all of them.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from sievit.accel import Schedule, presets
from sievit.accel.vitcod.run import run_attention
from sievit.files import write_json
from sievit.provenance import versions
from sievit.sparsify import polarize
from sievit.workload import Attention, AttentionMask, HeadCodec

STEPPED = (1, 2, 4, 8, 1000)
VITCOD = presets["vitcod"]
MACHINES = {
    "vitcod": {},
    "a quarter of the bandwidth": {"dram_bytes_per_s": VITCOD.dram_bytes_per_s // 4},
    "2 softmax lanes": {"softmax_lanes": 2},
    "16 lines": {"lines": 16},
    "32 KB of output buffer": {"output_buffer_bytes": 32 * 1024},
    "a decoder of 64 MACs": {"decoder_macs": 64},
}


def main(mask: str, out: str) -> None:
    layers = polarize(AttentionMask.load(mask))
    rows = []
    for codec in (None, HeadCodec(3, 2)):
        calls = [Attention("layer", 3, 197, 197, 64, 64, masks=m, codec=codec) for m in layers]
        for name, fields in MACHINES.items():
            row = {"machine": name, "codec": codec is not None, "stepped": {}}
            for count in STEPPED:
                hardware, schedule = replace(VITCOD, **fields), Schedule(mappings_stepped=count)
                run_attention(calls[0], hardware, 1, schedule)  # compiles where needed
                begin = time.process_time()
                cycles = sum(run_attention(call, hardware, 1, schedule).cycles for call in calls)
                seconds = time.process_time() - begin
                name_of = "all" if count == STEPPED[-1] else str(count)
                row["stepped"][name_of] = {"cycles": cycles, "cpu_seconds": round(seconds, 3)}
            rows.append(row)
            print(row)
    settings = {"mask": Path(mask).name, "device": "cpu, one core", "seed": None}
    write_json({"settings": settings, "versions": versions(), "rows": rows}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mask")
    parser.add_argument("--out", default="mapper.json")
    arguments = parser.parse_args()
    main(arguments.mask, arguments.out)
