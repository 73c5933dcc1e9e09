"""Polarize a whole mask: every head split into a dense block and a sparse rest.

The rule for one head is `sievit.workload.masks.polarize_head`; ViTCoD, HPCA 2023, section IV-B.
"""

from __future__ import annotations

from ..moved import old_arguments
from ..workload import AttentionMask, GlobalThreshold, PolarizedMask, polarize_head

Polarized = tuple[tuple[PolarizedMask, ...], ...]


@old_arguments("min_kept")
def polarize(mask: AttentionMask, global_threshold: GlobalThreshold | None = None) -> Polarized:
    """Polarize each head of ``mask``: [layer][head].

    ``global_threshold``: a key is global when MORE than this many queries keep it (strict, as
    published: 50 of 197); a float in (0, 1) is a share of the queries, "all": the keys that
    every query keeps. None is the mask's own.
    """
    cut = mask.global_threshold if global_threshold is None else global_threshold
    return tuple(tuple(polarize_head(head, cut) for head in layer) for layer in mask.keep)
