"""Rows of a buffer that are gathered by index, and the conflicts of their banks.

A buffer has banks of one word (`Hardware.word_bytes`) that each give a word a cycle. The rows of
tokens lie in them in turn: token t, with all its words, in bank t mod banks. An array that works
on a group of tokens takes one word of each of them for every ``macs_per_line`` operands, whoever
of its lines need it: a word read once is passed down the lines. So a group takes as many cycles a
word as the fullest bank has of its tokens. Rows in order fill the banks evenly; gathered ones
do not.
"""

from __future__ import annotations

import numpy as np

from ..hardware import Hardware
from ..products import Layout


def fullest(taken: np.ndarray, banks: int) -> np.ndarray:
    """Tokens of each group in its fullest bank, int64 [groups]; ``taken`` bool [groups, tokens]
    says which tokens a group takes."""
    groups, tokens = taken.shape
    rows = -(-tokens // banks)
    padded = np.zeros((groups, rows * banks), dtype=np.int64)
    padded[:, :tokens] = taken
    return padded.reshape(groups, rows, banks).sum(axis=1).max(axis=1, initial=0)


def conflict_cycles(
    tokens: np.ndarray, group: int, banks: int, words: int, cycles: int
) -> np.ndarray:
    """Cycles that each group of ``group`` of the ``tokens``, int64 [tokens] in order, waits for
    its banks, int64 [groups]: what the fullest bank takes for ``words`` of each token beyond the
    ``cycles`` that the array works on a group."""
    groups = -(-len(tokens) // group)
    places = np.arange(len(tokens)) // group * banks + tokens % banks
    held = np.bincount(places, minlength=groups * banks).reshape(groups, banks)
    return np.maximum(words * held.max(axis=1) - cycles, 0)


def tiles_wait(
    layout: Layout,
    tokens: tuple[np.ndarray, np.ndarray],
    banks: tuple[int, int],
    hardware: Hardware,
    words: int,
    steps: int,
) -> int:
    """Cycles that a product of gathered rows and gathered columns, ``tokens`` of either side,
    waits for the ``banks`` of the two: each tile for the slower side, which gives ``words`` of
    each of its tokens in the ``steps`` of the inner size. A layout that holds an operand (WS,
    IS) streams one token at a time past it and never waits."""
    if layout.dataflow != "os":
        return 0
    sides = _tile_sides(layout, len(tokens[0]), len(tokens[1]), hardware)
    cycles = -(-steps // layout.parts)
    rows, columns = (
        conflict_cycles(some, side, count, words, cycles)
        for some, side, count in zip(tokens, sides, banks, strict=True)
    )
    return int(np.maximum.outer(rows, columns).sum())


def streams_wait(layout: Layout, m: int, tokens: np.ndarray, n: int, hardware: Hardware) -> int:
    """Cycles that a product [m, tokens] x [tokens, n] waits for the banks of V: each tile takes
    its columns of every gathered token, one token after the other."""
    if layout.dataflow != "os":
        return 0
    rows, columns = _tile_sides(layout, m, n, hardware)
    words = -(-columns * hardware.operand_bytes // hardware.word_bytes)
    cycles = -(-len(tokens) // layout.parts)
    waited = conflict_cycles(tokens, len(tokens), hardware.v_banks, words, cycles)
    return -(-m // rows) * -(-n // columns) * int(waited.sum())


def _tile_sides(layout: Layout, m: int, n: int, hardware: Hardware) -> tuple[int, int]:
    """Rows and columns of the result [m, n] in one output-stationary tile."""
    if not layout.turned:
        return layout.stripe, min(hardware.macs_per_line, n)
    width = min(hardware.macs_per_line, m)
    return layout.stripe, min(layout.tile_results // width, n)
