"""Elements that one operation moves between memory and processor, for three caches.

No cache: each multiplication fetches both factors. Unlimited: each operand is read once,
each result written once. A cache of given size: the best of a family of tilings in which
a tile of results stays in the cache until it is done. Each operation starts and ends in
memory; what a cache could carry from one to the next is not counted. Work without
products uses each element once, so that a cache changes nothing.

The two limits are the analysis of the DCNv4 paper (section 3), there for one operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...workload import Attention, Conv, Deform, Gemm, Op

CORNERS = 4
"""Values that one bilinear sample reads."""


def unlimited_cache(op: Op) -> int:
    """Elements accessed where everything is fetched once."""
    return op.elements_read + op.elements_written


def no_cache(op: Op) -> int:
    """Elements accessed where nothing is kept."""
    if isinstance(op, (Gemm, Conv)):
        biases = op.elements_written if op.bias else 0
        return 2 * op.macs + biases + op.elements_written
    if isinstance(op, Attention):
        products = 2 * (op.macs - op.codec_macs)
        scores = 4 * op.kept  # written, read and written by the softmax, read again
        return products + scores + 2 * op.codec_macs + op.params + op.elements_written
    if isinstance(op, Deform):
        per_output = (CORNERS + 3) * op.samples + 1  # three: two offsets and a weight
        return per_output * op.points * op.channels
    return unlimited_cache(op)


def with_cache(op: Op, cache: int) -> int:
    """Elements accessed with a cache of ``cache`` elements, between the two limits."""
    if isinstance(op, Conv):
        accesses = _tiled_convolution(op, cache)
    elif isinstance(op, Gemm):
        accesses = _tiled_product(op, cache)
    elif isinstance(op, Attention):
        accesses = _tiled_attention(op, cache)
    elif isinstance(op, Deform):
        accesses = _cached_sampling(op, cache)
    else:
        return unlimited_cache(op)
    most, least = no_cache(op), unlimited_cache(op)
    return most if accesses is None else min(most, max(least, accesses))


def _tiled_product(op: Gemm, cache: int) -> int | None:
    """[rows, inner] x [inner, cols] in tiles of results, the inner axis outermost: a tile
    is updated with a piece of a column and of a row at a time. None where none fits."""
    found = []
    for tile_rows in _tile_sizes(op.rows):
        tile_cols = min(op.cols, (cache - tile_rows) // (tile_rows + 1))
        if tile_cols >= 1:
            left = op.rows * op.inner * -(-op.cols // tile_cols)
            right = (op.inner + op.bias) * op.cols * -(-op.rows // tile_rows)
            found.append(left + right)
    return op.batch * (min(found) + op.rows * op.cols) if found else None


def _tiled_convolution(op: Conv, cache: int) -> int | None:
    """Tiles of pixels and output channels, for one group after the other; beside a tile of
    results the cache holds the inputs under it of one channel and a weight a channel."""
    outs, ins = op.out_channels // op.groups, op.in_channels // op.groups
    taps = op.kernel[0] * op.kernel[1]
    found = []
    for tile in _pixel_tiles(op.out_size):
        under = _inputs_under(op, tile)
        pixels = tile[0] * tile[1]
        channels = min(outs, (cache - under) // (pixels + 1))
        if channels < 1:
            continue
        tiles = math.prod(-(-size // t) for size, t in zip(op.out_size, tile, strict=True))
        inputs = tiles * under * ins * -(-outs // channels)
        found.append(inputs + tiles * (taps * ins + op.bias) * outs)
    return op.groups * min(found) + op.elements_written if found else None


def _inputs_under(op: Conv, tile: tuple[int, int]) -> int:
    """Inputs of one channel that a tile of outputs reads."""
    if op.transposed:
        sides = (
            min(size, -(-(t + k - 1) // s))
            for size, t, k, s in zip(op.in_size, tile, op.kernel, op.stride, strict=True)
        )
    else:
        sides = (
            min(size, (t - 1) * s + k)
            for size, t, k, s in zip(op.in_size, tile, op.kernel, op.stride, strict=True)
        )
    return math.prod(sides)


def _tiled_attention(op: Attention, cache: int) -> int | None:
    """A tile of queries with its running sums stays, keys and values stream past it
    (FlashAttention, arXiv 2205.14135), for each head and window."""
    row = op.key_dim + op.value_dim
    tile = (cache - row) // (row + 2)
    if tile < 1:
        return None
    streamed = -(-op.queries // tile) * op.keys * row
    kept_rows = op.queries * row
    return op.windows * op.heads * (streamed + kept_rows) + op.params


def _cached_sampling(op: Deform, cache: int) -> int | None:
    """Offsets and weights of a point once a group, where they fit; the corners once where
    a channel's map fits."""
    if cache < 3 * op.samples:
        return None
    if cache >= op.in_size[0] * op.in_size[1]:
        return unlimited_cache(op)
    corners = CORNERS * op.samples * op.points * op.channels
    return corners + 3 * op.points * op.samples * op.groups + op.elements_written


def _tile_sizes(size: int) -> Iterator[int]:
    """``size`` cut into 1, 2, 3, 4, 6, 8, 12, 16, ... parts, down to single elements."""
    parts = 1
    while parts < size:
        yield -(-size // parts)
        if parts > 1 and parts * 3 // 2 < size:
            yield -(-size // (parts * 3 // 2))
        parts *= 2
    yield 1


def _pixel_tiles(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Whole rows, several or one, then pieces of a row."""
    for rows in _tile_sizes(size[0]):
        yield rows, size[1]
    for columns in _tile_sizes(size[1]):
        yield 1, columns
    for rows in _tile_sizes(size[0]):
        yield rows, min(rows, size[1])
