"""Channels of a transformer's blocks that can be removed or added, weights and all.

A `ChannelSet` is one place of a network with interchangeable channels: the query/key pairs
of an attention, its value channels, the hidden channels of an MLP. Known are our ViT and
EfficientViT; in a cascaded head of the latter values are the next head's input, so only
its query/key pairs are free.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.families import vit
from ..models.families.conv_layers import ConvBN
from ..models.families.efficientvit import FFN, CascadedGroupAttention
from ..models.families.layers import Mlp

NEW_STD = 0.02
"""Deviation of the first weights of channels that join."""


@dataclass(frozen=True)
class ChannelSet:
    """``heads`` times ``units`` channels of ``kind`` 'qk', 'v' or 'mlp' in ``module``.

    All heads of a set keep the same number, so that tensors stay rectangular; a cascaded
    head is a set of its own, ``index`` in its module.
    """

    module: str
    kind: str
    heads: int
    units: int
    index: int | None = None

    @property
    def name(self) -> str:
        place = f"{self.module}.{self.kind}"
        return place if self.index is None else f"{place}.{self.index}"


class CutAttention(nn.Module):
    """`sievit.models.families.vit.Attention` with key and value dimensions of its own.

    ``scale`` stays that of the attention it was cut from.
    """

    def __init__(
        self, dim: int, heads: int, key_dim: int, value_dim: int, scale: float, bias: bool
    ) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim, self.scale = heads, key_dim, value_dim, scale
        self.qkv = nn.Linear(dim, heads * (2 * key_dim + value_dim), bias=bias)
        self.proj = nn.Linear(heads * value_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        parts = self.qkv(tokens).split([keys, keys, values], dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def find_channels(model: nn.Module) -> tuple[ChannelSet, ...]:
    """The channel sets of ``model``, block after block.

    Raises ValueError where there is none, and for a network whose batch norms are folded.
    """
    found: list[ChannelSet] = []
    for name, module in model.named_modules():
        if isinstance(module, vit.Attention | CutAttention):
            heads, key_dim, value_dim = _dims(module)
            found.append(ChannelSet(name, "qk", heads, key_dim))
            found.append(ChannelSet(name, "v", heads, value_dim))
        elif isinstance(module, Mlp):
            found.append(ChannelSet(name, "mlp", 1, module.fc1.out_features))
        elif isinstance(module, FFN | CascadedGroupAttention):
            found += _cascade_sets(name, module)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no channels that can be removed; known are ViT and "
            "EfficientViT"
        )
    return tuple(found)


def _cascade_sets(name: str, module: FFN | CascadedGroupAttention) -> list[ChannelSet]:
    if not all(isinstance(layer, ConvBN) for layer in _conv_bns(module)):
        raise ValueError(f"{name} has its batch norms folded: remove channels before that")
    if isinstance(module, FFN):
        return [ChannelSet(name, "mlp", 1, module.pw1.c.out_channels)]
    return [ChannelSet(name, "qk", 1, dim, i) for i, dim in enumerate(module.key_dims)]


def _conv_bns(module: FFN | CascadedGroupAttention) -> list[nn.Module]:
    if isinstance(module, FFN):
        return [module.pw1, module.pw2]
    return [*module.qkvs, *module.dws]


def _dims(attention: vit.Attention | CutAttention) -> tuple[int, int, int]:
    """(heads, key dim, value dim)."""
    if isinstance(attention, CutAttention):
        return attention.heads, attention.key_dim, attention.value_dim
    dim = attention.proj.in_features // attention.heads
    return attention.heads, dim, dim


def _slope(weight: Tensor) -> Tensor:
    """Gradient times weight, entry by entry."""
    if weight.grad is None:
        raise ValueError("a weight has no gradient: run the backward pass first")
    return weight.grad * weight


def _conv_bn(layers: nn.ModuleList, index: int | None) -> ConvBN:
    """That of a cascaded head, whose channel set has an index."""
    layer = None if index is None else layers[index]
    if not isinstance(layer, ConvBN):
        raise ValueError(f"there is no convolution of head {index}")
    return layer


def gate_gradient(model: nn.Module, channels: ChannelSet) -> Tensor:
    """d loss / d z [heads, units] of a factor z = 1 on each channel, from the gradients of
    the weights: sum over a channel's weights of gradient times weight."""
    module = model.get_submodule(channels.module)
    if isinstance(module, FFN):
        return _slope(module.pw2.c.weight).sum((0, 2, 3))[None]
    if isinstance(module, CascadedGroupAttention):
        norm = _conv_bn(module.dws, channels.index).bn
        return (_slope(norm.weight) + _slope(norm.bias))[None]
    if isinstance(module, Mlp):
        return _slope(module.fc2.weight).sum(0)[None]
    if not isinstance(module, vit.Attention | CutAttention):
        raise ValueError(f"{channels.name} is no channel set of a {type(module).__name__}")
    if channels.kind == "v":
        return _slope(module.proj.weight).sum(0).view(channels.heads, channels.units)
    gates, bias = _slope(module.qkv.weight).sum(1), module.qkv.bias
    gates = gates if bias is None else gates + _slope(bias)
    return gates[: channels.heads * channels.units].view(channels.heads, channels.units)


