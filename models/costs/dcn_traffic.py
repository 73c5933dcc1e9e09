"""What one sampling operator computes and moves, with threads as the kernels share them
out: the analysis of the DCNv4 paper (arXiv 2401.06197, section 3.3).

In DCNv3's kernel a thread makes one channel of one output point, so that every channel
reads the group's offsets and weights again; DCNv4's thread makes several channels of a
group with one reading. Elements, nothing kept in a cache between threads; the limit of a
cache without end is `sievit.models.costs.accesses.unlimited_cache`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...workload import Deform, Workload
from .accesses import CORNERS, unlimited_cache

DCNV4_CHANNELS = 8
"""Channels a thread of DCNv4's released forward kernel makes."""


def sampling_flops(op: Deform) -> int:
    """Operations of the sampling by the paper's count: one a value read."""
    return CORNERS * op.samples * op.points * op.channels


def thread_accesses(op: Deform, channels_per_thread: int = 1) -> int:
    """Elements read and written when each thread makes ``channels_per_thread`` channels.

    1 is DCNv3's kernel, `DCNV4_CHANNELS` DCNv4's. Raises ValueError where the threads do
    not share out a group's channels evenly.
    """
    group_channels = op.channels // op.groups
    if channels_per_thread < 1 or group_channels % channels_per_thread:
        raise ValueError(
            f"channels_per_thread must divide the {group_channels} channels of a group, "
            f"got {channels_per_thread}"
        )
    outputs = op.points * op.channels
    values = CORNERS * op.samples * outputs
    offsets_and_weights = 3 * op.samples * outputs // channels_per_thread
    return values + offsets_and_weights + outputs


@dataclass(frozen=True)
class SamplingTraffic:
    """One operator's computation and element accesses under each kernel's sharing of work.

    ``dcnv3`` and ``dcnv4`` keep nothing between threads; ``unlimited`` is the least that
    any kernel can move. ``dcnv4`` is None where eight channels do not divide a group.
    """

    name: str
    flops: int
    dcnv3: int
    dcnv4: int | None
    unlimited: int

    @property
    def saved(self) -> float | None:
        """Share of DCNv3's accesses that DCNv4's threads save."""
        return None if self.dcnv4 is None else 1 - self.dcnv4 / self.dcnv3

    @property
    def intensities(self) -> tuple[float, float]:
        """Operations an element accessed: DCNv3's threads, and with an unlimited cache."""
        return self.flops / self.dcnv3, self.flops / self.unlimited

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "saved": self.saved, "flops_an_element": list(self.intensities)}


def sampling_traffic(workload: Workload) -> tuple[SamplingTraffic, ...]:
    """Every sampling operator of a network, in order."""
    return tuple(
        SamplingTraffic(
            name=op.name,
            flops=sampling_flops(op),
            dcnv3=thread_accesses(op),
            dcnv4=None
            if op.channels // op.groups % DCNV4_CHANNELS
            else thread_accesses(op, DCNV4_CHANNELS),
            unlimited=unlimited_cache(op),
        )
        for op in workload.ops
        if isinstance(op, Deform)
    )
