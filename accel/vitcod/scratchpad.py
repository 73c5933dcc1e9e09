"""How the buffers are cut for one attention call, and what is in them when it begins.

Q, K, V and the rest (latents, codec weights, bias) have a region each. With the schedule's
``scratchpad`` "fixed" these are the four buffers of the hardware; "shared" cuts their sum for
each call: what a pass needs, then a chunk more for K, Q and V in turn, as long as there is
room, so that later heads load beside the one in work, or stay from the projection on.

Sizes are bytes. Choice: a region has the ports of its buffer, wherever the cut is.
"""

from __future__ import annotations

from ..hardware import Hardware
from .mapping import Mapping
from .regions import Cut, Kept

STAGING_BYTES = 16 * 1024
"""Of the rest of a shared scratchpad that latents on their way to the decoder may take."""


def scratchpad_bytes(hardware: Hardware) -> int:
    """All four regions together."""
    return sum(Cut.fixed(hardware))


def least(mapping: Mapping) -> Cut:
    """What the regions must hold for one pass of ``mapping``."""
    (q, k, v), (queries, keys, values) = chunk_bytes(mapping), _least_chunks(mapping)
    return Cut(q * queries, k * keys, v * values, _least_rest(mapping))


def chunk_bytes(mapping: Mapping) -> tuple[int, int, int]:
    """Of Q, K and V."""
    op = mapping.op
    row = mapping.group * mapping.key_words * mapping.hardware.word_bytes
    queries = op.queries if mapping.whole_queries else mapping.query_tile
    value = mapping.value_words * mapping.hardware.word_bytes
    return queries * row, mapping.key_tile * row, mapping.key_tile * value


def _least_chunks(mapping: Mapping) -> tuple[int, int, int]:
    """Of Q, K and V: all tokens, or two tiles, so that the next one loads beside the one in
    work (a buffer of one token holds that)."""
    queries = mapping.whole_queries or mapping.query_tile in (1, mapping.op.queries)
    keys = 1 if mapping.key_tile in (1, mapping.op.keys) else 2
    return (1 if queries else 2), keys, keys


def block_bytes(mapping: Mapping) -> int:
    """Of the latents of a codec block, where they are resident."""
    return mapping.least_latent_bytes - mapping.codec_bytes


def _least_rest(mapping: Mapping) -> int:
    return mapping.least_latent_bytes + mapping.pass_bias_bytes


def cut_for(mapping: Mapping) -> Cut | None:
    """The cut of a shared scratchpad for ``mapping``; None where it does not fit."""
    need, chunks = list(least(mapping)), chunk_bytes(mapping)
    spare = scratchpad_bytes(mapping.hardware) - sum(need)
    if spare < 0:
        return None
    if mapping.op.codec and not mapping.resident_latents:
        tokens = mapping.op.queries + mapping.op.keys
        more = min(STAGING_BYTES, tokens * mapping.token_bytes, spare)
        need[3], spare = need[3] + more, spare - more
    all_bias = mapping.bias_bytes - mapping.pass_bias_bytes
    if all_bias <= spare:
        need[3], spare = need[3] + all_bias, spare - all_bias
    chunks, counts = [*chunks, block_bytes(mapping)], [*_least_chunks(mapping), 1]
    blocks = mapping.op.codec.groups if mapping.resident_latents and mapping.op.codec else 1
    useful = [count * (1 + mapping.repeated) for count in (*chunk_counts(mapping), blocks)]
    grown = True
    while grown:
        grown = False
        for side in (1, 0, 3, 2):  # K, Q, latents, V: as the next head asks for them
            if counts[side] < useful[side] and chunks[side] <= spare:
                counts[side] += 1
                need[side] += chunks[side]
                spare -= chunks[side]
                grown = True
    return Cut(*need)


def chunk_counts(mapping: Mapping) -> tuple[int, int, int]:
    """Chunks of Q, K and V that one instance (window of an image) loads, each once."""
    groups = mapping.op.heads // mapping.group
    queries = 1 if mapping.whole_queries else len(mapping.query_tiles)
    keys = len(mapping.key_tiles)
    return groups * queries, groups * keys, mapping.op.heads * keys


def kept_chunks(mapping: Mapping, instances: int, limit_bytes: int) -> Kept:
    """What of Q, K and V stays on chip after the projection: the latents of the first codec
    blocks, where they are resident; then of the first heads K, Q and V in turn, as far as their
    regions and ``limit_bytes`` hold them.

    Nothing of what is loaded again later, and no Q and K that pass the decoder.
    """
    sizes, left, latents = chunk_bytes(mapping), limit_bytes, 0
    if mapping.resident_latents and mapping.op.codec:
        block, blocks = block_bytes(mapping), mapping.op.codec.groups * instances
        latents = min(blocks, mapping.latent_space_bytes // block, left // block)
        left -= latents * block
    room = [region // size for region, size in zip(mapping.cut, sizes, strict=False)]
    most = [min(a, instances * b) for a, b in zip(room, chunk_counts(mapping), strict=True)]
    again = loaded_again(mapping)
    for side in range(3):
        if again[side] or (side < 2 and mapping.op.codec):
            most[side] = 0
    counts, grown = [0, 0, 0], True
    while grown:
        grown = False
        for side in (1, 0, 2):
            if counts[side] < most[side] and sizes[side] <= left:
                counts[side] += 1
                left -= sizes[side]
                grown = True
    return Kept(counts[0], counts[1], counts[2], latents)


def loaded_again(mapping: Mapping) -> tuple[bool, bool, bool]:
    """Whether chunks of Q, K and V leave their buffer and come again later."""
    tiles = len(mapping.query_tiles) > 1
    in_tiles = tiles and len(mapping.key_tiles) > 1
    by_rows = tiles and mapping.group > 1 and not mapping.whole_queries
    queries = mapping.fetched_again and len(mapping.key_tiles) > 1
    return queries, in_tiles, in_tiles or by_rows
