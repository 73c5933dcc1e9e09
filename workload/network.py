"""A network for one image: its operations in order, with masks and codecs put into them.

All sizes are elements; bytes = elements x the width that the machine gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from ..checks import check_fields
from ..moved import old_arguments
from .masks import AttentionMask, GlobalThreshold, PolarizedMask, polarize_head
from .ops import Attention, HeadCodec, Op, Unknown


@dataclass(frozen=True)
class Workload:
    """A network for one image: its name and its operations in order, each after the one
    before. A batch of B images repeats the operations B times and reads weights once."""

    name: str
    ops: tuple[Op, ...]

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.ops, list | tuple):
            raise ValueError(f"ops must be operations in order, got {self.ops!r}")
        object.__setattr__(self, "ops", tuple(self.ops))
        for place, op in enumerate(self.ops):
            if not isinstance(op, Op):
                kinds = ", ".join(kind.__name__ for kind in get_args(Op))
                raise ValueError(f"ops[{place}] must be one of {kinds}, got {op!r}")

    @property
    def attention(self) -> tuple[Attention, ...]:
        """The attention operations, in call order: entry l is "layer l" of a mask."""
        return tuple(op for op in self.ops if isinstance(op, Attention))

    @property
    def unknown(self) -> tuple[Unknown, ...]:
        """Operations whose cost is not known and not in the totals."""
        return tuple(op for op in self.ops if isinstance(op, Unknown))

    @property
    def macs(self) -> int:
        return sum(op.macs for op in self.ops)

    @property
    def params(self) -> int:
        return sum(op.params for op in self.ops)

    @property
    def activations(self) -> int:
        return sum(op.activations for op in self.ops)

    @old_arguments("min_kept")
    def with_attention(
        self,
        mask: AttentionMask | None = None,
        codec: HeadCodec | Sequence[HeadCodec | None] | None = None,
        global_threshold: GlobalThreshold | None = None,
    ) -> Workload:
        """This network with ``mask`` polarized into its attention and with ``codec``.

        None leaves that part dense (uncompressed). A sequence gives each layer its own
        codec. ``global_threshold`` None is the mask's own. Raises
        ValueError when layers, heads or tokens do not fit.
        """
        calls = self.attention
        codecs = _per_layer(codec, len(calls))
        masks: list[tuple[PolarizedMask, ...] | None] = [None] * len(calls)
        if mask is not None:
            expected = tuple((op.heads, op.queries, op.keys) for op in calls)
            if mask.shapes != expected:
                raise ValueError(_misfit(self.name, expected, mask.shapes))
            cut = mask.global_threshold if global_threshold is None else global_threshold
            masks = [tuple(polarize_head(h, cut) for h in layer) for layer in mask.keep]
        return self.with_polarized(masks, codecs)

    def with_polarized(
        self,
        masks: Sequence[tuple[PolarizedMask, ...] | None],
        codecs: Sequence[HeadCodec | None],
    ) -> Workload:
        """As `with_attention`, from heads that are already polarized, [layer][head]."""
        calls = self.attention
        if len(masks) != len(calls) or len(codecs) != len(calls):
            raise ValueError(
                f"{self.name} has {len(calls)} attention layers, got {len(masks)} layers of "
                f"masks and {len(codecs)} codecs"
            )
        changed = iter(
            replace(op, masks=m, codec=c) for op, m, c in zip(calls, masks, codecs, strict=True)
        )
        ops = tuple(next(changed) if isinstance(op, Attention) else op for op in self.ops)
        return replace(self, ops=ops)


def _per_layer(
    codec: HeadCodec | Sequence[HeadCodec | None] | None, layers: int
) -> Sequence[HeadCodec | None]:
    if codec is None or isinstance(codec, HeadCodec):
        return [codec] * layers
    return codec


def _misfit(
    name: str, expected: tuple[tuple[int, int, int], ...], got: tuple[tuple[int, int, int], ...]
) -> str:
    if len(expected) != len(got):
        return f"{name} has {len(expected)} attention layers, the mask has {len(got)}"
    layer = next(i for i, (e, g) in enumerate(zip(expected, got, strict=True)) if e != g)
    return (
        f"layer {layer} of {name} is (heads, queries, keys) = {expected[layer]}, "
        f"the mask's is {got[layer]}"
    )
