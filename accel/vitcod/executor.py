"""A program of the cycle engine (`program`), carried out on numbers.

Chunks of tokens are loaded and freed, latents pass the decoder, each line takes the pieces
that were assigned to it, the denser block is computed whole and masked by its bitmap, a row
goes through softmax when its last score is written, the partial rows of cut pieces and of
the two engines are added, heads and tiles in pass order. A read of what is not in its buffer,
an entry computed twice, or a value weighed before its row is through softmax is a
RuntimeError.

Choice: the tokens of heads that are decoded in one pass lie in the buffers in their original
order; each head of the pass knows where its own are.
"""

from __future__ import annotations

import numpy as np

from ..arithmetic import HeadMap
from ..integer_attention import ScoreRules, integer_softmax
from .assign import DENSE_ROUND
from .mapping import Mapping
from .program import SDDMM, K, Program, Q, V


class _Chunk:
    """Tokens of Q, K or V in a buffer: ``data`` [heads, tokens, dim] from channel token
    ``first`` on, free when ``release`` stages are done."""

    def __init__(self, first: int, release: int, data: np.ndarray) -> None:
        self.first, self.release, self.data = first, release, data


class _Unit:
    """One head's tile of queries in work: what the score and output buffers hold of it."""

    def __init__(self, left: np.ndarray, keys: int, value_dim: int) -> None:
        self.left = left.copy()  # scores of each row that are missing
        self.scores = np.zeros((len(left), keys), dtype=np.int64)
        self.written = np.zeros((len(left), keys), dtype=bool)
        self.probabilities = np.zeros((len(left), keys), dtype=np.int64)
        self.ready = np.zeros(len(left), dtype=bool)
        self.sums = np.zeros((len(left), value_dim), dtype=np.int64)
        self.tiles = [0, 0]  # key tiles begun, by kind of stage


