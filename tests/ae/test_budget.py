"""Latent heads: the paper's number, and a number of its own for each layer."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from codec_cases import random_qk

from sievit.ae import (
    HeadMoments,
    fit_codecs,
    latent_heads_by_layer,
    latent_heads_for,
)
from sievit.ae.budget import _most as most
from sievit.workload import HeadCodec


@pytest.mark.parametrize(("heads", "latent"), [(3, 2), (4, 2), (5, 3), (6, 3), (8, 4), (12, 6)])
def test_latent_heads_of_the_paper(heads, latent):
    assert latent_heads_for(heads) == latent


def test_layers_whose_heads_agree_least_get_more_latent_heads():
    """Heads made of 2 common parts need 2; heads of their own need all."""
    generator = torch.Generator().manual_seed(5)
    alike = [HeadMoments.of(x) for x in random_qk(1, heads=6)]
    apart = [
        HeadMoments.of(torch.randn(2, 6, 30, 6, generator=generator).double()) for _ in range(2)
    ]
    assert latent_heads_by_layer([alike, apart], mean=3) == (2, 4)
    more, less = latent_heads_by_layer([apart, alike], mean=3.5)
    assert more + less == 7
    assert more > less
    assert latent_heads_by_layer([alike, apart], mean=2, groups=2) == (2, 2)
    assert latent_heads_by_layer([apart, alike], mean=3, groups=2) == (4, 2)
    fitted = fit_codecs([alike, apart], latent_heads=(2, 4))
    assert fitted.shapes == (HeadCodec(6, 2), HeadCodec(6, 4))
    with pytest.raises(ValueError, match="3 numbers, the model 2 layers"):
        fit_codecs([alike, apart], latent_heads=(2, 4, 4))
    with pytest.raises(ValueError, match=r"must be in 1\.\.5 .* got 6"):
        latent_heads_by_layer([alike, apart], mean=6)
    with pytest.raises(ValueError, match=r"groups must divide .* got 4"):
        latent_heads_by_layer([alike, apart], mean=3, groups=4)


def test_sharing_out_finds_the_best_of_all_ways():
    generator = np.random.default_rng(0)
    for _ in range(20):
        layers = [{n: float(generator.random()) for n in (2, 4, 6)} for _ in range(4)]
        total = int(generator.integers(4, 12)) * 2
        ways = [way for way in product((2, 4, 6), repeat=4) if sum(way) <= total]
        best = max(sum(gains[n] for gains, n in zip(layers, way, strict=True)) for way in ways)
        found = most(layers, total)
        assert sum(found) <= total
        assert sum(gains[n] for gains, n in zip(layers, found, strict=True)) == pytest.approx(best)
