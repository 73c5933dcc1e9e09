"""Fixed attention masks: a whole model's (`AttentionMask`) and one head's, polarized.

ViTCoD, HPCA 2023, "split and conquer": a mask is learned once and never changes with the
image. Each head's mask is then polarized: keys that many queries keep (global tokens)
move to the front and form a dense block; the kept entries of the other keys stay in
compressed sparse columns (CSC). One polarity throughout: True = kept.
"""

from __future__ import annotations

import hashlib
import numbers
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..checks import integer
from ..files import written_whole
from ..moved import old_arguments, old_names
from .bits import packed, unpacked

GlobalThreshold = int | float | str
"""Which keys of a head are global: those that more queries keep than a count (int >= 0) or a
share of the queries (float in (0, 1)); "all": those that every query keeps; "none": no key."""
WORDS = ("all", "none")
GLOBAL_THRESHOLD: GlobalThreshold = 0.5
"""The default. # choice: a share suits every number of tokens, and a half is near the share at
which the denser engine is as fast as the sparser one (0.6 with half a bank for each line)."""
PUBLISHED_GLOBAL_THRESHOLD = 50
"""ViTCoD's theta_d: a key is global when MORE than this many of the 197 queries keep it."""

MOST_TOKENS = 2**24
"""Queries or keys of an attention call; their number of pairs is one of 64 bits."""


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Which attention entries a model computes.

    ``keep[layer]`` is a bool array [heads, queries, keys], True = kept; layers may differ
    in shape (LeViT, EfficientViT). "Layer l" is the l-th call of softmax attention.
    ``global_threshold`` is the rule that the mask is polarized by unless another is given
    (`GlobalThreshold`); masks are equal when they keep the same entries.
    """

    keep: tuple[np.ndarray, ...]
    global_threshold: GlobalThreshold = GLOBAL_THRESHOLD

    def __post_init__(self) -> None:
        held = check_global_threshold(self.global_threshold)
        object.__setattr__(self, "global_threshold", held)
        if not isinstance(self.keep, Iterable):
            raise ValueError(f"keep must be a bool array for each layer, got {self.keep!r}")
        layers = tuple(_frozen_bool(layer, index) for index, layer in enumerate(self.keep))
        if not layers:
            raise ValueError("a mask needs at least one layer, got none")
        object.__setattr__(self, "keep", layers)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, AttentionMask)
            and len(self.keep) == len(other.keep)
            and all(map(np.array_equal, self.keep, other.keep))
        )

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(heads, queries, keys) of each layer."""
        return tuple(layer.shape for layer in self.keep)

    @property
    def entries(self) -> int:
        """All entries, kept or pruned."""
        return sum(layer.size for layer in self.keep)

    @property
    def kept(self) -> int:
        """Kept entries, forced rows and columns included."""
        return sum(int(np.count_nonzero(layer)) for layer in self.keep)

    @property
    def sparsity(self) -> float:
        """Pruned entries over all entries (ViTCoD's definition)."""
        return 1.0 - self.kept / self.entries

    @property
    def digest(self) -> str:
        """Names the content: equal masks, and only they, have equal digests."""
        made = hashlib.blake2b(str(self.shapes).encode())
        for layer in self.keep:
            made.update(packed(layer).data)
        return made.hexdigest()[:32]

    def sparsity_by_head(self) -> tuple[np.ndarray, ...]:
        """float64 [heads] a layer."""
        return tuple(1.0 - layer.mean(axis=(1, 2)) for layer in self.keep)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` of bit-packed layers, whole or not at all."""
        if Path(path).suffix != ".npz":
            raise ValueError(f"a mask is saved as .npz, got {str(path)!r}")
        arrays: dict[str, np.ndarray] = {"shapes": np.array(self.shapes, dtype=np.int64)}
        for index, layer in enumerate(self.keep):
            arrays[f"bits{index}"] = packed(layer)
        arrays["global_threshold"] = np.array(self.global_threshold)
        with written_whole(path) as temporary:
            # NumPy's own annotation takes the arrays for its other keyword as well.
            np.savez_compressed(temporary, **arrays)  # pyright: ignore[reportArgumentType]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttentionMask:
        """Read an ``.npz`` of `save`, or ViTCoD's ``.npy``: bool [layers, heads, n, n],
        stored there inverted (True = pruned). Never unpickles. An ``.npz`` that says nothing
        of global keys is of a version whose masks had no other rule than a count of 50; an
        ``.npy`` holds kept entries alone, and has the default rule."""
        suffix = Path(path).suffix
        if suffix not in (".npz", ".npy"):
            raise ValueError(f"a mask file ends in .npz or .npy, got {str(path)!r}")
        try:
            with open(path, "rb") as file:
                read = _read_npz if suffix == ".npz" else _read_vitcod
                return cls(*read(file))
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a readable mask ({error})") from None


def _frozen_bool(layer: np.ndarray, index: int) -> np.ndarray:
    array = np.array(layer)
    if array.dtype != np.bool_ or array.ndim != 3 or 0 in array.shape:
        raise ValueError(
            f"layer {index} of a mask is a bool array [heads, queries, keys] with no empty "
            f"axis, got {array.dtype} {list(array.shape)}"
        )
    array.setflags(write=False)
    return array


def _read_npz(file) -> tuple[tuple[np.ndarray, ...], GlobalThreshold]:
    with np.load(file, allow_pickle=False) as stored:
        shapes, said = stored["shapes"], "global_threshold" in stored
        layers = tuple(unpacked(stored[f"bits{i}"], shape) for i, shape in enumerate(shapes))
        return layers, stored["global_threshold"].item() if said else PUBLISHED_GLOBAL_THRESHOLD


def _read_vitcod(file) -> tuple[tuple[np.ndarray, ...], GlobalThreshold]:
    pruned = np.load(file, allow_pickle=False)
    if pruned.dtype != np.bool_ or pruned.ndim != 4:
        raise ValueError(
            "ViTCoD's .npy is bool [layers, heads, n, n], "
            f"this one is {pruned.dtype} {list(pruned.shape)}"
        )
    return tuple(~pruned), GLOBAL_THRESHOLD


@dataclass(frozen=True, eq=False)
class PolarizedMask:
    """One head's mask after reordering: a dense block of global keys, CSC for the rest.

    query_order, key_order  int64 permutations: row i of the reordered mask is the original
                            row query_order[i]; likewise columns
    num_global              keys in front, computed by the denser engine
    global_keep             bool [queries, num_global], reordered; the engine computes the
                            whole block and masks the False entries before softmax
    indptr, indices         CSC of the other keys: column j (key key_order[num_global + j])
                            keeps rows indices[indptr[j]:indptr[j + 1]], ascending, reordered
    global_threshold        the rule that made it, None where none did; a remark that neither
                            equality nor `digest` looks at
    """

    query_order: np.ndarray
    key_order: np.ndarray
    num_global: int
    global_keep: np.ndarray
    indptr: np.ndarray
    indices: np.ndarray
    global_threshold: GlobalThreshold | None = None

    def __post_init__(self) -> None:
        for name in ("query_order", "key_order", "indptr", "indices"):
            object.__setattr__(self, name, _frozen_int(name, getattr(self, name)))
        held = integer("num_global", self.num_global, 0, len(self.key_order))
        object.__setattr__(self, "num_global", held)
        keep = np.array(self.global_keep)
        if keep.dtype != np.bool_:
            raise ValueError(f"global_keep must be bool, got {keep.dtype} {list(keep.shape)}")
        keep.setflags(write=False)
        object.__setattr__(self, "global_keep", keep)
        if self.global_threshold is not None:
            rule = check_global_threshold(self.global_threshold)
            object.__setattr__(self, "global_threshold", rule)
        _check_polarized(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PolarizedMask) and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in self.__dataclass_fields__
            if name != "global_threshold"
        )

    @property
    def queries(self) -> int:
        return len(self.query_order)

    @property
    def keys(self) -> int:
        return len(self.key_order)

    @property
    def sparser_kept(self) -> int:
        """Kept entries outside the dense block."""
        return len(self.indices)

    @cached_property
    def kept(self) -> int:
        """Kept entries, those of the dense block included."""
        return int(np.count_nonzero(self.global_keep)) + self.sparser_kept

    @cached_property
    def digest(self) -> str:
        """Names the content: equal masks, and only they, have equal digests."""
        made = hashlib.blake2b(f"{self.queries} {self.keys} {self.num_global} ".encode())
        for part in (self.query_order, self.key_order, self.indptr, self.indices):
            made.update(np.ascontiguousarray(part).data)
        made.update(packed(self.global_keep).data)
        return made.hexdigest()[:32]

    @property
    def computed(self) -> int:
        """Entries the machine computes: the whole dense block and the sparser part."""
        return self.global_keep.size + self.sparser_kept

    @property
    def query_position(self) -> np.ndarray:
        """Inverse of `query_order`: where each original query stands."""
        return np.argsort(self.query_order)

    @property
    def key_position(self) -> np.ndarray:
        """Inverse of `key_order`: where each original key stands."""
        return np.argsort(self.key_order)

    @property
    def bitmap(self) -> np.ndarray:
        """The dense block as uint8 bits, row by row: what the machine loads."""
        return packed(self.global_keep)

    @cached_property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The sparser part by rows (CSR): indptr [queries + 1] and ascending columns,
        numbered like those of `indptr`."""
        columns = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        order = np.argsort(self.indices, kind="stable")
        counts = np.bincount(self.indices, minlength=self.queries)
        return np.concatenate(([0], np.cumsum(counts))), columns[order]

    def reordered(self) -> np.ndarray:
        """bool [queries, keys] in the new order."""
        keep = np.zeros((self.queries, self.keys), dtype=bool)
        keep[:, : self.num_global] = self.global_keep
        columns = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        keep[self.indices, self.num_global + columns] = True
        return keep

    def dense(self) -> np.ndarray:
        """bool [queries, keys] in the original order: exactly the mask polarized."""
        keep = np.empty((self.queries, self.keys), dtype=bool)
        keep[np.ix_(self.query_order, self.key_order)] = self.reordered()
        return keep


def _frozen_int(field: str, values: object) -> np.ndarray:
    array = np.array(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"{field} must be integers in one row, got {array.dtype} {list(array.shape)}"
        )
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{field} must be integers of 63 bits, got {array.max()}")
    array = array.astype(np.int64)
    array.setflags(write=False)
    return array


def _check_polarized(mask: PolarizedMask) -> None:
    for name in ("query_order", "key_order"):
        order = getattr(mask, name)
        if order.ndim != 1 or not np.array_equal(np.sort(order), np.arange(order.size)):
            raise ValueError(f"{name} must be a permutation of its positions, got {order}")
    if mask.global_keep.shape != (mask.queries, mask.num_global):
        raise ValueError(
            f"global_keep must be [queries, num_global] = [{mask.queries}, {mask.num_global}], "
            f"got {list(mask.global_keep.shape)}"
        )
    columns = mask.keys - mask.num_global
    lengths = np.diff(mask.indptr)
    if mask.indptr.shape != (columns + 1,) or mask.indptr[0] != 0 or np.any(lengths < 0):
        raise ValueError(f"indptr must rise from 0 over {columns + 1} entries, got {mask.indptr}")
    if mask.indptr[-1] != len(mask.indices):
        raise ValueError(f"indptr ends at {mask.indptr[-1]}, indices hold {len(mask.indices)}")
    column_of = np.repeat(np.arange(columns), lengths)
    flat = column_of * mask.queries + mask.indices
    inside = np.all((mask.indices >= 0) & (mask.indices < mask.queries))
    if not inside or np.any(np.diff(flat) <= 0):
        raise ValueError("indices must ascend inside each column and name existing queries")


@old_arguments("min_kept")
def polarize_head(
    keep: np.ndarray, global_threshold: GlobalThreshold = GLOBAL_THRESHOLD
) -> PolarizedMask:
    """Polarize one head's mask, bool [queries, keys] (ViTCoD section IV, split and conquer).

    A key is global when MORE than ``global_threshold`` queries keep it: an int is a count, a
    float in (0, 1) a share of the queries; "all" and "none" see `GlobalThreshold`. The i-th
    global key is swapped with position i, one after the other, as in the released script. A
    square mask is permuted symmetrically (queries and keys alike); for queries != keys only
    the keys move.
    """
    keep = np.asarray(keep)
    if keep.dtype != np.bool_ or keep.ndim != 2 or 0 in keep.shape:
        raise ValueError(f"keep is bool [queries, keys], got {keep.dtype} {list(keep.shape)}")
    queries, keys = keep.shape
    global_keys = np.flatnonzero(np.count_nonzero(keep, axis=0) > _cut(global_threshold, queries))
    key_order = np.arange(keys)
    for position, key in enumerate(global_keys):
        key_order[[position, key]] = key_order[[key, position]]
    query_order = key_order if queries == keys else np.arange(queries)
    reordered = keep[np.ix_(query_order, key_order)]
    num_global = len(global_keys)
    columns, rows = np.nonzero(reordered[:, num_global:].T)
    counts = np.bincount(columns, minlength=keys - num_global)
    return PolarizedMask(
        query_order=query_order,
        key_order=key_order,
        num_global=num_global,
        global_keep=reordered[:, :num_global],
        indptr=np.concatenate(([0], np.cumsum(counts))),
        indices=rows,
        global_threshold=global_threshold,
    )


def check_global_threshold(threshold: object) -> GlobalThreshold:
    """``threshold`` as a `GlobalThreshold`; ValueError for what is none."""
    if isinstance(threshold, str) and threshold in WORDS:
        return threshold
    if isinstance(threshold, numbers.Integral) and not isinstance(threshold, bool):
        if 0 <= (count := int(threshold)) <= MOST_TOKENS:
            return count
    elif isinstance(threshold, float) and 0.0 < threshold < 1.0:
        return float(threshold)
    raise ValueError(
        "global_threshold is a count of queries (an int >= 0), a share of them (a float in "
        f"(0, 1)), {' or '.join(map(repr, WORDS))}, got {threshold!r}"
    )


def kept_by(threshold: GlobalThreshold | None) -> str:
    """Which keys are global, in a few words; None: those that masks without a rule have."""
    if threshold is None:
        return "as the masks have them"
    if isinstance(threshold, str):
        return "kept by every query" if threshold == "all" else "none wanted"
    whose = "of the queries" if isinstance(threshold, float) else "queries"
    return f"kept by more than {threshold} {whose}"


def _cut(threshold: GlobalThreshold, queries: int) -> float:
    """``threshold`` as a count of queries that a global key must exceed."""
    threshold = check_global_threshold(threshold)
    if isinstance(threshold, str):
        return queries - 1 if threshold == "all" else queries
    return threshold * queries if isinstance(threshold, float) else threshold


__getattr__ = old_names(__name__)