class ProgramExecutor:
    """One program carried out on data."""

    def __init__(
        self,
        mapping: Mapping,
        program: Program,
        memory: tuple[np.ndarray, np.ndarray, np.ndarray],
        decoders: tuple[HeadMap | None, HeadMap | None],
        rules: ScoreRules,
        bias: np.ndarray | None,
    ) -> None:
        self.mapping, self.program, self.op = mapping, program, mapping.op
        self.memory, self.decoders, self.rules, self.bias = memory, decoders, rules, bias
        self.places = list(mapping.units(len(memory[V])))
        self.units: dict[int, _Unit] = {}
        self.chunks: dict[int, list[_Chunk]] = {Q: [], K: [], V: []}
        self.output = np.zeros(
            (len(memory[V]), self.op.heads, self.op.queries, self.op.value_dim), dtype=np.int64
        )

    def all_stages(self) -> np.ndarray:
        """int64 [images, heads, queries, value_dim], original token order."""
        for number, stage in enumerate(self.program.stages):
            for held in self.chunks.values():
                held[:] = [chunk for chunk in held if chunk.release > number]
            unit = self._unit(stage)
            kind = int(stage["kind"])
            keys = self.mapping.key_tiles[unit.tiles[kind]]
            unit.tiles[kind] += 1
            for channel in (Q, K) if kind == SDDMM else (V,):
                self._load(number, stage, channel, keys)
            if kind == SDDMM:
                self._scores(stage, unit, keys)
            else:
                self._values(stage, unit, keys)
                if unit.tiles[kind] == len(self.mapping.key_tiles):
                    self._store(int(stage["unit"]))
        return self.output

    def _unit(self, stage: np.void) -> _Unit:
        number = int(stage["unit"])
        if stage["opens_unit"]:
            first, last = self.program.unit_row[number : number + 2]
            left = self.program.row_scores[first:last]
            self.units[number] = _Unit(left, self.op.keys, self.op.value_dim)
        return self.units[number]

    def _order(self, head: int, channel: int) -> np.ndarray:
        """Original token at each place of this head's order."""
        if self.op.masks is None:
            return np.arange(self.op.queries if channel == Q else self.op.keys)
        mask = self.op.masks[head]
        return mask.query_order if channel == Q else mask.key_order

    def _load(self, number: int, stage: np.void, channel: int, keys: slice) -> None:
        """The chunk that the DMA brings for this stage, if it brings one."""
        first, last = self.program.channel_first[channel : channel + 2]
        mine = self.program.transfers[first:last]
        for transfer in mine[mine["need"] == number]:
            image, head, rows = self.places[int(stage["unit"])]
            queries = slice(0, self.op.queries) if self.mapping.whole_queries else rows
            tokens = queries if channel == Q else keys
            lead = head // self.mapping.group * self.mapping.group
            shared = channel != V
            together = shared and self.mapping.group > 1
            order = np.arange(tokens.stop) if together else self._order(head, channel)
            stored = self.memory[channel][image][:, order[tokens]]
            heads = slice(lead, lead + self.mapping.group) if shared else slice(head, head + 1)
            decoder = self.decoders[channel] if shared else None
            data = stored[heads] if decoder is None else decoder(stored, heads)
            chunk = _Chunk(int(transfer["token"]), int(transfer["release"]), data)
            self.chunks[channel].append(chunk)

    def _resident(self, channel: int, token: int) -> tuple[_Chunk, int]:
        """The chunk that holds a channel's token, and the token's place in it."""
        for chunk in self.chunks[channel]:
            if 0 <= token - chunk.first < chunk.data.shape[1]:
                return chunk, token - chunk.first
        raise RuntimeError(f"{self.op.name}: token {token} of channel {channel} is not on chip")

    def _tile(self, channel: int, stage: np.void, token: int, tile: slice) -> np.ndarray:
        """[tokens, dim] of the stage's head, in the head's own order, ``tile`` of it."""
        chunk, place = self._resident(channel, token)
        if channel == V or self.mapping.group == 1:
            return chunk.data[0, place : place + tile.stop - tile.start]
        head = self.places[int(stage["unit"])][1]
        wanted, first = self._order(head, channel)[tile], tile.start - place
        if wanted.min() < first or wanted.max() >= first + chunk.data.shape[1]:
            raise RuntimeError(f"{self.op.name}: heads of one pass need different tokens")
        return chunk.data[head % self.mapping.group, wanted - first]

    def _pieces(self, stage: np.void):
        """(vector, operands) of each piece, line after line."""
        program, plan = self.program, int(stage["plan"])
        first, last = program.line_piece[plan, [0, -1]]
        for piece in program.pieces[first:last]:
            operands = np.arange(piece["first"], piece["first"] + piece["length"])
            if piece["round"] != DENSE_ROUND:
                operands = program.entries["operand"][operands]
            yield int(piece["vector"]), operands

    def _scores(self, stage: np.void, unit: _Unit, keys: slice) -> None:
        """SDDMM: a line holds a key, queries stream past it."""
        _, head, rows = self.places[int(stage["unit"])]
        q = self._tile(Q, stage, int(stage["operand_token"]), rows)
        k = self._tile(K, stage, int(stage["vector_token"]), keys)
        for vector, operands in self._pieces(stage):
            key = keys.start + vector
            if unit.written[operands, key].any():
                raise RuntimeError(f"{self.op.name}: a score of head {head} is made twice")
            score = self.rules.score(q[operands] @ k[vector], head)
            if self.bias is not None:
                score = self._biased(score, self.bias[head], head, rows.start + operands, key)
            unit.scores[operands, key] = score
            unit.written[operands, key] = True
            unit.left[operands] -= 1
        done = np.flatnonzero((unit.left == 0) & ~unit.ready)
        self._softmax(unit, head, rows, done)

    def _biased(
        self, score: np.ndarray, bias: np.ndarray, head: int, rows: np.ndarray, key: int
    ) -> np.ndarray:
        queries, keys = self._order(head, Q), self._order(head, K)
        added = score + bias[queries[rows], keys[key]]
        return np.clip(added, *self.rules.arithmetic.score_limits)

    def _softmax(self, unit: _Unit, head: int, rows: slice, done: np.ndarray) -> None:
        """Rows whose last score is written: pruned entries of the dense block leave."""
        keep = unit.written[done]
        if self.op.masks is not None:
            mask = self.op.masks[head]
            keep[:, : mask.num_global] &= mask.global_keep[rows][done]
        rules = self.rules
        shift = rules.score_shift[head]
        made = integer_softmax(unit.scores[done], keep, rules.arithmetic, shift)
        unit.probabilities[done] = made
        unit.ready[done] = True

    def _values(self, stage: np.void, unit: _Unit, keys: slice) -> None:
        """SpMM: a line holds an output row, which is added to the output buffer."""
        v = self._tile(V, stage, int(stage["operand_token"]), keys)
        for vector, operands in self._pieces(stage):
            if not unit.ready[vector]:
                raise RuntimeError(f"{self.op.name}: a row is weighed before its softmax")
            weights = unit.probabilities[vector, keys.start + operands]
            unit.sums[vector] += weights @ v[operands]

    def _store(self, number: int) -> None:
        image, head, rows = self.places[number]
        made = self.rules.result(self.units.pop(number).sums, head)
        self.output[image, head, self._order(head, Q)[rows]] = made
