"""Polarize a whole mask: every head split into a dense block and a sparse rest.

The rule for one head is `sievit.workload.masks.polarize_head`; ViTCoD, HPCA 2023, section IV-B.
"""

from __future__ import annotations

from ..workload import PUBLISHED_MIN_KEPT, AttentionMask, PolarizedMask, polarize_head

Polarized = tuple[tuple[PolarizedMask, ...], ...]


def polarize(mask: AttentionMask, min_kept: int | float = PUBLISHED_MIN_KEPT) -> Polarized:
    """Polarize each head of ``mask``: [layer][head].

    ``min_kept``: a key is global when MORE than this many queries keep it (strict, as
    published: 50 of 197); a float in (0, 1) is a share of the queries.
    """
    return tuple(tuple(polarize_head(head, min_kept) for head in layer) for layer in mask.keep)
