"""Plain vision transformers: ViT, DeiT and DINOv2, one class for the three.

ViT: arXiv 2010.11929; DeiT: arXiv 2012.12877; DINOv2: arXiv 2304.07193, registers:
arXiv 2309.16588. State-dict names and shapes are timm's. Sizes are tokens and pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import LayerScale, Mlp, PatchEmbed, resize_positions
from .vit_names import to_vit_names


class Attention(nn.Module):
    """Softmax attention of all tokens over all tokens, ``heads`` heads of dim / heads."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide dim {dim}, got {heads}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, dim = tokens.shape
        qkv = self.qkv(tokens).view(batch, count, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, heads, tokens, head dim)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, dim))


class Block(nn.Module):
    """x + ls1(attn(norm1 x)), then x + ls2(mlp(norm2 x))."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, qkv_bias: bool, layer_scale: float | None
    ) -> None:
        super().__init__()
        scale = nn.Identity if layer_scale is None else partial(LayerScale, dim, layer_scale)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, qkv_bias)
        self.ls1 = scale()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = scale()

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))


class ViT(nn.Module):
    """A plain vision transformer for any image whose sides are multiples of the patch.

    image_size       pixels of a side for which the position grid is stored; other sizes
                     are taken too, the grid is then resampled in every forward
    num_classes      0 for no head: the network then ends with the CLS token
    layer_scale      initial value of LayerScale, None for none (DINOv2: 1e-5)
    distilled        a distillation token and a second head (DeiT)
    registers        register tokens, which have no position (DINOv2 with registers)
    class_position   whether CLS (and the distillation token) have a position of their own;
                     timm's models with registers store that sum in the token itself

    Tokens are in the order CLS, distillation, registers, patches; the first
    ``num_prefix_tokens`` are not patches.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        distilled: bool = False,
        registers: int = 0,
        class_position: bool = True,
    ) -> None:
        super().__init__()
        self.image_size, self.dim, self.num_classes = image_size, dim, num_classes
        self.num_prefix_tokens = 1 + int(distilled) + registers
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.grid_size = self.patch_embed.grid(image_size, image_size)
        self.position_prefix = (1 + int(distilled)) if class_position else 0
        positions = self.position_prefix + self.grid_size[0] * self.grid_size[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if distilled else None
        self.reg_token = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, dim))
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio, qkv_bias, layer_scale) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else None
        self.head_dist = nn.Linear(dim, num_classes) if num_classes and distilled else None
        self._initialize()

    def _initialize(self) -> None:
        """Truncated normals of deviation 0.02, zero biases, as DeiT trains from."""
        for token in (self.cls_token, self.dist_token, self.reg_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images [batch, 3, height, width] -> tokens [batch, tokens, dim] after the last norm."""
        tokens = self._embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [batch, num_classes], or the CLS token [batch, dim] without a head.

        Distilled: the mean of the two heads, in training the pair (class, distillation).
        """
        tokens = self.forward_features(images)
        if self.head is None:
            return tokens[:, 0]
        logits = self.head(tokens[:, 0])
        if self.head_dist is None:
            return logits
        distilled = self.head_dist(tokens[:, 1])
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def _embed(self, images: Tensor) -> Tensor:
        """Patches with their prefix tokens and positions, [batch, tokens, dim]."""
        prefix, positions = self._positions(self.patch_embed.grid(*images.shape[-2:]))
        patches = self.patch_embed(images) + positions
        placed = self.cls_token
        if self.dist_token is not None:
            placed = torch.cat([placed, self.dist_token], dim=1)
        if self.position_prefix:
            placed = placed + prefix
        if self.reg_token is not None:
            placed = torch.cat([placed, self.reg_token], dim=1)
        return torch.cat([placed.expand(len(images), -1, -1), patches], dim=1)

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Positions of the prefix tokens [1, position_prefix, dim] and of the patches."""
        prefix, patches = self.pos_embed.tensor_split([self.position_prefix], dim=1)
        return prefix, resize_positions(patches, self.grid_size, grid)

    def translate_weights(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """A known release in this model's names and shapes, and the names left out."""
        return to_vit_names(state, self)


TINY = {"dim": 192, "depth": 12, "heads": 3}
SMALL = {"dim": 384, "depth": 12, "heads": 6}
BASE = {"dim": 768, "depth": 12, "heads": 12}
DINOV2 = {"image_size": 518, "patch_size": 14, "layer_scale": 1e-5, "num_classes": 0}
REGISTERS = {**DINOV2, "registers": 4, "class_position": False}


def _variant(**settings) -> Callable[..., ViT]:
    """A builder whose settings the caller may override."""
    return lambda **overrides: ViT(**{**settings, **overrides})


MODELS: dict[str, Callable[..., nn.Module]] = {
    **{
        f"{kind}_{size}{suffix}": _variant(**settings, **extra)
        for kind, suffix, extra in (
            ("deit", "", {}),
            ("deit", "_distilled", {"distilled": True}),
            ("deit", "_384", {"image_size": 384}),
            ("deit", "_distilled_384", {"image_size": 384, "distilled": True}),
            ("vit", "", {}),
            ("vit", "_384", {"image_size": 384}),
        )
        for size, settings in (("tiny", TINY), ("small", SMALL), ("base", BASE))
    },
    "dinov2_small": _variant(**SMALL, **DINOV2),
    "dinov2_base": _variant(**BASE, **DINOV2),
    "dinov2_small_registers": _variant(**SMALL, **REGISTERS),
    "dinov2_base_registers": _variant(**BASE, **REGISTERS),
}
