"""ViTCoD's recipe on a ViT trained from scratch, against an equal extra training of it.

    python examples/studies/from_scratch.py --out from_scratch.json

The labelled set is scikit-learn's digits (1,797 images of 8 x 8): small enough for two
cores, and the only one a package brings along; it is no ImageNet. They are enlarged to 32
pixels, so that the network is DeiT-Tiny's shape made small: 65 tokens, three heads, four
layers. Each seed holds out another third: every image is judged once. Dense training; then
codec (3 -> 2 heads) with labels and the paper's reconstruction term; then the mask, learned
from that model's attention over the train images, with labels. The dense model gets the
steps of both as well. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from judging import paired
from rows import Rows
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from sievit.ae import Reconstruction, attach_codec, fit_codecs, fold, head_moments
from sievit.models import create
from sievit.models.training.recipe import Recipe
from sievit.sparsify import attach, average_attention, finetune, threshold

SEEDS = (0, 1, 2)
DENSE, TUNED = 3e-3, 5e-4
SIZE, PATCH = 32, 4


@dataclass(frozen=True)
class Split:
    """Images [count, 3, 8, 8] about 0 and classes, to learn from and to judge on."""

    learn: Tensor
    learn_labels: Tensor
    judge: Tensor
    judge_labels: Tensor


def enlarged(images: Tensor) -> Tensor:
    return F.interpolate(images, size=(SIZE, SIZE), mode="bicubic")


def split(seed: int) -> Split:
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None].expand(-1, 3, -1, -1) / 8 - 1
    labels = torch.from_numpy(digits.target)
    folds = StratifiedKFold(len(SEEDS), shuffle=True, random_state=0)
    learn, judge = list(folds.split(digits.data, digits.target))[seed]
    return Split(images[learn], labels[learn], images[judge], labels[judge])


def jittered(data: Split, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Train batches without end, enlarged: turned by up to 12 degrees, a tenth larger or
    smaller, moved by up to an eighth of the image, noise added."""
    generator = torch.Generator().manual_seed(seed)
    learn = enlarged(data.learn)
    while True:
        some = torch.randint(len(learn), (batch,), generator=generator)
        angle, size, right, down = 2 * torch.rand(4, batch, generator=generator) - 1
        angle, size = 0.21 * angle, 1 + 0.1 * size
        turned = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1)
        moved = 0.25 * torch.stack([right, down], dim=-1)[..., None]  # the image is 2 wide
        where = torch.cat([size[:, None, None] * turned.view(-1, 2, 2), moved], dim=-1)
        grid = F.affine_grid(where, [batch, 3, SIZE, SIZE], align_corners=False)
        images = F.grid_sample(learn[some], grid, padding_mode="border", align_corners=False)
        yield images + 0.1 * torch.randn(images.shape, generator=generator), data.learn_labels[some]


@torch.no_grad()
def right(model: torch.nn.Module, data: Split) -> np.ndarray:
    model.eval()
    return (model(enlarged(data.judge)).argmax(-1) == data.judge_labels).numpy()


def run(seed: int, sparsity: float, steps: tuple[int, int, int], batch: int) -> dict:
    """Correct answers, image by image, of each stage."""
    dense_steps, codec_steps, mask_steps = steps
    data = split(seed)
    torch.manual_seed(seed)
    small = {"image_size": SIZE, "patch_size": PATCH, "dim": 48, "depth": 4, "heads": 3}
    model = create("deit_tiny", num_classes=10, **small)
    found: dict = {}

    def tune(network, stage: int, count: int, rate: float, extra=None) -> None:
        stream = jittered(data, batch, 10 * seed + stage)
        recipe = Recipe(
            learning_rate=rate, weight_decay=0.05, warmup_steps=100, full_rate_loss=0.0, bf16=False
        )
        finetune(network, stream, extra=extra, steps=count, recipe=recipe)

    tune(model, 0, dense_steps, DENSE)
    found["dense"] = right(model, data)
    longer = copy.deepcopy(model)
    tune(longer, 1, codec_steps, TUNED)
    tune(longer, 2, mask_steps, TUNED)
    found["dense, trained on"] = right(longer, data)

    batches = list(enlarged(data.learn).split(100))
    sparse = copy.deepcopy(model)
    maps = average_attention(model, batches)
    with attach(sparse, threshold(maps, sparsity=sparsity), image_size=SIZE):
        found["mask, untuned"] = right(sparse, data)
    with attach(sparse, threshold(maps, "random", sparsity=sparsity), image_size=SIZE):
        found["random mask, untuned"] = right(sparse, data)
    codecs = fit_codecs(head_moments(sparse, batches)).codecs
    fold(sparse, codecs, SIZE)
    term = Reconstruction(codecs, published=True)
    with attach_codec(sparse, codecs, SIZE, term.watch):
        found["codec, untuned"] = right(sparse, data)
        tune(sparse, 1, codec_steps, TUNED, term)
        found["codec, tuned"] = right(sparse, data)
        mask = threshold(average_attention(sparse, batches), sparsity=sparsity)
        with attach(sparse, mask, image_size=SIZE):
            tune(sparse, 2, mask_steps, TUNED, term)
            found["codec and mask, tuned"] = right(sparse, data)
    return found | {"sparsity": mask.sparsity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--steps", type=int, nargs=3, default=[5000, 600, 1200])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("from_scratch.json"))
    given = parser.parse_args()
    out, runs = Rows(given.out), []
    for seed in SEEDS:
        runs.append(run(seed, given.sparsity, tuple(given.steps), given.batch))
        print(seed, {n: float(np.mean(v)) for n, v in runs[-1].items()}, flush=True)
    for name in [n for n in runs[0] if n != "sparsity"]:
        each = [float(np.mean(found[name])) for found in runs]
        row = {"by_seed": each, "mean": float(np.mean(each)), "spread": float(np.std(each, ddof=1))}
        joined, base, longer = (
            np.concatenate([found[n] for found in runs])
            for n in (name, "dense", "dense, trained on")
        )
        about = {"against_dense": paired(joined, base), "against_longer": paired(joined, longer)}
        out.add(name, row | about)
    about = {"steps": given.steps, "batch": given.batch}
    out.add("settings", about | {"sparsity": [found["sparsity"] for found in runs]})


if __name__ == "__main__":
    main()
