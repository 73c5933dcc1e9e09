"""A plan: one layer's fixed mask, arranged once for the kernels of `sparse_attention`.

It holds the mask three ways, all exact: kept keys by query (what the CPU walks), tiles of
queries with the keys they need (a GPU's forward), and tiles of keys with the queries that
need them (its backward). Order and tiles come from `tiling`. A file holds the mask's bits
and the two orders alone; the index arrays are made again when it is read, so that no file
can make a kernel read out of bounds.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...files import written_whole
from ...workload import AttentionMask, PolarizedMask
from ...workload.bits import packed, unpacked
from .tiling import Csr, Tiles, cluster, lay_out

TILES = (16, 32, 64)
FULL_ROW = 0.5
"""A query that keeps more than this share of the keys gets a tile with its like."""

MOST_TOKENS = 8192
SHORT_KEYS = 256
"""Up to this many keys a plan also carries the mask as bit words, for the short kernel."""

DENSE_SHARE = 0.5
"""A mask that keeps more than this is computed densely, and the plan carries it as bool."""

MaskLike = np.ndarray | Tensor | AttentionMask | Sequence[PolarizedMask]


@dataclass(frozen=True, eq=False)
class TileTensors:
    """`tiling.Tiles` as tensors of one device."""

    head: Tensor
    rows: Tensor
    start: Tensor
    count: Tensor
    columns: Tensor
    bits: Tensor

    @classmethod
    def of(cls, tiles: Tiles) -> TileTensors:
        return cls(*(torch.from_numpy(getattr(tiles, f.name)) for f in fields(cls)))

    def listed(self) -> list[Tensor]:
        """Head, rows, start, count, columns, bits."""
        return [self.head, self.rows, self.start, self.count, self.columns, self.bits]

    def to(self, device: torch.device | str) -> TileTensors:
        return TileTensors(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """A layer's mask, ready to be computed with; made by `plan_attention`.

    order     int32 [heads, queries]: the order in which queries are computed
    indptr    int64 [heads * queries + 1] and
    columns   int32 [kept]: kept keys, ascending, of the queries in that order
    by_query  tiles of queries, listing keys
    by_key    tiles of keys, listing queries
    words     int32 [heads, queries, 1, 2, 4 or 8]: the mask's bits, lowest first, 0 behind
              the last key; empty above 256 keys
    keep      bool [heads, queries, keys], where more than `DENSE_SHARE` of it is True;
              else empty
    """

    heads: int
    queries: int
    keys: int
    tile: int
    order: Tensor
    indptr: Tensor
    columns: Tensor
    by_query: TileTensors
    by_key: TileTensors
    words: Tensor
    keep: Tensor

    @property
    def kept(self) -> int:
        """Kept entries."""
        return len(self.columns)

    @property
    def density(self) -> float:
        """Kept entries over all entries."""
        return self.kept / (self.heads * self.queries * self.keys)

    @property
    def computed(self) -> int:
        """Entries that the tiles compute."""
        return self.tile * len(self.by_query.columns)

    @property
    def area(self) -> float:
        """Entries that the tiles compute over all entries; `density` where nothing is in
        vain, above 1 where padding outweighs what is skipped."""
        return self.computed / (self.heads * self.queries * self.keys)

    @property
    def device(self) -> torch.device:
        return self.columns.device

    def to(self, device: torch.device | str) -> AttentionPlan:
        """This plan with its arrays on ``device``."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if isinstance(getattr(self, f.name), (Tensor, TileTensors))
        }
        return replace(self, **moved)

    def dense(self) -> Tensor:
        """bool [heads, queries, keys]: exactly the mask planned."""
        if self.keep.numel():
            return self.keep
        rows = torch.arange(self.heads, device=self.device)[:, None] * self.queries + self.order
        of_entry = torch.repeat_interleave(
            rows.reshape(-1), torch.diff(self.indptr), output_size=self.kept
        )
        flat = torch.zeros(
            self.heads * self.queries * self.keys, dtype=torch.bool, device=self.device
        )
        flat[of_entry * self.keys + self.columns] = True
        return flat.view(self.heads, self.queries, self.keys)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz``, whole or not at all."""
        if Path(path).suffix != ".npz":
            raise ValueError(f"a plan is saved as .npz, got {str(path)!r}")
        arrays = {
            "shape": np.array([self.heads, self.queries, self.keys, self.tile], np.int64),
            "bits": packed(self.dense().cpu().numpy()),
            "query_order": self.order.cpu().numpy(),
            "key_order": _order_of(self.by_key, self.heads, self.keys),
        }
        with written_whole(path) as temporary:
            np.savez_compressed(temporary, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttentionPlan:
        """Read what `save` wrote. Raises ValueError where it is no plan."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                heads, queries, keys, tile = (int(size) for size in stored["shape"])
                keep = unpacked(stored["bits"], (heads, queries, keys))
                orders = (stored["query_order"], stored["key_order"])
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a readable plan ({error})") from None
        try:
            _check_order("query_order", orders[0], heads, queries)
            _check_order("key_order", orders[1], heads, keys)
            return _planned(_checked(keep), _checked_tile(tile), orders)
        except ValueError as error:
            raise ValueError(f"{path}: not a usable plan ({error})") from None


