"""The regions of the scratchpad in one attention call, and what is in them when it begins.

A *chunk* is what one DMA transfer brings: the tokens of a group of heads, or a tile of them.
"""

from __future__ import annotations

from typing import NamedTuple

from ..hardware import Hardware


class Cut(NamedTuple):
    """Bytes of each region."""

    q: int
    k: int
    v: int
    rest: int

    @classmethod
    def fixed(cls, hardware: Hardware) -> Cut:
        """The hardware's four buffers."""
        return cls(
            hardware.q_buffer_bytes,
            hardware.k_buffer_bytes,
            hardware.v_buffer_bytes,
            hardware.other_buffer_bytes,
        )


class Kept(NamedTuple):
    """Chunks, the first of their channels, that are on chip when the call begins; a chunk of
    latents is K's and Q's of a codec block."""

    q: int = 0
    k: int = 0
    v: int = 0
    latents: int = 0


NOTHING = Kept()
