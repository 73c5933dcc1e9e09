"""Networks of any mix of layers, and widths at a given time."""

from __future__ import annotations

import pytest
import torch

from sievit.models import create, find_attention, trace
from sievit.models.families.mixed import MixedViT, spread, width_at


def test_layers_are_spread_evenly():
    assert spread(3, 3) == "amamam"
    assert spread(2, 4) == "ammamm"
    assert spread(0, 3) == "mmm"
    assert spread(3, 0) == "aaa"
    for attention in range(13):
        kinds = spread(attention, 24 - attention)
        assert (kinds.count("a"), kinds.count("m")) == (attention, 24 - attention)
        gaps = {len(gap) for gap in kinds.split("a")[1:-1]}
        assert not gaps or max(gaps) - min(gaps) <= 1
    with pytest.raises(ValueError, match="got 0 and 0"):
        spread(0, 0)


def test_half_and_half_is_the_plain_vit():
    settings = {"image_size": 32, "patch_size": 8, "dim": 48, "num_classes": 5}
    plain = create("vit_tiny", depth=2, **settings).eval()
    mixed = MixedViT("amam", 192, **settings).eval()
    state = {}
    for name, tensor in plain.state_dict().items():
        block, _, rest = name.removeprefix("blocks.").partition(".")
        for branch, (norm, f) in enumerate((("norm1", "attn"), ("norm2", "mlp"))):
            if name.startswith("blocks.") and rest.startswith((norm, f)):
                inner = rest.replace(f"{norm}.", "norm.").replace(f"{f}.", "f.")
                state[f"blocks.{2 * int(block) + branch}.{inner}"] = tensor
        if not name.startswith("blocks."):
            state[name] = tensor
    mixed.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(mixed(x), plain(x), rtol=0, atol=0)
    assert trace(mixed).macs == trace(plain).macs
    assert len(find_attention(MixedViT("mma", 16, **settings))) == 1
    x.requires_grad_()
    for mean in (True, False):  # without attention CLS sees nothing of the image
        blind = MixedViT("mm", 16, mean=mean, **settings)
        (gradient,) = torch.autograd.grad(blind(x).square().sum(), x)
        assert bool(gradient.any()) == mean
    with pytest.raises(ValueError, match="'a' and 'm', got 'ax'"):
        MixedViT("ax", 16)


@pytest.mark.parametrize("bend", [0.0, 2e-6])
def test_the_width_at_a_time(bend):
    """On a straight and on a bent line of times, against trying every width."""

    def measure(width: int) -> float:
        return 0.5 + 0.001 * width + bend * width**2

    target = 0.87
    best = min(range(8, 1024, 8), key=lambda width: abs(measure(width) - target))
    assert abs(width_at(target, measure, 512) - best) <= 8
    with pytest.raises(ValueError, match=r"width 8 takes 0\.508, the target is 0\.4"):
        width_at(0.4, lambda width: 0.5 + 0.001 * width, 512)
