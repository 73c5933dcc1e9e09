"""What the split into global keys and the rest gains, by threshold and by banks of the buffers.

    python examples/studies/global_keys.py deit_tiny=MASK.npy dinov2_small=MASK.npz@224 \
        --out global_keys.json

Attention cycles of `vitcod`, without codec, of the networks whose masks are given (at an image
size after @) and of DeiT-Tiny, -Small and -Base with synthetic masks: with each head's best
threshold, with no global keys, and with those that more than half of the queries keep.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from sievit.accel import Schedule, presets
from sievit.accel.simulate import simulate_silently
from sievit.files import write_json
from sievit.pipeline.networks import model_workload, sparse_workload
from sievit.provenance import versions
from sievit.workload import AttentionMask, Workload

SYNTHETIC = [(f"deit_{size}", share) for size in ("tiny", "small", "base") for share in (0.9, 0.95)]
THRESHOLDS = ("best", "none", 0.5)
BANKS = (32, 64)


def given(text: str) -> tuple[str, Workload]:
    """MODEL=MASK or MODEL=MASK@SIZE."""
    model, _, path = text.partition("=")
    path, _, size = path.partition("@")
    mask = AttentionMask.load(path)
    workload = model_workload(model, mask, image_size=int(size) if size else None)
    return f"{model}, {mask.sparsity:.1%}, learned", workload


def study(networks: dict[str, Workload]) -> list[dict]:
    """A row for each network and number of banks."""
    rows = []
    for banks in BANKS:
        hardware = replace(presets["vitcod"], q_banks=banks, k_banks=banks, v_banks=banks)
        for name, workload in networks.items():
            row = {"network": name, "banks": banks, "cycles": {}}
            for threshold in THRESHOLDS:
                schedule = Schedule(global_threshold=threshold)
                report = simulate_silently(workload, hardware, schedule=schedule)
                row["cycles"][str(threshold)] = report.attention_cycles
            rows.append(row)
            print(row, flush=True)
    return rows


def main(masks: list[str], out: Path, synthetic: list[tuple[str, float]] = SYNTHETIC) -> None:
    networks = dict(given(text) for text in masks)
    for name, sparsity in synthetic:
        workload, _ = sparse_workload(name, sparsity, codecs=())
        networks[f"{name}, {sparsity:.0%}, synthetic"] = workload
    settings = {"masks": [text.rpartition("/")[2] for text in masks], "seed": 0}
    write_json({"settings": settings, "versions": versions(), "rows": study(networks)}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("masks", nargs="*", help="MODEL=MASK or MODEL=MASK@IMAGE_SIZE")
    parser.add_argument("--out", type=Path, default=Path("global_keys.json"))
    arguments = parser.parse_args()
    main(arguments.masks, arguments.out)
