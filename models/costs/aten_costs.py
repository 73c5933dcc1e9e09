"""One tensor operation -> one operation of a workload.

Operations are PyTorch's own (aten), as a dispatch mode sees them. Views are free; what is
not known here becomes `Unknown`. Sizes are elements of one image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...workload import Conv, Elementwise, Gemm, Op, Unknown
from .parameter_use import ParameterUse, distinct_elements

KINDS = {
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "_fused_rms_norm": "rms_norm",
    "native_batch_norm": "batch_norm",
    "_native_batch_norm_legit": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "_batch_norm_no_update": "batch_norm",
    "cudnn_batch_norm": "batch_norm",
    "max_pool2d_with_indices": "max_pool",
    "max_pool3d_with_indices": "max_pool",
    "avg_pool2d": "avg_pool",
    "avg_pool3d": "avg_pool",
    "_adaptive_avg_pool2d": "avg_pool",
    "_adaptive_avg_pool3d": "avg_pool",
    "adaptive_max_pool2d": "max_pool",
    "upsample_nearest1d": "upsample",
    "upsample_nearest2d": "upsample",
    "_upsample_nearest_exact2d": "upsample",
    "upsample_linear1d": "upsample",
    "upsample_bilinear2d": "upsample",
    "_upsample_bilinear2d_aa": "upsample",
    "upsample_bicubic2d": "upsample",
    "_upsample_bicubic2d_aa": "upsample",
    "grid_sampler_2d": "grid_sample",
    "pixel_shuffle": "pixel_shuffle",
    "pixel_unshuffle": "pixel_unshuffle",
    "channel_shuffle": "channel_shuffle",
    "native_channel_shuffle": "channel_shuffle",
    "hardswish": "hardswish",
    "glu": "glu",
    "prelu": "prelu",
    "_prelu_kernel": "prelu",
    "log_sigmoid_forward": "log_sigmoid",
    "floor_divide": "floor_divide",
    "linalg_vector_norm": "norm",
    "native_dropout": "dropout",
}
"""Fused operations, and the plain name of each."""

REDUCTIONS = frozenset(
    ["mean", "sum", "prod", "amax", "amin", "aminmax", "max", "min", "argmax", "argmin"]
    + ["var", "var_mean", "std", "std_mean", "any", "all", "norm", "logsumexp"]
    + ["cumsum", "cumprod", "sort", "topk"]
)

MOVES = {
    **dict.fromkeys(["clone", "_to_copy", "copy", "contiguous", "_reshape_copy"], "copy"),
    **dict.fromkeys(["cat", "stack", "repeat", "roll", "flip", "gather", "take", "rot90"]),
    **dict.fromkeys(["index", "index_select", "_unsafe_index"], "gather"),
    **dict.fromkeys(["constant_pad_nd", "reflection_pad2d", "replication_pad2d"], "pad"),
    **dict.fromkeys(["select_scatter", "slice_scatter", "scatter", "index_put"], "scatter"),
    **dict.fromkeys(["im2col", "col2im", "masked_select", "tril", "triu", "embedding"]),
}
"""Movement of data without arithmetic; a copy into place (``copy_``) among it."""

FREE = frozenset(
    ["empty", "empty_like", "empty_strided", "new_empty", "empty_permuted", "new_empty_strided"]
    + ["_unsafe_view", "detach", "alias", "lift_fresh", "lift", "_local_scalar_dense"]
    + ["resize_", "set_", "as_strided_", "unsqueeze_", "squeeze_", "transpose_", "t_"]
    + ["is_same_size", "sym_size", "sym_stride", "sym_numel"]
)
"""What touches no element."""

FILLS = frozenset(
    ["zeros", "ones", "full", "arange", "linspace", "eye", "scalar_tensor", "zeros_like"]
    + ["ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill", "zero", "rand"]
    + ["randn", "rand_like", "randn_like", "randint", "randperm", "bernoulli", "logspace"]
)
"""What writes without reading."""


class AtenCosts:
    """Makes the operations of a workload; parameters are charged to ``use`` as it goes."""

    def __init__(self, use: ParameterUse) -> None:
        self.use = use

    def of(self, name: str, func: Any, args: tuple, kwargs: dict, result: Any) -> list[Op]:
        """What ``func(*args, **kwargs) -> result`` costs; nothing for views and the like."""
        kind = func._schema.name.partition("::")[2]
        written = _first_tensor(result)
        if written is None:
            return []
        read = _tensors((args, kwargs))
        if _is_view(func) or kind in FREE:
            self.use.pass_on(read, written, view=True)
            for tensor in _tensors(result)[1:]:
                self.use.pass_on(read, tensor, view=True)
            return []
        product = PRODUCTS.get(kind)
        if product is not None:
            op = product(self, name, args, kwargs, written)
            return [*self._rest(name, read), op]
        return [self._elementwise(name, func, kind, read, written)]

    def _elementwise(
        self, name: str, func: Any, kind: str, read: list[Tensor], written: Tensor
    ) -> Op:
        plain = kind.removesuffix("_")
        outputs = written.numel()
        if plain in FILLS:
            return Elementwise(name, "fill", 0, outputs)
        if plain in MOVES:
            return self._moved(name, MOVES[plain] or plain, plain, read, written)
        label = KINDS.get(kind) or KINDS.get(plain)
        known = label or plain in REDUCTIONS or torch.Tag.pointwise in func.tags
        inputs = self._inputs(read)
        if not known:
            return Unknown(name, plain, inputs + self.use.charge(read), outputs)
        params = self.use.charge(read)
        return Elementwise(name, label or plain.strip("_"), inputs, outputs, params)

    def _moved(self, name: str, kind: str, plain: str, read: list[Tensor], written: Tensor) -> Op:
        """Data movement: a parameter that is only moved is charged where it is computed with."""
        source = [tensor for tensor in read if tensor.is_floating_point()]
        if plain == "copy" and len(read) == 2:  # copy_(target, source)
            source = read[1:]
        inputs = sum(map(distinct_elements, source))
        if plain in ("index", "index_select", "gather", "embedding", "_unsafe_index"):
            inputs = written.numel()
        if source and all(map(self.use.is_parameter, source)):
            self.use.pass_on(source, written)
            return Elementwise(name, kind, inputs, written.numel())
        params = self.use.charge(source)
        return Elementwise(name, kind, max(0, inputs - params), written.numel(), params)

    def _inputs(self, read: list[Tensor]) -> int:
        """Elements read, parameters apart."""
        return sum(distinct_elements(t) for t in read if not self.use.is_parameter(t))

    # ------------------------------------------------------------------- products

    def linear(self, name: str, rows: int, weight: Tensor, bias: Tensor | None) -> list[Op]:
        """[rows, inner] x ``weight`` [cols, inner], a linear layer."""
        cols, inner = weight.shape
        op = self._gemm(name, 1, rows, inner, cols, weight, bias)
        return [*self._rest(name, [weight] if bias is None else [weight, bias]), op]

    def _rest(self, name: str, operands: list[Tensor]) -> list[Op]:
        """Parameters of a product that are not just its weight: gathered ones, say."""
        params = self.use.charge(operands)
        return [Elementwise(name, "parameters", 0, 0, params)] if params else []

    def _gemm(
        self,
        name: str,
        batch: int,
        rows: int,
        inner: int,
        cols: int,
        second: Tensor,
        bias: Tensor | None = None,
    ) -> Gemm:
        """A product whose ``second`` operand and ``bias`` may be parameters."""
        weight = self.use.whole(second, batch * inner * cols)
        added = [bias] if bias is not None and self.use.whole(bias, batch * cols) else []
        self.use.charge([second] if weight else [])
        self.use.charge(added)
        return Gemm(name, rows, inner, cols, bias=bool(added), batch=batch, weight=weight)

    def _product(self, name: str, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Gemm:
        """[batch, rows, inner] x [batch, inner, cols], or without the batch."""
        batch = left.shape[0] if left.ndim == 3 else 1
        rows, inner, cols = left.shape[-2], left.shape[-1], right.shape[-1]
        if batch > 1 and self.use.whole(right, inner * cols):  # one weight for all
            batch, rows = 1, batch * rows
        if self.use.is_parameter(left) and not self.use.is_parameter(right):
            return self._gemm(name, batch, cols, inner, rows, left)
        return self._gemm(name, batch, rows, inner, cols, right, bias)

    def _mm(self, name: str, args: tuple, kwargs: dict, written: Tensor) -> Gemm:
        return self._product(name, args[0], args[1])

    def _addmm(self, name: str, args: tuple, kwargs: dict, written: Tensor) -> Gemm:
        return self._product(name, args[1], args[2], args[0])

    def _mv(self, name: str, args: tuple, kwargs: dict, written: Tensor) -> Gemm:
        matrix, vector = args[-2:]
        return self._product(name, matrix, vector.unsqueeze(-1))

    def _dot(self, name: str, args: tuple, kwargs: dict, written: Tensor) -> Gemm:
        return self._product(name, args[0][None], args[1][:, None])

    def _convolution(self, name: str, args: tuple, kwargs: dict, written: Tensor) -> Conv:
        image, weight, bias, stride, _, _, transposed, _, groups = args[:9]
        held = self.use.whole(weight, weight.numel())
        added = [bias] if bias is not None and self.use.whole(bias, bias.numel()) else []
        self.use.charge([weight] if held else [])
        self.use.charge(added)
        return Conv(
            name,
            in_channels=image.shape[1],
            out_channels=written.shape[1],
            in_size=_folded(image),
            out_size=_folded(written),
            kernel=_two(weight.shape[2:]),
            stride=_two(list(stride) * (image.ndim - 2) if len(stride) == 1 else stride),
            groups=groups,
            bias=bool(added),
            transposed=bool(transposed),
            weight=held,
        )


PRODUCTS: dict[str, Callable[..., Op]] = {
    "mm": AtenCosts._mm,
    "bmm": AtenCosts._mm,
    "addmm": AtenCosts._addmm,
    "baddbmm": AtenCosts._addmm,
    "mv": AtenCosts._mv,
    "addmv": AtenCosts._mv,
    "dot": AtenCosts._dot,
    "convolution": AtenCosts._convolution,
    "_convolution": AtenCosts._convolution,
}


def op_kind(op: Op) -> str:
    """The plain name of what an operation does: "linear", "conv", "layer_norm", ..."""
    if isinstance(op, Gemm):
        return "linear" if op.weight else "matmul"
    return getattr(op, "kind", type(op).__name__.lower())


def _two(sizes: Any) -> tuple[int, int]:
    """One, two or three sizes as (height, width): a line has height 1, a volume is folded."""
    sizes = [int(size) for size in sizes]
    return (math.prod(sizes[:-1]), sizes[-1])


def _folded(images: Tensor) -> tuple[int, int]:
    """(height, width) of all that lies in the batch of one image, its windows, as one map."""
    height, width = _two(images.shape[2:])
    return images.shape[0] * height, width


def _is_view(func: Any) -> bool:
    """Whether every result shares memory with an argument and nothing is written."""
    infos = [returned.alias_info for returned in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _first_tensor(result: Any) -> Tensor | None:
    found = _tensors(result)
    return found[0] if found else None


def _tensors(value: Any) -> list[Tensor]:
    """Every distinct tensor inside nested tuples, lists and dicts, in order."""
    found: dict[int, Tensor] = {}
    pending = [value]
    while pending:
        value = pending.pop(0)
        if isinstance(value, Tensor):
            found.setdefault(id(value), value)
        elif isinstance(value, dict):
            pending = [*value.values(), *pending]
        elif isinstance(value, (tuple, list)):
            pending = [*value, *pending]
    return list(found.values())
