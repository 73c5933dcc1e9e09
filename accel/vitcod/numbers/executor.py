"""A program of the cycle engine (`program`), carried out on numbers.

Chunks of tokens are loaded and freed, or are there from the beginning; latents pass the decoder
as they are loaded, or stay and are decoded head by head; each line takes the pieces that were
assigned to it, the denser block is computed whole and masked by its bitmap, SDDMM writes the
keys of its scores into the lists of their rows and SpMM finds them there, a row goes through
softmax when its last score is written, the partial rows of cut pieces and of the two engines
are added, heads and tiles in pass order. A read of what is not in its buffer, more in a buffer
than it holds, an entry computed twice, or a value weighed before its row is through softmax is
a RuntimeError.

Choice: lists hold keys in the order in which the lines, one after the other, come to them;
sums of integers are the same in any order. The tokens of heads that are decoded in one pass lie
in the buffers in their original order; each head of the pass knows where its own are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...arithmetic import HeadMap
from ...integer_attention import ScoreRules, integer_softmax
from ..assign import DENSE_ROUND
from ..mapping import Mapping
from ..pattern import SDDMM
from ..program import LATENT, K, Program, Q, V


class _Chunk:
    """Tokens of Q, K, V or latents in a buffer: ``data`` [heads, tokens, dim] from channel token
    ``first`` on, which take ``room`` bytes and are free when ``release`` stages are done."""

    def __init__(self, transfer: np.void, data: np.ndarray) -> None:
        self.first, self.release = int(transfer["token"]), int(transfer["release"])
        self.room, self.data = int(transfer["room"]), data


class _Unit:
    """One head's tile of queries in work: what the score and output buffers hold of it."""

    def __init__(
        self, left: np.ndarray, lists: np.ndarray, entries: int, keys: int, value_dim: int
    ) -> None:
        self.left = left.copy()  # scores of each row that are missing
        self.list_end = lists.copy()  # where the next key of each row's list goes
        self.listed = np.full(entries, -1, dtype=np.int64)
        self.scores = np.zeros((len(left), keys), dtype=np.int64)
        self.written = np.zeros((len(left), keys), dtype=bool)
        self.probabilities = np.zeros((len(left), keys), dtype=np.int64)
        self.ready = np.zeros(len(left), dtype=bool)
        self.sums = np.zeros((len(left), value_dim), dtype=np.int64)


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
        self.chunks: dict[int, list[_Chunk]] = {Q: [], K: [], V: [], LATENT: []}
        cut = mapping.cut
        self.sizes = {Q: cut.q, K: cut.k, V: cut.v, LATENT: mapping.latent_space_bytes}
        self.keys, self.last_tile = self._key_tiles()
        self.output = np.zeros(
            (len(memory[V]), self.op.heads, self.op.queries, self.op.value_dim), dtype=np.int64
        )

    def _key_tiles(self) -> tuple[list[slice], list[bool]]:
        """The keys of each stage, and whether they are the last of its unit."""
        begun: dict[tuple[int, int], int] = {}
        found, last = [], []
        for stage in self.program.stages:
            product = int(stage["unit"]), int(stage["kind"])
            _, head, rows = self.places[product[0]]
            tiles, number = self.mapping.tiles_of(head, rows), begun.get(product, 0)
            found.append(tiles[number])
            last.append(number == len(tiles) - 1)
            begun[product] = number + 1
        return found, last

    def _names(self, unit: int) -> np.ndarray:
        """The head's key at each place that the tiles of the stage's unit count by."""
        _, head, rows = self.places[unit]
        keys = self.mapping.work_of(head, rows).keys
        return np.arange(self.op.keys) if keys is None else keys

    def all_stages(self) -> np.ndarray:
        """int64 [images, heads, queries, value_dim], original token order."""
        for channel in self.chunks:
            for transfer in self._transfers(channel)[: self._kept(channel)]:
                self._load(channel, transfer)
        for number, stage in enumerate(self.program.stages):
            for held in self.chunks.values():
                held[:] = [chunk for chunk in held if chunk.release > number]
            for channel in (LATENT, Q, K) if stage["kind"] == SDDMM else (V,):
                coming = self._transfers(channel)[self._kept(channel) :]
                for transfer in coming[coming["need"] == number]:
                    self._load(channel, transfer)
            unit, keys = self._unit(stage), self.keys[number]
            if stage["kind"] == SDDMM:
                self._scores(stage, unit, keys)
            else:
                self._values(stage, unit, keys)
                if self.last_tile[number]:
                    self._store(int(stage["unit"]))
        return self.output

    def _transfers(self, channel: int) -> np.ndarray:
        first, last = self.program.channel_first[channel : channel + 2]
        return self.program.transfers[first:last]

    def _kept(self, channel: int) -> int:
        """Chunks that are on chip from the beginning."""
        kept = self.mapping.kept
        return {Q: kept.q, K: kept.k, V: kept.v, LATENT: kept.latents}[channel]

    def _unit(self, stage: np.void) -> _Unit:
        number = int(stage["unit"])
        if stage["opens_unit"]:
            first, last = self.program.unit_row[number : number + 2]
            left, lists = self.program.row_scores[first:last], self.program.row_lists[first:last]
            self.units[number] = _Unit(
                left, lists, self.program.list_entries, self.op.keys, self.op.value_dim
            )
        return self.units[number]

    def _order(self, head: int, channel: int) -> np.ndarray:
        """Original token at each place of this head's order."""
        if self.op.masks is None:
            return np.arange(self.op.queries if channel == Q else self.op.keys)
        mask = self.op.masks[head]
        return mask.query_order if channel == Q else mask.key_order

    def _load(self, channel: int, transfer: np.void) -> None:
        """A chunk comes from DRAM or from the decoder, or the projection has left it."""
        stage = self.program.stages[transfer["need"]]
        image, head, rows = self.places[int(stage["unit"])]
        tokens = self._names(int(stage["unit"]))[self.keys[int(transfer["need"])]]
        if channel == Q:
            queries = np.arange(self.op.queries)
            tokens = queries if self.mapping.whole_queries else queries[rows]
        if channel == LATENT:
            data = self._latents(image, head)
        elif channel == V:
            data = self.memory[V][image][head : head + 1, self._order(head, V)[tokens]]
        elif transfer["source"] >= 0:
            data = self._decoded(channel, image, head, int(transfer["source"]), tokens)
        else:
            data = self._pass(channel, image, head, tokens)
        held = self.chunks[channel]
        held.append(_Chunk(transfer, data))
        if sum(chunk.room for chunk in held) > self.sizes[channel]:
            raise RuntimeError(f"{self.op.name}: channel {channel} needs more than its region has")

    def _latents(self, image: int, head: int) -> np.ndarray:
        """Latents [latent heads of the block, keys then queries, dim] of the head's block."""
        block = self._block(head)
        sides = [self.memory[side][image][block] for side in (K, Q)]
        return np.concatenate(sides, axis=1)

    def _block(self, head: int) -> slice:
        """Latent heads of the codec block of ``head``."""
        count, groups = self.mapping.latent_heads, self.op.codec.groups if self.op.codec else 1
        first = head * groups // self.op.heads * count
        return slice(first, first + count)

    def _decoded(
        self, channel: int, image: int, head: int, source: int, tokens: np.ndarray
    ) -> np.ndarray:
        """[1, tokens, dim] of the head, from latents on chip: those of the side begin with
        ``source``."""
        decoder, block = self.decoders[channel], self._block(head)
        assert decoder is not None
        order = self._order(head, channel)[tokens]
        shape = self.memory[channel][image].shape
        latents = np.zeros((shape[0], len(order), shape[2]), dtype=np.int64)
        for place, token in enumerate(order):
            chunk, inside = self._resident(LATENT, source + int(token))
            latents[block, place] = chunk.data[:, inside]
        return decoder(latents, slice(head, head + 1))

    def _pass(self, channel: int, image: int, head: int, tokens: np.ndarray) -> np.ndarray:
        """[heads of a pass, tokens, dim] of Q or K, decoded where they come as latents."""
        group = self.mapping.group
        heads = slice(head // group * group, head // group * group + group)
        order = np.arange(tokens[-1] + 1) if group > 1 else self._order(head, channel)
        stored, decoder = self.memory[channel][image][:, order[tokens]], self.decoders[channel]
        return stored[heads] if decoder is None else decoder(stored, heads)

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

    def _pieces(self, stage: np.void, unit: _Unit) -> Iterator[tuple[int, np.ndarray, bool]]:
        """(vector, operands, whether of the sparser engine) of each piece, line after line."""
        program, plan = self.program, int(stage["plan"])
        first, last = program.line_piece[plan, [0, -1]]
        for piece in program.pieces[first:last]:
            sparser = bool(piece["round"] != DENSE_ROUND)
            operands = np.arange(piece["length"])
            if sparser and stage["kind"] != SDDMM and self.mapping.one_stream:
                operands = unit.listed[piece["place"] + operands]
            elif sparser:
                operands = program.entries["operand"][piece["first"] + operands]
            else:
                operands += piece["first"]
            yield int(piece["vector"]), operands, sparser

    def _scores(self, stage: np.void, unit: _Unit, keys: slice) -> None:
        """SDDMM: a line holds a key, queries stream past it."""
        _, head, rows = self.places[int(stage["unit"])]
        q = self._tile(Q, stage, int(stage["operand_token"]), rows)
        k = self._tile(K, stage, int(stage["vector_token"]), keys)
        names = self._names(int(stage["unit"]))
        for vector, operands, sparser in self._pieces(stage, unit):
            key = int(names[keys.start + vector])
            if unit.written[operands, key].any():
                raise RuntimeError(f"{self.op.name}: a score of head {head} is made twice")
            score = self.rules.score(q[operands] @ k[vector], head)
            if self.bias is not None:
                score = self._biased(score, self.bias[head], head, rows.start + operands, key)
            unit.scores[operands, key] = score
            unit.written[operands, key] = True
            unit.left[operands] -= 1
            if sparser and self.mapping.one_stream:
                unit.listed[unit.list_end[operands]] = vector
                unit.list_end[operands] += 1
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
        names = self._names(int(stage["unit"]))
        for vector, operands, _ in self._pieces(stage, unit):
            if not unit.ready[vector]:
                raise RuntimeError(f"{self.op.name}: a row is weighed before its softmax")
            if (operands < 0).any():
                raise RuntimeError(f"{self.op.name}: a list is read beyond its keys")
            weights = unit.probabilities[vector, names[keys.start + operands]]
            unit.sums[vector] += weights @ v[operands]

    def _store(self, number: int) -> None:
        image, head, rows = self.places[number]
        made = self.rules.result(self.units.pop(number).sums, head)
        self.output[image, head, self._order(head, Q)[rows]] = made
