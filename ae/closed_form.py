"""Closed-form codec weights: principal components over the heads, and the free rotation.

Everything needed is in the second moments between heads, gathered once over the map
photos: S[h, g] = sum over tokens of x_h^T x_g, a [key_dim, key_dim] block for each pair
of heads. Random initial weights give rubbish; these are the best linear codec for the
squared error of Q and K, before any training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..moved import old_arguments, old_names
from ..workload import HeadCodec
from .codec import HeadLinear, QKCodec

ROTATION_SWEEPS = 30


@old_arguments("turned")
@dataclass(frozen=True, eq=False)
class HeadMoments:
    """Sums over ``count`` token vectors: ``first`` [heads, dim], ``second``
    [heads, dim, heads, dim], float64."""

    count: int
    first: np.ndarray
    second: np.ndarray

    @classmethod
    def of(cls, x: Tensor) -> HeadMoments:
        """Moments of Q or K, [batch, heads, tokens, dim]."""
        heads, dim = x.shape[1], x.shape[3]
        rows = x.detach().transpose(1, 2).flatten(0, 1).flatten(1).double()  # (tokens, h * d)
        second = (rows.T @ rows).view(heads, dim, heads, dim)
        return cls(len(rows), rows.sum(0).view(heads, dim).cpu().numpy(), second.cpu().numpy())

    def __add__(self, other: HeadMoments) -> HeadMoments:
        return HeadMoments(
            self.count + other.count, self.first + other.first, self.second + other.second
        )

    @property
    def mean(self) -> np.ndarray:
        """[heads, dim]"""
        return self.first / self.count

    def shifted(self, shift: np.ndarray) -> HeadMoments:
        """Moments of x - shift, ``shift`` [heads, dim]."""
        cross = np.multiply.outer(self.first, shift)
        second = self.second - cross - cross.transpose(2, 3, 0, 1)
        second = second + self.count * np.multiply.outer(shift, shift)
        return replace(self, first=self.first - self.count * shift, second=second)

    def rotated(self, rotation: np.ndarray) -> HeadMoments:
        """Moments of x_h A_h, ``rotation`` [heads, dim, dim]."""
        second = np.einsum("hij,higk,gkl->hjgl", rotation, self.second, rotation, optimize=True)
        return replace(self, first=np.einsum("hi,hij->hj", self.first, rotation), second=second)

    def head_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Over the vectors of ``heads`` numbers, one a (token, dim): covariance
        [heads, heads] and mean [heads]."""
        dim = self.first.shape[1]
        mean = self.first.sum(axis=1) / (self.count * dim)
        product = np.einsum("higi->hg", self.second) / (self.count * dim)
        return product - np.outer(mean, mean), mean


def principal_components(covariance: np.ndarray, shape: HeadCodec) -> tuple[np.ndarray, float]:
    """The codec's ``latent_heads`` best directions, block by block.

    Returns U [heads, latent_heads / groups], the block's directions in its rows (decoder
    weight; the encoder's is its transpose block by block), and the explained share of
    the variance.
    """
    size, keep = shape.heads // shape.groups, shape.latent_heads // shape.groups
    directions, explained = [], 0.0
    for start in range(0, shape.heads, size):
        block = covariance[start : start + size, start : start + size]
        values, vectors = np.linalg.eigh(block)
        vectors = vectors[:, ::-1][:, :keep]
        signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(keep)])
        directions.append(vectors * signs)
        explained += values[::-1][:keep].sum()
    total = np.trace(covariance)
    return np.concatenate(directions), float(explained / total) if total > 0 else 1.0


def agreeing_rotation(q: HeadMoments, k: HeadMoments, shape: HeadCodec) -> np.ndarray:
    """Orthogonal A_h [heads, dim, dim] that make the heads agree: q_h A_h and k_h A_h
    then lie closer to ``latent_heads`` common directions, and q_h k_h^T is unchanged.

    Alternates principal components with an orthogonal Procrustes step for each head;
    neither ever lowers the share explained of Q's plus K's energy.
    """
    heads, dim = q.first.shape
    blocks = [m.second.transpose(0, 2, 1, 3) / np.einsum("hihi", m.second) for m in (q, k)]
    rotation = np.broadcast_to(np.eye(dim), (heads, dim, dim)).copy()
    for _ in range(ROTATION_SWEEPS):
        projectors = [_projector(_energy(block, rotation), shape) for block in blocks]
        for head in range(heads):
            pull = sum(
                np.hstack(_without(p[head], head)[:, None, None] * block[head])
                @ rotation.reshape(heads * dim, dim)
                for p, block in zip(projectors, blocks, strict=True)
            )
            left, _, right = np.linalg.svd(pull)
            rotation[head] = left @ right
    return rotation


def _energy(blocks: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """tr(A_h^T S_hg A_g), [heads, heads]."""
    return np.einsum("hij,hgij->hg", rotation, blocks @ rotation)


def _projector(energy: np.ndarray, shape: HeadCodec) -> np.ndarray:
    """U U^T of the principal components, [heads, heads], zero between groups."""
    directions, _ = principal_components(energy, shape)
    size = shape.heads // shape.groups
    group = np.arange(shape.heads) // size
    return np.where(group[:, None] == group[None, :], directions @ directions.T, 0.0)


def _without(row: np.ndarray, head: int) -> np.ndarray:
    return np.where(np.arange(row.size) == head, 0.0, row)


@dataclass(frozen=True)
class ExplainedVariance:
    """Shares of the variance over heads that the closed-form codec keeps, one layer."""

    q: float
    k: float


@old_arguments("turn")
def fit_closed_form(
    q: HeadMoments, k: HeadMoments, shape: HeadCodec, rotation: bool = False
) -> tuple[QKCodec, ExplainedVariance]:
    """A layer's codec from principal components over the heads, with biases.

    ``rotation`` first makes the free change of basis: keys are centred, which only adds a
    constant to each query's scores, and heads are rotated by `agreeing_rotation`.
    """
    codec = QKCodec(shape)
    if rotation:
        shift = k.mean
        k = k.shifted(shift)
        rotations = agreeing_rotation(q, k, shape)
        q, k = q.rotated(rotations), k.rotated(rotations)
        codec.key_shift = torch.from_numpy(shift).float()
        codec.rotation = torch.from_numpy(rotations).float()
    explained = ExplainedVariance(
        q=_set_sides(codec.encoder_q, codec.decoder_q, q, shape),
        k=_set_sides(codec.encoder_k, codec.decoder_k, k, shape),
    )
    return codec, explained


@torch.no_grad()
def _set_sides(
    encoder: HeadLinear, decoder: HeadLinear, moments: HeadMoments, shape: HeadCodec
) -> float:
    """Encoder U^T (x - mean), decoder U z + mean; returns the explained share."""
    covariance, mean = moments.head_covariance()
    directions, explained = principal_components(covariance, shape)
    size = shape.heads // shape.groups
    blocks = directions.reshape(shape.groups, size, -1)
    weight = blocks.transpose(0, 2, 1).reshape(shape.latent_heads, size)
    bias = -np.einsum("gol,gl->go", blocks.transpose(0, 2, 1), mean.reshape(shape.groups, size))
    for parameter, value in (
        (encoder.weight, weight),
        (encoder.bias, bias.ravel()),
        (decoder.weight, directions),
        (decoder.bias, mean),
    ):
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)).float())
    return explained


__getattr__ = old_names(__name__)