def plan_attention(
    mask: MaskLike, *, tile: int | None = None, granularity: tuple[int, int] | None = None
) -> AttentionPlan:
    """Arrange one layer's mask for `sparse_attention`.

    mask         bool [heads, queries, keys], True = kept, as an array or tensor; an
                 `AttentionMask` of one layer; or a layer's polarized heads
    tile         queries (and, backward, keys) that a GPU computes together: 16, 32 or 64;
                 by default the rows of ``granularity``, else 32
    granularity  (rows, 1) for a mask pruned in vectors of that many queries. It is checked:
                 the queries that keep at most half of all keys, taken in order in groups of
                 ``rows``, keep the same keys in each group. Nothing is computed in vain then

    Raises ValueError for another shape, dtype, tile or granularity.
    """
    keep = _checked(_dense(mask))
    if granularity is not None:
        _check_granularity(keep, granularity)
    tile = _checked_tile(tile or (granularity[0] if granularity else 32))
    return _planned(keep, tile, None)


def plan_layers(
    mask: AttentionMask | Sequence[Sequence[PolarizedMask]], *, tile: int | None = None
) -> tuple[AttentionPlan, ...]:
    """`plan_attention` of every layer of a mask."""
    layers = mask.keep if isinstance(mask, AttentionMask) else mask
    return tuple(plan_attention(layer, tile=tile) for layer in layers)


def _dense(mask: MaskLike) -> np.ndarray:
    if isinstance(mask, AttentionMask):
        if len(mask.keep) != 1:
            raise ValueError(
                f"a plan is for one layer, this mask has {len(mask.keep)}: use plan_layers"
            )
        return mask.keep[0]
    if isinstance(mask, Tensor):
        return mask.detach().cpu().numpy()
    if isinstance(mask, Sequence) and mask and isinstance(mask[0], PolarizedMask):
        return np.stack([head.dense() for head in mask])
    return np.asarray(mask)


def _checked(keep: np.ndarray) -> np.ndarray:
    if keep.dtype != np.bool_ or keep.ndim != 3 or 0 in keep.shape:
        raise ValueError(
            "a mask to plan is bool [heads, queries, keys] with no empty axis, "
            f"got {keep.dtype} {list(keep.shape)}"
        )
    if max(keep.shape[1:]) > MOST_TOKENS:
        raise ValueError(
            f"a plan takes up to {MOST_TOKENS} queries and keys, got {list(keep.shape[1:])}"
        )
    return keep


