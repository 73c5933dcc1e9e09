"""DCNv4 for attention and for depthwise convolutions: shapes, counts, and that it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sievit.models.families.convnext import MODELS as CONVNEXTS
from sievit.models.families.convnext import ConvNeXt
from sievit.models.families.dcn import DCNv4, deform_core
from sievit.models.families.vit import MODELS as VITS
from sievit.models.families.vit import ViT
from sievit.models.replace import replace_attention, replace_depthwise


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def small_vit(**changes) -> ViT:
    return ViT(**{"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2,
                  "num_classes": 4, **changes})  # fmt: skip


def small_convnext() -> ConvNeXt:
    return ConvNeXt((16, 32), (1, 2), layer_scale=0.5, num_classes=4)


def merged(width: int) -> int:
    """Outputs of DCNv4's linear layer at 16 channels a group: 27 a group, padded to 8."""
    return -(-27 * (width // 16) // 8) * 8


def test_attention_is_replaced_and_parameters_change_by_the_expected_amount():
    with torch.device("meta"):
        model = VITS["deit_small"]()
        changed = replace_attention(model)
    attention = 3 * (384 * 384 + 384) + 384 * 384 + 384
    operator = 2 * (384 * 384 + 384) + (384 + 1) * merged(384)
    assert params(model) - params(changed) == 12 * (attention - operator)
    assert params(model) == 22050664
    assert changed(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def test_depthwise_convolutions_are_replaced_and_parameters_change_by_the_expected_amount():
    with torch.device("meta"):
        model = CONVNEXTS["convnext_base"]()
        changed = replace_depthwise(model)
    change = 0
    for width, depth in zip((128, 256, 512, 1024), (3, 3, 27, 3), strict=True):
        change += depth * ((width + 1) * merged(width) - 50 * width)
    assert params(changed) - params(model) == change
    assert changed(torch.empty(1, 3, 64, 96, device="meta")).shape == (1, 1000)


def test_an_operator_put_in_starts_as_the_mean_of_its_window():
    torch.manual_seed(0)
    block = replace_depthwise(small_convnext()).stages[1][0]
    x = torch.randn(2, 32, 5, 6)
    torch.testing.assert_close(block.dwconv(x), F.avg_pool2d(x, 3, 1, 1))


def test_prefix_tokens_read_the_mean_of_the_patches():
    torch.manual_seed(0)
    changed = replace_attention(small_vit(distilled=True))
    tokens = torch.randn(2, 2 + 16, 32)
    mixed = changed.blocks[0].attn(tokens)
    assert mixed.shape == tokens.shape
    torch.testing.assert_close(mixed[:, 0], mixed[:, 2:].mean(1))
    torch.testing.assert_close(mixed[:, 1], mixed[:, 0])
    torch.testing.assert_close(mixed[:, 2:], changed.blocks[0].attn.dcn(tokens[:, 2:]))


def test_the_model_given_is_left_alone_and_mode_and_type_are_kept():
    model = small_vit().double().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = replace_attention(model)
    assert not any(isinstance(module, DCNv4) for module in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert changed(torch.zeros(1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64
    assert not any(module.training for module in changed.modules())


def test_the_core_passed_in_is_used():
    calls = []

    def core(*tensors, **geometry):
        calls.append(geometry["groups"])
        return deform_core(*tensors, **geometry)

    replace_depthwise(small_convnext(), core=core)(torch.zeros(1, 3, 32, 32))
    replace_attention(small_vit(), core=core)(torch.zeros(1, 3, 32, 32))
    assert calls == [1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "build", [lambda: replace_attention(small_vit()), lambda: replace_depthwise(small_convnext())]
)
def test_a_replaced_network_learns(build):
    """Four kinds of stripes, told apart after a few steps; the offsets move with the rest."""
    torch.manual_seed(0)
    model = build()
    line = torch.arange(32.0)
    patterns = torch.stack([
        torch.sin(line[:, None] * 0.8).expand(32, 32),
        torch.sin(line[None, :] * 0.8).expand(32, 32),
        torch.sin((line[:, None] + line[None, :]) * 0.6),
        torch.sin((line[:, None] - line[None, :]) * 0.6),
    ])  # fmt: skip
    labels = torch.arange(4).repeat(4)
    images = patterns[labels][:, None].expand(-1, 3, -1, -1) + 0.3 * torch.randn(16, 3, 32, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.0
    assert losses[-1] < 0.3
    moved = [m.offset_mask.weight.abs().max() for m in model.modules() if isinstance(m, DCNv4)]
    assert min(moved) > 0


def test_what_cannot_be_replaced_is_named():
    with pytest.raises(ValueError, match="ConvNeXt has no attention module"):
        replace_attention(small_convnext())
    with pytest.raises(ValueError, match="ViT has no depthwise convolution"):
        replace_depthwise(small_vit())
    with pytest.raises(ValueError, match="width 32 is not divisible by group_channels 24"):
        replace_attention(small_vit(), group_channels=24)
    with pytest.raises(ValueError, match="8 patches form no square grid"):
        replace_attention(small_vit())(torch.zeros(1, 3, 16, 32))
