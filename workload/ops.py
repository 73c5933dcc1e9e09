"""The operations a network is made of, each with what it computes, reads and writes.

Plain frozen data for one image, numpy only. All sizes are elements; bytes = elements x
the width that a machine gives them. What every operation answers stands at `Op`, below.
An operation checks itself: ValueError names a field of another type or out of its range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from ..checks import MOST, check_fields, integer
from .masks import MOST_TOKENS, PolarizedMask

MOST_HEADS = 2**16
MOST_DIM = 2**20
"""Of an attention call, a choice: far more than any network has, and few enough for 64 bits."""

ATTENTION_RANGES = {
    "heads": (1, MOST_HEADS),
    "queries": (1, MOST_TOKENS),
    "keys": (1, MOST_TOKENS),
    "key_dim": (1, MOST_DIM),
    "value_dim": (1, MOST_DIM),
    "bias_params": (0, MOST),
}
"""Least and most of the fields of `Attention`; other sizes have 1 to `checks.MOST`."""


@dataclass(frozen=True)
class HeadCodec:
    """A linear auto-encoder over attention heads (ViTCoD section V), for Q and for K.

    ``latent_heads`` is the total over all groups; ``groups`` splits heads and latent heads
    into independent blocks and divides both.
    """

    heads: int
    latent_heads: int
    groups: int = 1

    def __post_init__(self) -> None:
        heads = integer("heads", self.heads, 1, MOST_HEADS)
        check_fields(self, {"heads": (1, MOST_HEADS), "latent_heads": (1, heads)})
        if self.heads % self.groups or self.latent_heads % self.groups:
            raise ValueError(
                f"groups must divide heads {self.heads} and latent_heads "
                f"{self.latent_heads}, got {self.groups}"
            )

    @property
    def ratio(self) -> float:
        """Bytes of compressed Q (or K) over bytes of plain Q."""
        return self.latent_heads / self.heads

    @property
    def params_per_side(self) -> int:
        """Weights and biases of encoder and decoder, for Q alone (K has as many)."""
        weights = 2 * self.heads * self.latent_heads // self.groups
        return weights + self.latent_heads + self.heads

    def macs(self, vectors: int, dim: int) -> int:
        """MACs to encode (or to decode) ``vectors`` tokens of ``dim`` a head, once."""
        return vectors * dim * self.heads * self.latent_heads // self.groups


@dataclass(frozen=True)
class Gemm:
    """``batch`` products [rows, inner] x [inner, cols].

    ``weight``: the second operand is a parameter (a linear layer), read once however
    large the batch of images; otherwise both operands are activations.
    """

    name: str
    rows: int
    inner: int
    cols: int
    bias: bool = False
    batch: int = 1
    weight: bool = True

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def macs(self) -> int:
        return self.batch * self.rows * self.inner * self.cols

    @property
    def params(self) -> int:
        weights = self.batch * self.inner * self.cols if self.weight else 0
        return weights + (self.batch * self.cols if self.bias else 0)

    @property
    def activations(self) -> int:
        return self.elements_written

    @property
    def elements_read(self) -> int:
        second = 0 if self.weight else self.batch * self.inner * self.cols
        return self.batch * self.rows * self.inner + second + self.params

    @property
    def elements_written(self) -> int:
        return self.batch * self.rows * self.cols


@dataclass(frozen=True)
class Conv:
    """A 2-d convolution; sizes are (height, width), the output's as the module gave it.

    ``transposed``: each input is multiplied with the whole kernel, ``stride`` apart in the
    output. ``weight``: the kernel is a parameter; otherwise it was computed from the image
    or already counted by an earlier use.
    """

    name: str
    in_channels: int
    out_channels: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = False
    transposed: bool = False
    weight: bool = True

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def macs(self) -> int:
        if self.transposed:
            pixels = self.in_size[0] * self.in_size[1]
            return pixels * self._kernel_elements
        return self.elements_written * self.inner

    @property
    def inner(self) -> int:
        """Products summed for one output (transposed: at most): the inner size of the
        product it becomes."""
        taps = self.kernel
        if self.transposed:
            taps = tuple(-(-k // s) for k, s in zip(self.kernel, self.stride, strict=True))
        return taps[0] * taps[1] * self.in_channels // self.groups

    @property
    def _kernel_elements(self) -> int:
        taps = self.kernel[0] * self.kernel[1]
        return self.out_channels * taps * self.in_channels // self.groups

    @property
    def params(self) -> int:
        weights = self._kernel_elements if self.weight else 0
        return weights + (self.out_channels if self.bias else 0)

    @property
    def activations(self) -> int:
        return self.elements_written

    @property
    def elements_read(self) -> int:
        kernel = 0 if self.weight else self._kernel_elements
        return self.in_channels * self.in_size[0] * self.in_size[1] + kernel + self.params

    @property
    def elements_written(self) -> int:
        return self.out_channels * self.out_size[0] * self.out_size[1]


@dataclass(frozen=True)
class Deform:
    """A deformable sampling operator (DCNv3, DCNv4): ``points`` output positions, each the
    weighted sum of ``samples`` bilinear samples, offsets and weights shared in a group.

    MACs by the InternImage authors' rule, 5 a sample, point and channel. Elements as with
    an unlimited cache: the map once, two offsets and a weight a sample and group.
    """

    name: str
    channels: int
    groups: int
    samples: int
    in_size: tuple[int, int]
    points: int
    params: ClassVar[int] = 0
    activations: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def macs(self) -> int:
        return 5 * self.points * self.samples * self.channels

    @property
    def elements_read(self) -> int:
        sampled = self.channels * self.in_size[0] * self.in_size[1]
        return sampled + 3 * self.points * self.samples * self.groups

    @property
    def elements_written(self) -> int:
        return self.points * self.channels


@dataclass(frozen=True)
class Elementwise:
    """Work without products: norms, activations, residual adds, scales, pools, copies.

    ``kind`` is the plain name of the operation ("layer_norm", "gelu", "add", ...);
    ``inputs`` and ``outputs`` are elements read and written, parameters apart.
    A residual add reads both operands, so the residual is read a second time.
    """

    name: str
    kind: str
    inputs: int
    outputs: int
    params: int = 0
    macs: ClassVar[int] = 0
    activations: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_fields(self, least=0)

    @property
    def elements_read(self) -> int:
        return self.inputs + self.params

    @property
    def elements_written(self) -> int:
        return self.outputs


@dataclass(frozen=True)
class Unknown:
    """An operation whose cost is not known: listed, never silently free.

    ``outputs`` elements were seen to leave it; its MACs count as 0 and the totals say so.
    """

    name: str
    kind: str
    inputs: int
    outputs: int
    macs: ClassVar[int] = 0
    params: ClassVar[int] = 0
    activations: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_fields(self, least=0)

    @property
    def elements_read(self) -> int:
        return self.inputs

    @property
    def elements_written(self) -> int:
        return self.outputs


@dataclass(frozen=True)
class Unused:
    """A parameter, or the part of one, that a forward never reads."""

    name: str
    params: int = 0
    macs: ClassVar[int] = 0
    activations: ClassVar[int] = 0
    elements_read: ClassVar[int] = 0
    elements_written: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_fields(self, least=0)


@dataclass(frozen=True)
class Attention:
    """One call of softmax attention: scores, softmax and weighted values.

    ``windows`` independent windows share the masks. ``masks`` holds one `PolarizedMask` a
    head, or None for dense attention; ``codec`` compresses Q and K over the heads.
    ``bias_params`` are the parameters of a learned bias added to the scores.
    """

    name: str
    heads: int
    queries: int
    keys: int
    key_dim: int
    value_dim: int
    windows: int = 1
    masks: tuple[PolarizedMask, ...] | None = None
    codec: HeadCodec | None = None
    bias_params: int = 0

    def __post_init__(self) -> None:
        check_fields(self, ATTENTION_RANGES)
        self._check_parts()
        if self.masks is not None:
            got = [(mask.queries, mask.keys) for mask in self.masks]
            if got != [(self.queries, self.keys)] * self.heads:
                raise ValueError(
                    f"{self.name} needs {self.heads} masks of {self.queries} x {self.keys} "
                    f"tokens, got {len(got)} of {sorted(set(got))}"
                )
        if self.codec is not None and self.codec.heads != self.heads:
            raise ValueError(
                f"{self.name} has {self.heads} heads, the codec is for {self.codec.heads}"
            )

    def _check_parts(self) -> None:
        """Types of masks and codec; a list of masks becomes a tuple."""
        masks = self.masks
        if masks is not None:
            right = isinstance(masks, list | tuple)
            if not right or any(not isinstance(mask, PolarizedMask) for mask in masks):
                raise ValueError(
                    f"masks must be None or a PolarizedMask for each head of {self.name}, got "
                    f"{masks!r}"
                )
            object.__setattr__(self, "masks", tuple(masks))
        if self.codec is not None and not isinstance(self.codec, HeadCodec):
            raise ValueError(f"codec must be None or a HeadCodec, got {self.codec!r}")

    @property
    def entries(self) -> int:
        """Score entries of a dense computation, all heads and windows."""
        return self.windows * self.heads * self.queries * self.keys

    @property
    def kept(self) -> int:
        """Score entries that the masks keep, all heads and windows."""
        if self.masks is None:
            return self.entries
        return self.windows * sum(mask.kept for mask in self.masks)

    @property
    def codec_macs(self) -> int:
        """Encoding and decoding every q and k vector once."""
        if self.codec is None:
            return 0
        vectors = self.windows * (self.queries + self.keys)
        return 2 * self.codec.macs(vectors, self.key_dim)

    @property
    def macs(self) -> int:
        return self.kept * (self.key_dim + self.value_dim) + self.codec_macs

    @property
    def params(self) -> int:
        return self.bias_params + (2 * self.codec.params_per_side if self.codec else 0)

    @property
    def activations(self) -> int:
        """As a counter of the two products sees it: the scores kept and the output."""
        return self.kept + self.elements_written

    @property
    def elements_read(self) -> int:
        vectors = self.windows * self.heads
        ratio_heads = self.codec.latent_heads if self.codec else self.heads
        q_and_k = self.windows * ratio_heads * (self.queries + self.keys) * self.key_dim
        return q_and_k + vectors * self.keys * self.value_dim + self.params

    @property
    def elements_written(self) -> int:
        return self.windows * self.heads * self.queries * self.value_dim


Op: TypeAlias = Gemm | Conv | Deform | Elementwise | Unknown | Unused | Attention
"""Any operation. Each has a ``name`` and answers, in elements for one image:

macs             multiply-accumulates
params           learned parameters, biases included
activations      elements written by products (fast-scaling paper section 3: the
                 output of convolutions and linear layers; 0 for the rest)
elements_read    activations and parameters read, each once
elements_written results written
"""
