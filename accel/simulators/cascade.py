"""Cascade token pruning (SpAtten, HPCA 2021, section III): which tokens each layer works on, and
what of the network around attention they leave.

A pruned token is gone from every layer behind. How many stay is set by the masks: as many entries
in all as they keep, never rising. Which stay is decided by importance, as in SpAtten: the sums,
over all heads and layers so far, of what queries give a key; here entries kept by the masks
stand for probabilities. Where a layer has another number of keys than the one before (a pooling
network), importance starts anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ...workload import Attention, Elementwise, Gemm, Op
from .overlap import kept_by_key, kept_by_row


@dataclass(frozen=True)
class Tokens:
    """Heads, queries and keys that a layer works on."""

    heads: int
    queries: int
    keys: int


@dataclass(frozen=True, eq=False)
class Pruning:
    """Of one layer: tokens that enter it, those that it keeps, and their places among the ones
    that entered, int64 [queries kept] and [keys kept], ascending."""

    before: Tokens
    now: Tokens
    queries: np.ndarray
    keys: np.ndarray

    @property
    def prunes(self) -> bool:
        return self.now != self.before


def cascade(calls: Sequence[Attention]) -> list[float]:
    """Share of entries kept in each layer: never rising, and as many entries in all as the
    masks keep. It is the least-squares fit of the layers' densities under that order (pool
    adjacent violators, weighted by entries)."""
    pools: list[list[float]] = []  # kept entries, entries, layers
    for op in calls:
        pools.append([op.kept, op.entries, 1])
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] < pools[-1][0] * pools[-2][1]:
            kept, entries, layers = pools.pop()
            pools[-1] = [pools[-1][0] + kept, pools[-1][1] + entries, pools[-1][2] + layers]
    return [kept / entries for kept, entries, layers in pools for _ in range(int(layers))]


def alive(op: Attention, share: float, heads: int) -> Tokens:
    """Queries and keys, each pruned by the square root of what ``heads`` leave to do."""
    kept = math.sqrt(min(1.0, share * op.heads / heads))
    return Tokens(heads, max(round(op.queries * kept), 1), max(round(op.keys * kept), 1))


def prunings(calls: Sequence[Attention], head_share: float) -> list[Pruning]:
    """Of each layer."""
    made: list[Pruning] = []
    score, there = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for op, (entering, share) in zip(calls, pairwise([1.0, *cascade(calls)]), strict=True):
        heads = max(round(op.heads * head_share), 1)
        before, now = alive(op, entering, heads), alive(op, share, heads)
        if op.keys != len(score):
            score, there = np.zeros(op.keys, dtype=np.int64), np.arange(op.keys)
        score = score + _importance(op)
        there = _top(there, score, before.keys)
        kept = _top(there, score, now.keys)
        keys = np.searchsorted(there, kept)
        made.append(Pruning(before, now, _queries(op, before, now, keys), keys))
        there = kept
    return made


def _importance(op: Attention) -> np.ndarray:
    """Entries kept of each key in all heads, int64 [keys]."""
    if op.masks is None:
        return np.full(op.keys, op.heads * op.queries, dtype=np.int64)
    return sum((kept_by_key(mask) for mask in op.masks), np.zeros(op.keys, dtype=np.int64))


def _queries(op: Attention, before: Tokens, now: Tokens, keys: np.ndarray) -> np.ndarray:
    """Places of the queries kept: the tokens of the keys, or, where queries are other tokens, the
    ones that the masks keep most for."""
    if op.queries == op.keys:
        return keys
    score = np.zeros(op.queries, dtype=np.int64)
    for mask in op.masks or ():
        score += kept_by_row(mask)
    there = _top(np.arange(op.queries), score, before.queries)
    return np.searchsorted(there, _top(there, score, now.queries))


def _top(tokens: np.ndarray, score: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` of ``tokens`` with the highest score (of equal ones the first), ascending."""
    if count >= len(tokens):
        return tokens
    order = np.argsort(-score[tokens], kind="stable")
    return np.sort(tokens[order[:count]])


def without_pruned(ops: Sequence[Op], layers: Sequence[Pruning]) -> tuple[Op, ...]:
    """``ops`` with the tokens that are alive where they run: attention as its layer enters it,
    the linear layers and the vector work between two calls with the rows of the tokens left.

    An operation is known to work on tokens by its sizes: a product with weights by its rows, the
    queries of the call before or the queries or keys of the call behind; vector work by whole
    rows of such a product's width, or of all heads. Everything else is left as it is, above
    all convolutions, which need the whole grid.
    """
    done: list[Op] = []
    waiting: list[Op] = []
    before: tuple[Attention, Pruning] | None = None
    pruning = iter(layers)
    for op in ops:
        if not isinstance(op, Attention):
            waiting.append(op)
            continue
        behind = op, next(pruning)
        tokens = behind[1].before
        done += _shrunk(waiting, before, behind)
        done.append(replace(op, queries=tokens.queries, keys=tokens.keys, masks=None))
        before, waiting = behind, []
    return (*done, *_shrunk(waiting, before, None))


def _shrunk(
    ops: Sequence[Op],
    before: tuple[Attention, Pruning] | None,
    behind: tuple[Attention, Pruning] | None,
) -> Iterator[Op]:
    """``ops`` between two calls."""
    rows: dict[int, int] = {}
    widths: set[int] = set()
    if behind:
        call, layer = behind
        rows[call.windows * call.queries] = call.windows * layer.before.queries
        rows[call.windows * call.keys] = call.windows * layer.before.keys
        widths |= {call.heads * call.key_dim, call.heads * call.value_dim}
    if before:
        call, layer = before
        rows[call.windows * call.queries] = call.windows * layer.now.queries
    for op in ops:
        if isinstance(op, Gemm) and op.weight and op.rows in rows:
            widths |= {op.inner, op.cols}
    for op in ops:
        if isinstance(op, Gemm) and op.weight and op.rows in rows:
            yield replace(op, rows=rows[op.rows])
        elif isinstance(op, Elementwise):
            yield _narrower(op, rows, widths)
        else:
            yield op


def _narrower(op: Elementwise, rows: dict[int, int], widths: set[int]) -> Elementwise:
    for whole, left in rows.items():
        if op.outputs % whole == 0 and op.outputs // whole in widths and op.inputs % whole == 0:
            return replace(op, inputs=op.inputs // whole * left, outputs=op.outputs // whole * left)
    return op