@torch.no_grad()
def resize(
    model: nn.Module, kept: Mapping[str, Tensor], added: Mapping[str, int] | None = None
) -> nn.Module:
    """A copy of ``model`` whose channel sets hold other channels.

    kept    by set name, int64 [heads, count]: the channels that stay, a row a head; a set
            that is not named keeps all
    added   by set name, how many channels join in each head, behind the kept ones. They
            do not change what the network computes (queries, and the columns that read
            values and hidden channels, start at zero; the other side at random, by the
            global generator), but they can be trained

    Raises ValueError for unknown sets and for counts below one.
    """
    added = added or {}
    sets = {channels.name: channels for channels in find_channels(model)}
    unknown = [name for name in (*kept, *added) if name not in sets]
    if unknown:
        raise ValueError(f"no channel set {unknown[0]!r}; there are {', '.join(sets)}")
    changed = copy.deepcopy(model)
    plans: dict[str, dict[tuple[str, int | None], Plan]] = {}
    for name, channels in sets.items():
        place = plans.setdefault(channels.module, {})
        place[channels.kind, channels.index] = _plan(channels, kept.get(name), added.get(name, 0))
    for name, place in plans.items():
        module = changed.get_submodule(name)
        if isinstance(module, vit.Attention | CutAttention):
            changed.set_submodule(
                name, _resized_attention(module, place["qk", None], place["v", None])
            )
        elif isinstance(module, Mlp):
            _resize_mlp(module, place["mlp", None])
        elif isinstance(module, FFN):
            _resize_ffn(module, place["mlp", None])
        elif isinstance(module, CascadedGroupAttention):
            for (_, head), plan in place.items():
                if head is not None:
                    _resize_cascaded_head(module, head, plan)
    return changed


@dataclass(frozen=True, eq=False)
class Plan:
    """Channels that stay, int64 [heads, count], and how many join in each head."""

    kept: Tensor
    added: int

    @property
    def count(self) -> int:
        return self.kept.shape[1] + self.added


def _plan(channels: ChannelSet, kept: Tensor | None, added: int) -> Plan:
    if kept is None:
        kept = torch.arange(channels.units).expand(channels.heads, -1)
    plan = Plan(kept, added)
    if added < 0 or plan.count < 1:
        raise ValueError(f"{channels.name} needs one channel or more, got {plan.count}")
    return plan


def _regrown(rows: Tensor, plan: Plan, std: float = 0.0, mean: float = 0.0) -> Tensor:
    """rows [heads, units, ...] -> [heads, count, ...]: those kept, then new ones."""
    heads = len(plan.kept)
    new = torch.randn(heads, plan.added, *rows.shape[2:], dtype=rows.dtype, device=rows.device)
    index = plan.kept.to(rows.device)
    picked = rows[torch.arange(heads, device=rows.device)[:, None], index]
    return torch.cat((picked, mean + std * new), dim=1)


