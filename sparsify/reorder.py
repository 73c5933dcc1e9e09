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

    ``global_threshold``: a key is global when MORE than this share of the queries keeps it, a
    float in (0, 1); an int is a count of queries (ViTCoD: 50 of 197), "all": the keys that
    every query keeps, "none": no key. None is the mask's own, which is 0.5 unless it says
    another.
    """
    cut = mask.global_threshold if global_threshold is None else global_threshold
    return tuple(tuple(polarize_head(head, cut) for head in layer) for layer in mask.keep)