def _checked_tile(tile: int) -> int:
    if tile not in TILES:
        raise ValueError(f"tile must be one of {', '.join(map(str, TILES))}, got {tile!r}")
    return tile


def _check_granularity(keep: np.ndarray, granularity: tuple[int, int]) -> None:
    rows, columns = granularity
    if rows not in TILES or columns != 1:
        raise ValueError(
            f"granularity must be (rows, 1) with rows one of {', '.join(map(str, TILES))}, "
            f"got {granularity!r}"
        )
    partial = np.count_nonzero(keep, axis=-1) <= int(FULL_ROW * keep.shape[-1])
    for head, (rows_of, some) in enumerate(zip(keep, partial, strict=True)):
        vectors = np.packbits(rows_of[some], axis=-1)
        changes = np.flatnonzero((vectors[1:] != vectors[:-1]).any(axis=-1)) + 1
        wrong = changes[changes % rows != 0]
        if len(wrong):
            raise ValueError(
                f"granularity {granularity!r}: head {head} is finer, its query "
                f"{int(np.flatnonzero(some)[wrong[0]])} keeps other keys than the one before"
            )


def _check_order(name: str, order: np.ndarray, heads: int, length: int) -> None:
    right = order.dtype == np.int32 and order.shape == (heads, length)
    if not right or not np.array_equal(
        np.sort(order, axis=1), np.broadcast_to(np.arange(length), order.shape)
    ):
        raise ValueError(
            f"{name} must be a permutation of {length} positions for each of {heads} heads"
        )


def _planned(
    keep: np.ndarray, tile: int, orders: tuple[np.ndarray, np.ndarray] | None
) -> AttentionPlan:
    by_rows = Csr.of(keep)
    by_columns = by_rows.transposed()
    if orders is None:
        orders = (
            cluster(by_rows, by_columns, tile, FULL_ROW),
            cluster(by_columns, by_rows, tile, FULL_ROW),
        )
    tiles = [
        TileTensors.of(lay_out(csr, _full_first(csr, order), tile, FULL_ROW))
        for csr, order in zip((by_rows, by_columns), orders, strict=True)
    ]
    ordered = by_rows.reordered(orders[0])
    heads, queries, keys = keep.shape
    dense = ordered.indptr[-1] > DENSE_SHARE * keep.size
    return AttentionPlan(
        heads=heads,
        queries=queries,
        keys=keys,
        tile=tile,
        order=torch.from_numpy(np.ascontiguousarray(orders[0])),
        indptr=torch.from_numpy(ordered.indptr),
        columns=torch.from_numpy(ordered.columns),
        by_query=tiles[0],
        by_key=tiles[1],
        words=torch.from_numpy(_words(keep)),
        keep=torch.from_numpy(np.array(keep) if dense else np.zeros((0, 0, 0), bool)),
    )


def _full_first(csr: Csr, order: np.ndarray) -> np.ndarray:
    """``order`` with the rows that `lay_out` keeps apart in front, else as it was."""
    full = np.diff(csr.indptr).reshape(csr.heads, csr.rows) > int(FULL_ROW * csr.width)
    rest = np.argsort(~np.take_along_axis(full, order, axis=1), axis=1, kind="stable")
    return np.take_along_axis(order, rest, axis=1)


def _words(keep: np.ndarray) -> np.ndarray:
    heads, queries, keys = keep.shape
    if keys > SHORT_KEYS:
        return np.zeros((0, 0, 0), np.int32)
    width = max(32, 1 << (keys - 1).bit_length())
    padded = np.zeros((heads, queries, width), bool)
    padded[:, :, :keys] = keep
    return np.packbits(padded, axis=-1, bitorder="little").view("<i4").astype(np.int32)


def _order_of(tiles: TileTensors, heads: int, rows: int) -> np.ndarray:
    """int32 [heads, rows]: the order in which the tiles take the rows."""
    flat = tiles.rows.cpu().numpy().reshape(-1)
    return flat[flat >= 0].reshape(heads, rows)
