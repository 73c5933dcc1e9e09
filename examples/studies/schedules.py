"""From ViTCoD's own schedule to the default one, step by step: cycles, DRAM bytes and energy.

    python examples/studies/schedules.py deit_tiny=MASK.npy:3-2 dinov2_small=MASK.npz:6-3@224 \
        --out schedules.json

Each network with the mask that is given, without a codec and with the one that is named (heads
before and after), at the image size after @. Attention on `vitcod` with a flat memory, batch 1.
The steps are those of `sievit.studies.ladder`, each on top of those before it. Everything is
simulated: no device.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sievit.accel import Schedule, energy
from sievit.accel.simulate import simulate_silently
from sievit.files import write_json
from sievit.pipeline.networks import model_workload
from sievit.provenance import versions
from sievit.studies.ladder import BESIDE, STEPS
from sievit.workload import AttentionMask, HeadCodec, Workload


def schedules() -> Iterator[tuple[str, Schedule]]:
    """(what is changed, the schedule then), from ViTCoD's own to the default."""
    made, target = Schedule.published(), Schedule()
    yield "ViTCoD's own schedule", made
    steps = (("the products beside attention", BESIDE), *STEPS)
    for cause, names in steps:
        changed = replace(made, **{name: getattr(target, name) for name in names})
        if changed != made:
            yield cause, changed
        made = changed


def row(workload: Workload, schedule: Schedule) -> dict:
    """What one run takes."""
    report = simulate_silently(workload, schedule=schedule)
    return {
        "cycles": report.attention_cycles,
        "dram_bytes": report.dram_bytes(),
        "uj": energy(report).total_pj() / 1e6,
        "network_ms": 1e3 * report.seconds,
    }


def cases(asked: str) -> Iterator[tuple[str, Workload]]:
    """Name and workload, without and with codec, of MODEL=MASK:HEADS-LATENT[@SIZE]."""
    model, _, rest = asked.partition("=")
    path, _, coded = rest.rpartition(":")
    coded, _, size = coded.partition("@")
    heads, latent = map(int, coded.split("-"))
    mask, image_size = AttentionMask.load(path), int(size) if size else None
    for codec in (None, HeadCodec(heads, latent)):
        name = f"{model}, {mask.sparsity:.1%} pruned" + (
            f", codec {heads} -> {latent}" * bool(codec)
        )
        yield name, model_workload(model, mask, codec, image_size=image_size, global_threshold=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+", help="MODEL=MASK:HEADS-LATENT[@SIZE]")
    parser.add_argument("--out", type=Path, default=Path("schedules.json"))
    arguments = parser.parse_args()
    record: dict = {"versions": versions(), "device": "simulated", "rows": {}}
    for asked in arguments.networks:
        for name, workload in cases(asked):
            record["rows"][name] = {cause: row(workload, one) for cause, one in schedules()}
            for cause, found in record["rows"][name].items():
                print(name, cause, found, flush=True)
            write_json(record, arguments.out)


if __name__ == "__main__":
    main()