def _resized_attention(old: vit.Attention | CutAttention, qk: Plan, v: Plan) -> CutAttention:
    heads, key_dim, value_dim = _dims(old)
    scale = old.scale if isinstance(old, CutAttention) else key_dim**-0.5
    biased = old.qkv.bias is not None
    dim = old.qkv.in_features
    with torch.device("meta"):
        new = CutAttention(dim, heads, qk.count, v.count, scale, biased)

    def joined(stored: Tensor, std: float) -> nn.Parameter:
        parts = stored.split([heads * key_dim, heads * key_dim, heads * value_dim])
        q, k, values = (part.unflatten(0, (heads, -1)) for part in parts)
        grown = (_regrown(q, qk), _regrown(k, qk, std), _regrown(values, v, std))
        return nn.Parameter(torch.cat([part.flatten(0, 1) for part in grown]))

    new.qkv.weight = joined(old.qkv.weight, NEW_STD)
    if biased:
        new.qkv.bias = joined(old.qkv.bias, 0.0)
    columns = _regrown(old.proj.weight.T.unflatten(0, (heads, -1)), v)
    new.proj.weight = nn.Parameter(columns.flatten(0, 1).T.contiguous())
    new.proj.bias = old.proj.bias
    return new.train(old.training)


def _resize_mlp(mlp: Mlp, plan: Plan) -> None:
    first, second = mlp.fc1, mlp.fc2
    first.weight = nn.Parameter(_regrown(first.weight[None], plan, NEW_STD)[0])
    first.bias = nn.Parameter(_regrown(first.bias[None], plan)[0])
    second.weight = nn.Parameter(_regrown(second.weight.T[None], plan)[0].T.contiguous())
    first.out_features = second.in_features = plan.count


def _resize_conv_bn(layer: ConvBN, parts: Sequence[tuple[int, Plan, float]]) -> None:
    """New outputs of a convolution and its norm.

    ``parts`` follow each other in the outputs: how many there are now, what becomes of
    them, and the deviation that new weights start with.
    """
    sizes = [size for size, _, _ in parts]

    def joined(stored: Tensor, mean: float = 0.0, random: bool = False) -> Tensor:
        rows = zip(stored.split(sizes), parts, strict=True)
        return torch.cat(
            [_regrown(r[None], plan, std if random else 0.0, mean)[0] for r, (_, plan, std) in rows]
        )

    norm = layer.bn
    layer.c.weight = nn.Parameter(joined(layer.c.weight, random=True))
    norm.weight = nn.Parameter(joined(norm.weight, mean=1.0))
    norm.bias = nn.Parameter(joined(norm.bias))
    if norm.running_mean is not None and norm.running_var is not None:
        norm.running_mean = joined(norm.running_mean)
        norm.running_var = joined(norm.running_var, mean=1.0)
    layer.c.out_channels = norm.num_features = len(norm.weight)


def _resize_ffn(ffn: FFN, plan: Plan) -> None:
    _resize_conv_bn(ffn.pw1, [(ffn.pw1.c.out_channels, plan, NEW_STD)])
    second = ffn.pw2.c
    columns = _regrown(second.weight.transpose(0, 1)[None], plan)[0]
    second.weight = nn.Parameter(columns.transpose(0, 1).contiguous())
    second.in_channels = plan.count


def _resize_cascaded_head(attention: CascadedGroupAttention, head: int, plan: Plan) -> None:
    key_dim, value_dim = attention.key_dims[head], attention.value_dim
    values = Plan(torch.arange(value_dim)[None], 0)
    parts = [(key_dim, plan, 0.0), (key_dim, plan, NEW_STD), (value_dim, values, 0.0)]
    _resize_conv_bn(_conv_bn(attention.qkvs, head), parts)
    depthwise = _conv_bn(attention.dws, head)
    _resize_conv_bn(depthwise, [(key_dim, plan, NEW_STD)])
    depthwise.c.in_channels = depthwise.c.groups = plan.count
    attention.key_dims[head] = plan.count
