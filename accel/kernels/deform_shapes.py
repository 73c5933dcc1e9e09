"""The geometry of a deformable operator, checked: what all of its kernels share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Pair = int | tuple[int, int]
"""One number for both axes, or (height, width)."""


@dataclass(frozen=True)
class Geometry:
    """Where an operator samples; (height, width) pairs. Raises ValueError where it cannot be.

    Sample k = a * kernel height + b of output point (row, column) stands at pixel
    x = column * stride + first + offset_scale * (lattice + dx), y alike.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    offset_scale: float
    remove_center: bool

    def __post_init__(self) -> None:
        for name, least in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            pair = getattr(self, name)
            if len(pair) != 2 or min(pair) < least:
                raise ValueError(f"{name} must be a (height, width) of {least} or more, got {pair}")
        if self.groups < 1:
            raise ValueError(f"groups must be 1 or more, got {self.groups}")
        height, width = self.kernel
        if self.remove_center and (height != width or height % 2 == 0):
            raise ValueError(f"remove_center needs an odd square kernel, got {height} x {width}")

    @property
    def samples(self) -> int:
        return self.kernel[0] * self.kernel[1] - self.remove_center

    @property
    def half(self) -> tuple[int, int]:
        """From the kernel's first sample to its middle, in pixels."""
        down, along = (d * (k - 1) // 2 for d, k in zip(self.dilation, self.kernel, strict=True))
        return down, along

    @property
    def first(self) -> tuple[int, int]:
        """The pixel under the kernel's middle for output point (0, 0)."""
        down, along = (h - p for h, p in zip(self.half, self.padding, strict=True))
        return down, along

    @property
    def lattice(self) -> list[tuple[int, int]]:
        """(x, y) of every sample from the kernel's middle, in the operator's order: the
        horizontal index is the slow one."""
        (height, width), (half_y, half_x) = self.kernel, self.half
        down, along = self.dilation
        places = [
            (a * along - half_x, b * down - half_y) for a in range(width) for b in range(height)
        ]
        if self.remove_center:
            del places[len(places) // 2]
        return places

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Output (rows, columns) for a map of ``height`` and ``width``."""
        rows, columns = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(
                (height, width), self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        if rows < 1 or columns < 1:
            raise ValueError(
                f"a map of {height} x {width} is smaller than the kernel {self.kernel} with "
                f"dilation {self.dilation} and padding {self.padding}"
            )
        return rows, columns


def pair(value: Pair) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return tuple(value)  # pyright: ignore[reportReturnType]  # `Geometry` refuses other lengths


def check_tensors(value: Tensor, others: dict[str, Tensor]) -> None:
    """One device and one floating type for all. Raises ValueError with those given."""
    if not value.dtype.is_floating_point:
        raise ValueError(f"value must be of a floating type, got {value.dtype}")
    for name, tensor in others.items():
        if tensor.dtype != value.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and value {value.dtype}: they must agree")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device} and value on {value.device}")


def check_value(value: Tensor, geometry: Geometry) -> tuple[int, int, int]:
    """(batch, rows, columns) of the output. Raises ValueError for shapes that do not fit."""
    if value.ndim != 4 or value.shape[-1] % geometry.groups or value.shape[-1] == 0:
        raise ValueError(
            f"value must be [batch, height, width, channels] with channels divisible by "
            f"groups = {geometry.groups}, got {tuple(value.shape)}"
        )
    return value.shape[0], *geometry.out_size(*value.shape[1:3])


def check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...], geometry: Geometry) -> None:
    if tuple(tensor.shape) != wanted:
        raise ValueError(
            f"{geometry.groups} groups of {geometry.samples} samples need {name} of shape "
            f"{wanted}, got {tuple(tensor.shape)}"
        )


def check_merged(offset_mask: Tensor, place: tuple[int, ...], geometry: Geometry) -> None:
    least = 3 * geometry.groups * geometry.samples
    shape = tuple(offset_mask.shape)
    if len(shape) != 4 or shape[:3] != place or shape[3] < least:
        raise ValueError(
            f"{geometry.groups} groups of {geometry.samples} samples need offset_mask of shape "
            f"{(*place, least)} or wider, got {shape}"
        )
