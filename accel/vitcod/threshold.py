"""Which keys of a head the denser engine takes: the masks of a call, polarized by its schedule.

A key is worth the denser engine where enough queries keep it: about as many as the share of
its time in which a line of the sparser engine works, rather than waits for a bank. That share
depends on the banks and on the mask, so `best` steps each head alone, with all of it on chip,
by each of `TRIED`, and takes the fastest; the call as a whole then takes what is fastest, each
head's own, half of the queries for all heads, or no global keys at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ...workload import Attention, GlobalThreshold, PolarizedMask, polarize_head
from ..cache import LruCache
from ..hardware import Hardware
from ..schedule import Schedule
from .run import run_attention

TRIED: tuple[GlobalThreshold, ...] = ("none", 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Fewest global keys first, which equals go to."""

POLARIZED = LruCache(256 * 1024**2)
"""By the mask and the threshold."""

CHOSEN = LruCache(2**20)
"""Threshold of a head, by its mask, the hardware and the schedule."""


def with_thresholds(
    op: Attention, hardware: Hardware, schedule: Schedule, on_chip_bytes: int = 0
) -> Attention:
    """``op`` with its masks polarized by ``schedule.global_threshold``; None leaves them.

    ``on_chip_bytes`` of Q, K and V may be on chip when the call begins, as for `run_attention`.
    """
    threshold = schedule.global_threshold
    if op.masks is None or threshold is None:
        return op
    if threshold != "best":
        return _polarized(op, (threshold,) * op.heads)
    own = _polarized(op, [_best(op, mask, hardware, schedule) for mask in op.masks])
    alike = [_polarized(op, (threshold,) * op.heads) for threshold in ("none", 0.5)]
    plain = replace(schedule, global_threshold=None)

    def cycles(tried: Attention) -> int:
        return run_attention(tried, hardware, 1, plain, on_chip_bytes).cycles

    return min((*alike, own), key=cycles)


def _polarized(op: Attention, thresholds: Sequence[GlobalThreshold]) -> Attention:
    masks = zip(op.masks or (), thresholds, strict=True)
    return replace(op, masks=tuple(repolarized(mask, threshold) for mask, threshold in masks))


def repolarized(mask: PolarizedMask, threshold: GlobalThreshold) -> PolarizedMask:
    """The same kept entries under another threshold, made once for equal ones."""

    def make() -> PolarizedMask:
        made = polarize_head(mask.dense(), threshold)
        same = made == mask and made.global_threshold == mask.global_threshold
        return mask if same else made

    return POLARIZED.get((mask.digest, threshold), make, _held_bytes)


def _held_bytes(mask: PolarizedMask) -> int:
    return mask.indices.nbytes + mask.indptr.nbytes + mask.global_keep.nbytes


def _best(
    op: Attention, mask: PolarizedMask, hardware: Hardware, schedule: Schedule
) -> GlobalThreshold:
    """The threshold under which the head alone takes the fewest cycles."""
    key = (mask.digest, op.key_dim, op.value_dim, hardware, replace(schedule, mapping=None))
    return CHOSEN.get(key, partial(_fastest, op, mask, hardware, schedule), lambda made: 64)


def _fastest(
    op: Attention, mask: PolarizedMask, hardware: Hardware, schedule: Schedule
) -> GlobalThreshold:
    alone = replace(op, heads=1, windows=1, codec=None, masks=(mask,), bias_params=0)
    plain = replace(schedule, global_threshold=None, mapping=None)
    space = sum((hardware.q_buffer_bytes, hardware.k_buffer_bytes, hardware.v_buffer_bytes))

    def cycles(threshold: GlobalThreshold) -> int:
        tried = _polarized(alone, (threshold,))
        return run_attention(tried, hardware, 1, plain, space).cycles

    return min(TRIED, key=cycles)
