"""What the simulated machine's integers cost a real ViT: fidelity with each width of theirs.

    python examples/studies/int8_arithmetic.py WEIGHTS --out int8_arithmetic.json

WEIGHTS is a DINOv2 ViT-S/14 file that `sievit.models.load_weights` reads. Masks are learned,
and scales calibrated, on five of scikit-image's photos, features judged on three others.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace

import numpy as np
import torch

from sievit.accel import Arithmetic
from sievit.files import write_json
from sievit.images import batches, random_crops, sample_photos
from sievit.models import create
from sievit.provenance import versions
from sievit.sparsify import (
    attach,
    attach_int8,
    average_attention,
    calibrate_int8,
    fidelity,
    threshold,
    token_features,
)

SEED, SIZE, LEARN_CROPS, JUDGE_CROPS = 0, 224, 24, 8
PLAIN = Arithmetic()
WIDTHS = {
    "defaults": PLAIN,
    "probabilities of 10 bits": replace(PLAIN, probability_bits=10),
    "probabilities of 16 bits": replace(PLAIN, probability_bits=16),
    "scores of 12 bits, 4 behind the point": replace(PLAIN, score_bits=12, fraction_bits=4),
    "scores saturate at 128": PLAIN,
}


def compared(float_tokens, tokens) -> dict[str, float]:
    made = fidelity(float_tokens, tokens, 1)
    return {"patch_cosine": made.patch_cosine, "cls_cosine": made.cls_cosine,
            "relative_l2": made.relative_l2}  # fmt: skip


def rows(model, learn, judge):
    """One row a sparsity and a set of widths."""
    maps, dense = average_attention(model, learn), token_features(model, judge)
    for sparsity in (0.0, 0.5, 0.7, 0.9):
        mask = threshold(maps, sparsity=sparsity) if sparsity else None
        masked = dense
        if mask is not None:
            with attach(model, mask, backend="dense"):
                masked = token_features(model, judge)
        known: dict[tuple[int, int], tuple] = {}  # probabilities have no part in scales
        for name, arithmetic in WIDTHS.items():
            widths = (arithmetic.score_bits, arithmetic.fraction_bits)
            if widths not in known:
                known[widths] = calibrate_int8(model, learn, mask, arithmetic)
            scales = known[widths]
            if name.startswith("scores saturate"):
                scales = [replace(layer, score_shift=0) for layer in scales]
            with attach_int8(model, mask, scales, arithmetic):
                tokens = token_features(model, judge)
            shift = max(int(np.max(layer.score_shift)) for layer in scales)
            yield {
                "sparsity": sparsity,
                "widths": name,
                "largest_score_shift": shift,
                "int8_against_float": compared(masked, tokens),
                "int8_against_dense_float": compared(dense, tokens),
                "float_against_dense_float": compared(dense, masked),
            }


def main(weights: str, out: str) -> None:
    torch.manual_seed(SEED)
    model = create("dinov2_small", pretrained=weights).eval()
    generator = np.random.default_rng(SEED)
    crops = [
        list(batches(random_crops(photos, SIZE, count, generator), 8))
        for photos, count in zip(sample_photos(), (LEARN_CROPS, JUDGE_CROPS), strict=True)
    ]
    found = []
    for row in rows(model, *crops):
        found.append(row)
        print(f"{row['sparsity']:.1f}  {row['widths']:40s} {row['int8_against_float']}")
    result = {
        "settings": {"seed": SEED, "image_size": SIZE, "learn_crops": LEARN_CROPS,
                     "judge_crops": JUDGE_CROPS, "device": "cpu",
                     "widths": {name: asdict(a) for name, a in WIDTHS.items()}},
        "versions": versions(),
        "rows": found,
    }  # fmt: skip
    write_json(result, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights")
    parser.add_argument("--out", default="int8_arithmetic.json")
    arguments = parser.parse_args()
    main(arguments.weights, arguments.out)
