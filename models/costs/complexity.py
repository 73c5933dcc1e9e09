"""What a network costs for one image: products, parameters, activations, bytes.

Activations are those of "Fast and Accurate Model Scaling" (arXiv 2103.06877, section 3):
the outputs of convolutions and linear layers. MACs are multiply-accumulates; papers print
them as FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ...workload import Attention, Conv, Gemm, Op, Workload
from ..attention.shadow import Inputs
from .accesses import no_cache, unlimited_cache, with_cache
from .aten_costs import op_kind
from .trace import trace

COLUMNS = (
    "name",
    "kind",
    "macs",
    "params",
    "activations",
    "bytes_no_cache",
    "bytes_with_cache",
    "bytes_unlimited_cache",
    "intensity",
)
"""What `Complexity.rows` gives of each layer, in this order."""


@dataclass(frozen=True)
class LayerComplexity:
    """One operation, or several of one module.

    ``attention_macs`` are those of ``macs`` that are products of two activations inside
    attention (codecs included). ``bytes_with_cache`` is None where no cache was given.
    """

    name: str
    kind: str
    macs: int
    attention_macs: int
    params: int
    activations: int
    bytes_no_cache: int
    bytes_unlimited_cache: int
    bytes_with_cache: int | None = None

    @property
    def intensity(self) -> float:
        """MACs a byte, with the cache that was given, else an unlimited one."""
        moved = self.bytes_with_cache or self.bytes_unlimited_cache
        return self.macs / moved if moved else 0.0


@dataclass(frozen=True)
class Complexity:
    """The cost of a network by layer, and its sums.

    ``element_bytes`` is the width of every element, ``cache_bytes`` that of the cache of
    the ``bytes_with_cache`` or None. ``unknown`` names what could not be counted: its MACs
    are missing in the sums.
    """

    name: str
    layers: tuple[LayerComplexity, ...]
    unknown: tuple[str, ...]
    element_bytes: int
    cache_bytes: int | None

    @property
    def total(self) -> LayerComplexity:
        return _merged(self.name, "total", self.layers)

    @property
    def macs(self) -> int:
        return self.total.macs

    @property
    def macs_without_attention(self) -> int:
        """Without the products of two activations inside attention: what counters print
        that see layers only."""
        return self.total.macs - self.total.attention_macs

    @property
    def params(self) -> int:
        return self.total.params

    @property
    def activations(self) -> int:
        return self.total.activations

    def by_kind(self) -> tuple[LayerComplexity, ...]:
        """Summed over operations of one kind, most MACs first, then most bytes."""
        merged = _grouped(self.layers, lambda layer: layer.kind)
        return tuple(
            sorted(merged, key=lambda kind: (-kind.macs, -kind.bytes_unlimited_cache, kind.name))
        )

    def by_module(self, depth: int = 1) -> tuple[LayerComplexity, ...]:
        """Summed over modules, named by the first ``depth`` parts of the qualified name."""
        if depth < 1:
            raise ValueError(f"depth is at least 1, got {depth}")
        return _grouped(self.layers, lambda layer: ".".join(layer.name.split(".")[:depth]))

    def rows(self) -> list[tuple[Any, ...]]:
        """The layers and their sum, in `COLUMNS`: a table's rows."""
        return [
            tuple(getattr(layer, column) for column in COLUMNS)
            for layer in (*self.layers, self.total)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, layers and sums."""
        return {
            "name": self.name,
            "element_bytes": self.element_bytes,
            "cache_bytes": self.cache_bytes,
            "unknown": list(self.unknown),
            "macs_without_attention": self.macs_without_attention,
            "total": asdict(self.total),
            "layers": [asdict(layer) for layer in self.layers],
        }


def complexity(
    model: nn.Module | Workload,
    inputs: Inputs | None = None,
    element_bytes: int = 4,
    cache_bytes: int | None = None,
) -> Complexity:
    """Count a model, at an image size or other ``inputs`` as `trace` takes them, or a
    workload (whose masks and codecs then count).

    element_bytes  width of every activation and parameter
    cache_bytes    size of a cache, for ``bytes_with_cache``
    """
    if element_bytes < 1 or (cache_bytes is not None and cache_bytes < element_bytes):
        raise ValueError(
            "element_bytes is at least 1 and cache_bytes at least that, got "
            f"{element_bytes} and {cache_bytes}"
        )
    workload = model if isinstance(model, Workload) else trace(model, inputs)
    return Complexity(
        name=workload.name,
        layers=tuple(_layer(op, element_bytes, cache_bytes) for op in workload.ops),
        unknown=tuple(op.name for op in workload.unknown),
        element_bytes=element_bytes,
        cache_bytes=cache_bytes,
    )


def _layer(op: Op, element_bytes: int, cache_bytes: int | None) -> LayerComplexity:
    learned = isinstance(op, Conv) or (isinstance(op, Gemm) and op.weight)
    cached = None
    if cache_bytes is not None:
        cached = element_bytes * with_cache(op, cache_bytes // element_bytes)
    return LayerComplexity(
        name=op.name,
        kind=op_kind(op),
        macs=op.macs,
        attention_macs=op.macs if isinstance(op, Attention) else 0,
        params=op.params,
        activations=op.activations if learned else 0,
        bytes_no_cache=element_bytes * no_cache(op),
        bytes_unlimited_cache=element_bytes * unlimited_cache(op),
        bytes_with_cache=cached,
    )


SUMMED = (
    "macs",
    "attention_macs",
    "params",
    "activations",
    "bytes_no_cache",
    "bytes_unlimited_cache",
)


def _merged(name: str, kind: str, layers: tuple[LayerComplexity, ...]) -> LayerComplexity:
    sums = {field: sum(getattr(layer, field) for layer in layers) for field in SUMMED}
    cached = [held for layer in layers if (held := layer.bytes_with_cache) is not None]
    whole = sum(cached) if len(cached) == len(layers) else None
    return LayerComplexity(name, kind, **sums, bytes_with_cache=whole)


def _grouped(
    layers: tuple[LayerComplexity, ...], key: Callable[[LayerComplexity], str]
) -> tuple[LayerComplexity, ...]:
    """Layers of one key together, in the order in which the keys first appear."""
    groups: dict[str, list[LayerComplexity]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    merged = []
    for name, group in groups.items():
        kinds = {layer.kind for layer in group}
        merged.append(_merged(name, kinds.pop() if len(kinds) == 1 else "several", tuple(group)))
    return tuple(merged)
