"""What the compiled engine runs: one attention call as plain arrays.

The stages of the MAC lines (SDDMM or SpMM of one head, query tile and key tile), the pieces of
each line, and the transfers between DRAM and the buffers with what each waits for and frees.
`build` in `builder` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Q, K, V, INDEX, CODEC, STORE, LATENT = range(7)
CHANNELS = 7
"""DMA channels: each serves its transfers in order; the DRAM serves the channels. Where
latents are resident they come by a channel of their own, and those of Q and K are served by
the decoder."""

STAGE = np.dtype(
    [
        (name, np.int64)
        for name in (
            "kind",
            "plan",  # the assignment it runs
            "unit",  # (instance, head, rows) it belongs to
            "opens_unit",  # the first of its unit
            "words",  # of an operand
            # Tokens count through the whole DMA channel. A buffer holds a chunk head after
            # head: vector v begins at word (vector_place + v) * words, operands likewise.
            "vector_token",
            "operand_token",
            "vector_place",
            "operand_place",
            "index_bytes",  # of the index channel, that lie before its index stream
            "index_frees",  # bytes of the index buffer that are free after it
            "index_stays",  # what it reads of its stream stays, for the next window or image
            "stores",  # stores that must be done before it
            "reconfigure",  # cycles
        )
    ]
)

TRANSFER = np.dtype(
    [
        (name, np.int64)
        for name in (
            "bytes",  # of DRAM; none for what is on chip from the beginning
            "tokens",
            "room",  # bytes that a chunk of Q, K or V takes in its buffer
            "need",  # first stage that uses it: the DRAM serves the earliest need
            "after",  # stages that must be done before it starts
            "release",  # stages that must be done before its room is free
            "token",  # tokens (bytes) of its channel before it
            "token_bytes",
            "source",  # first latent token that it is decoded from; -1: the DRAM brings it
            "order",  # of `Program.orders`, where the latent of its first token stands
        )
    ]
)


class Program(NamedTuple):
    """Arrays of int64 fields. Pieces and entries are numbered through all plans.

    A *plan* is one assignment; stages of equal heads in several windows share it.
    """

    line_piece: np.ndarray  # (plans, lines + 1)
    line_entry: np.ndarray  # (plans, lines + 1)
    pieces: np.ndarray  # PIECE
    entries: np.ndarray  # ENTRY
    stages: np.ndarray  # STAGE, in the order of execution
    unit_row: np.ndarray  # (units + 1) first of the unit's rows in row_scores
    row_scores: np.ndarray  # scores of each row, all key tiles
    row_lists: np.ndarray  # where the list of each row begins among its unit's
    list_entries: int  # of the largest unit
    orders: np.ndarray  # original token at each place, a head's queries or keys after another
    channel_first: np.ndarray  # (8) first transfer of each channel
    transfers: np.ndarray  # TRANSFER, channel after channel
    channel_burst: np.ndarray  # (8) first burst of each channel; zeros in the flat model
    bursts: np.ndarray  # BURST, transfer after transfer; none in the flat model

    def dram_bytes(self, channel: int) -> int:
        """All bytes that a channel moves."""
        first, last = self.channel_first[channel : channel + 2]
        return int(self.transfers["bytes"][first:last].sum())

    def tokens(self, channel: int) -> int:
        """All tokens that a channel moves, those loaded again counted again."""
        first, last = self.channel_first[channel : channel + 2]
        if first == last:
            return 0
        final = self.transfers[last - 1]
        return int(final["token"] + final["tokens"])


@dataclass(frozen=True)
class Counts:
    """Of all stages of a program, for the traffic table: nothing here depends on time."""

    pieces: int  # of SpMM: partial output rows that drain
    output_rows: int  # rows with at least one piece, summed over units
    scores: int  # computed
    entries: int  # of index streams
    index_bytes: int  # that stages read from IdxBuf
    stream_bits: int  # of those entries
    listed: int  # keys that SDDMM writes into lists
