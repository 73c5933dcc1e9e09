"""Where tensors lie in DRAM, and the lines of 64 bytes that each transfer asks for.

Q, K, V and the output lie one after the other, each contiguous: image and window, then head
(or codec block, for latents), then token in its original order, then channel. A head that is
loaded alone is loaded in the order of its reordered mask, so that each token has its real
address; heads of a codec block that are loaded together come in the original order. Index
bytes lie in the order of their plans, which windows share. Each transfer asks for its own
lines; neighbouring tokens in one line ask for it once. Choices, all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .ddr4 import LINE_BYTES

BURST = np.dtype(
    [
        (name, np.int64)
        for name in (
            "line",  # address / 64
            "bytes",  # of it that the transfer needs
            "tokens",  # of its transfer (bytes, for index and weights) whole with this line
            "closes",  # the transfer whose last line this is; -1: not the last
        )
    ]
)

PAGE_BYTES = 4096
"""Tensors begin at a multiple of this."""


class Span(NamedTuple):
    """Tokens ``start`` to ``stop`` of one region (window and head or block) of a tensor, in
    the order of ``head``'s queries or keys (-1: as they lie), of its keys those that ``rows``
    use, where given. Index and weights: bytes."""

    region: int
    start: int
    stop: int
    head: int = -1
    keys: bool = False
    rows: tuple[int, int] | None = None


def bursts_of(
    order: Callable[[Span], np.ndarray | None],
    spans: Sequence[Sequence[Span]],
    token_bytes: Sequence[int],
    region_tokens: Sequence[int],
    kept: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """(BURST of all transfers, first of each channel and the end).

    order          original token at each place that a span counts by; None: the same
    spans          what each transfer moves, channel after channel
    token_bytes    of a token of each channel
    region_tokens  tokens of a region of each channel
    kept           first transfers of each channel that move nothing
    """
    made, counts, transfer, base = [np.zeros(0, BURST)], [0], 0, 0
    for moved, size, tokens, skipped in zip(spans, token_bytes, region_tokens, kept, strict=True):
        known: dict[Span, np.ndarray] = {}
        transfer += skipped
        for span in moved[skipped:]:
            if span not in known:
                known[span] = _lines(base + span.region * tokens * size, size, span, order(span))
            lines = known[span].copy()
            lines["closes"][-1] = transfer
            transfer += 1
            made.append(lines)
        counts.append(sum(len(known[span]) for span in moved[skipped:]))
        regions = max((span.region + 1 for span in moved), default=0)
        base += -(-regions * tokens * size // PAGE_BYTES) * PAGE_BYTES
    return np.concatenate(made), np.cumsum(counts)


def _lines(base: int, size: int, span: Span, order: np.ndarray | None) -> np.ndarray:
    """BURST of one transfer, "closes" not yet set."""
    if order is None:
        return _contiguous(base + span.start * size, size, span.stop - span.start)
    first_byte = base + order[span.start : span.stop].astype(np.int64) * size
    first, last = first_byte // LINE_BYTES, (first_byte + size - 1) // LINE_BYTES
    count = last - first + 1
    token = np.repeat(np.arange(len(first)), count)
    step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    line = first[token] + step
    low = np.maximum(first_byte[token], line * LINE_BYTES)
    high = np.minimum(first_byte[token] + size, (line + 1) * LINE_BYTES)
    starts = np.flatnonzero(np.diff(line, prepend=-1))
    lines = np.full(len(starts), -1, BURST)
    lines["line"] = line[starts]
    lines["bytes"] = np.add.reduceat(high - low, starts)
    whole = np.cumsum(line == last[token])
    lines["tokens"] = whole[np.append(starts[1:], len(line)) - 1]
    return lines


def _contiguous(address: int, size: int, tokens: int) -> np.ndarray:
    end = address + size * tokens
    line = np.arange(address // LINE_BYTES, -(-end // LINE_BYTES))
    lines = np.full(len(line), -1, BURST)
    lines["line"] = line
    until = np.minimum((line + 1) * LINE_BYTES, end) - address
    lines["bytes"] = np.diff(until, prepend=0)
    lines["tokens"] = until // size
    return lines
