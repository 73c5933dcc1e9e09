"""RegNetX, RegNetY and RegNetZ (CVPR 2020, arXiv 2003.13678; Z: arXiv 2106.14881).

Stages of bottleneck blocks whose widths and depths follow one quantised line. A network
is described by its stages (`RegNetConfig`), which is what scaling works on; the generator
`regnet_config` makes the stages from the line. State-dict names are those of the weights
that the authors released.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..weights.timm_names import renamed
from .conv_layers import StagedNet, stage_of

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


@dataclass(frozen=True)
class RegNetConfig:
    """A network of bottleneck stages; one entry a stage in every tuple.

    ``bottlenecks`` is the inner width over the output width, ``group_widths`` the channels
    of a group of the 3x3 convolution. ``linear`` blocks (RegNetZ) end without activation
    and have a shortcut only where the shape stays, never a projection. ``pooled_stem`` is
    the 7x7 convolution with max pool of a ResNet in place of one 3x3 convolution.
    ``head_width`` 0 leaves the last 1x1 convolution out. ``image_size`` in pixels.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    group_widths: tuple[int, ...]
    bottlenecks: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    strides: tuple[int, ...] = (2, 2, 2, 2)
    stem_width: int = 32
    pooled_stem: bool = False
    head_width: int = 0
    se_ratio: float = 0.0
    linear: bool = False
    activation: str = "relu"
    image_size: int = 224

    def __post_init__(self) -> None:
        stages = (self.widths, self.group_widths, self.bottlenecks, self.strides)
        if any(len(entries) != len(self.depths) for entries in stages):
            raise ValueError(f"every stage needs one entry in each tuple, got {self}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {tuple(ACTIVATIONS)}, got {self.activation!r}"
            )
        for width, inner, group in zip(
            self.widths, self.inner_widths, self.group_widths, strict=True
        ):
            if inner % group:
                raise ValueError(
                    f"inner width {inner} of a stage of width {width} is no multiple of the "
                    f"group width {group}"
                )

    @property
    def inner_widths(self) -> tuple[int, ...]:
        """Channels of the 3x3 convolution, by stage."""
        pairs = zip(self.widths, self.bottlenecks, strict=True)
        return tuple(round(width * bottleneck) for width, bottleneck in pairs)


def compatible(width: int, bottleneck: float, group_width: int) -> tuple[int, int]:
    """(width, group width) near the given ones at which the groups divide the inner width.

    The group is first cut down to the inner width, then the inner width is rounded to a
    multiple of the group, and for a bottleneck above 1 of the bottleneck as well.
    """
    inner = max(1, int(width * bottleneck))
    group = min(group_width, inner)
    multiple = math.lcm(group, int(bottleneck)) if bottleneck > 1 else group
    inner = max(multiple, round(inner / multiple) * multiple)
    return int(inner / bottleneck), group


def regnet_config(
    depth: int,
    w0: int,
    wa: float,
    wm: float,
    group_width: int,
    bottleneck: float = 1.0,
    se_ratio: float = 0.0,
    head_width: int = 0,
    linear: bool = False,
    activation: str = "relu",
    image_size: int = 224,
) -> RegNetConfig:
    """The stages of a RegNet from its line (paper section 3.3, equations 2 to 4).

    Block j has the ideal width w0 + wa * j, quantised to w0 * wm**k for whole k and then to
    a multiple of 8; blocks of one width form a stage.
    """
    if w0 <= 0 or w0 % 8 or wa < 0 or wm <= 1:
        raise ValueError(
            f"a RegNet needs w0 > 0 divisible by 8, wa >= 0 and wm > 1, got {w0}, {wa}, {wm}"
        )
    steps = [round(math.log((w0 + wa * j) / w0) / math.log(wm)) for j in range(depth)]
    blocks = [round(w0 * wm**step / 8) * 8 for step in steps]
    stages = sorted(set(blocks))
    fitted = [compatible(width, bottleneck, group_width) for width in stages]
    return RegNetConfig(
        depths=tuple(blocks.count(width) for width in stages),
        widths=tuple(width for width, _ in fitted),
        group_widths=tuple(group for _, group in fitted),
        bottlenecks=(bottleneck,) * len(stages),
        strides=(2,) * len(stages),
        head_width=head_width,
        se_ratio=se_ratio,
        linear=linear,
        activation=activation,
        image_size=image_size,
    )


class SqueezeExcite(nn.Module):
    """Channel gates from the pooled map; both 1x1 convolutions have a bias."""

    def __init__(self, width: int, hidden: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.f_ex = nn.Sequential(
            nn.Conv2d(width, hidden, 1), activation(), nn.Conv2d(hidden, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.f_ex(x.mean((2, 3), keepdim=True))


class Transform(nn.Module):
    """1x1, grouped 3x3, squeeze-excite where there is one, 1x1; batch norm after each."""

    def __init__(
        self, inputs: int, width: int, inner: int, group: int, stride: int, config: RegNetConfig
    ) -> None:
        super().__init__()
        activation = ACTIVATIONS[config.activation]
        self.a = nn.Conv2d(inputs, inner, 1, bias=False)
        self.a_bn = nn.BatchNorm2d(inner)
        self.a_af = activation()
        self.b = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner // group, bias=False)
        self.b_bn = nn.BatchNorm2d(inner)
        self.b_af = activation()
        hidden = round(inputs * config.se_ratio)
        self.se = SqueezeExcite(inner, hidden, activation) if hidden else nn.Identity()
        self.c = nn.Conv2d(inner, width, 1, bias=False)
        self.c_bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a_af(self.a_bn(self.a(x)))
        x = self.b_af(self.b_bn(self.b(x)))
        return self.c_bn(self.c(self.se(x)))


class Block(nn.Module):
    """activation(shortcut(x) + f(x)); a linear block is x + f(x), or f(x) at a new shape."""

    def __init__(
        self, inputs: int, width: int, inner: int, group: int, stride: int, config: RegNetConfig
    ) -> None:
        super().__init__()
        same = inputs == width and stride == 1
        self.skip = same or not config.linear
        self.proj = self.bn = None
        if self.skip and not same:
            self.proj = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.bn = nn.BatchNorm2d(width)
        self.f = Transform(inputs, width, inner, group, stride, config)
        self.af = nn.Identity() if config.linear else ACTIVATIONS[config.activation]()

    def forward(self, x: Tensor) -> Tensor:
        if not self.skip:
            return self.f(x)
        shortcut = x
        if self.proj is not None and self.bn is not None:
            shortcut = self.bn(self.proj(x))
        return self.af(shortcut + self.f(x))


class Stem(nn.Module):
    """3x3 convolution of stride 2, batch norm, activation."""

    def __init__(self, inputs: int, width: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.af = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.af(self.bn(self.conv(x)))


class Head(nn.Module):
    """A 1x1 convolution where ``hidden`` is not 0, average pool, classifier."""

    def __init__(
        self, inputs: int, hidden: int, num_classes: int, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.conv = self.bn = self.af = None
        if hidden:
            self.conv = nn.Conv2d(inputs, hidden, 1, bias=False)
            self.bn = nn.BatchNorm2d(hidden)
            self.af = activation()
        self.fc = nn.Linear(hidden or inputs, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None and self.bn is not None and self.af is not None:
            x = self.af(self.bn(self.conv(x)))
        return self.fc(x.mean((2, 3)))


class RegNet(StagedNet):
    """Images [batch, 3, h, w] -> logits [batch, num_classes], for any h and w.

    ``num_classes=0`` returns the pooled features.
    """

    def __init__(self, config: RegNetConfig, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        if config.pooled_stem:
            raise ValueError(
                "a pooled stem belongs to a ResNet: sievit.models.families.resnet.ResNet"
            )
        self.config, self.image_size = config, config.image_size
        activation = ACTIVATIONS[config.activation]
        self.stem = Stem(in_channels, config.stem_width, activation)
        width = config.stem_width
        for index, stage in enumerate(config.widths):
            self.add_module(f"s{index + 1}", _stage(config, index, width))
            width = stage
        self.head = Head(width, config.head_width, num_classes, activation)
        self.apply(init_weights)

    def translate_weights(
        self, stored: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Also timm's names, for `load_weights`."""
        return renamed(stored, TIMM_NAMES)


def _stage(config: RegNetConfig, index: int, inputs: int) -> nn.Sequential:
    width, inner = config.widths[index], config.inner_widths[index]
    group, stride = config.group_widths[index], config.strides[index]
    blocks = []
    for _ in range(config.depths[index]):
        blocks.append(Block(inputs, width, inner, group, stride, config))
        inputs, stride = width, 1
    return stage_of(blocks)


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """First values: convolutions by their fan-out, the classifier small.

    A group's own outputs count, not all outputs as in the authors' code: there depthwise
    networks vanish until batch norm has seen data.
    """
    if isinstance(module, nn.Conv2d):
        outputs = module.out_channels // module.groups
        fan_out = module.kernel_size[0] * module.kernel_size[1] * outputs
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


TIMM_NAMES = (
    (r"\.conv1\.conv\.", ".f.a."),
    (r"\.conv1\.bn\.", ".f.a_bn."),
    (r"\.conv2\.conv\.", ".f.b."),
    (r"\.conv2\.bn\.", ".f.b_bn."),
    (r"\.conv3\.conv\.", ".f.c."),
    (r"\.conv3\.bn\.", ".f.c_bn."),
    (r"\.se\.fc1\.", ".f.se.f_ex.0."),
    (r"\.se\.fc2\.", ".f.se.f_ex.2."),
    (r"\.downsample\.conv\.", ".proj."),
    (r"\.downsample\.bn\.", ".bn."),
    (r"^final_conv\.", "head."),
)

LINES = {  # depth, w0, wa, wm, group width (paper appendix; Y from 500 MF on as released)
    "regnetx_002": (13, 24, 36.44, 2.49, 8),
    "regnetx_004": (22, 24, 24.48, 2.54, 16),
    "regnetx_006": (16, 48, 36.97, 2.24, 24),
    "regnetx_008": (16, 56, 35.73, 2.28, 16),
    "regnetx_016": (18, 80, 34.01, 2.25, 24),
    "regnetx_032": (25, 88, 26.31, 2.25, 48),
    "regnetx_040": (23, 96, 38.65, 2.43, 40),
    "regnetx_064": (17, 184, 60.83, 2.07, 56),
    "regnetx_080": (23, 80, 49.56, 2.88, 120),
    "regnetx_120": (19, 168, 73.36, 2.37, 112),
    "regnetx_160": (22, 216, 55.59, 2.1, 128),
    "regnetx_320": (23, 320, 69.86, 2.0, 168),
    "regnety_002": (13, 24, 36.44, 2.49, 8),
    "regnety_004": (16, 48, 27.89, 2.09, 8),
    "regnety_006": (15, 48, 32.54, 2.32, 16),
    "regnety_008": (14, 56, 38.84, 2.4, 16),
    "regnety_016": (27, 48, 20.71, 2.65, 24),
    "regnety_032": (21, 80, 42.63, 2.66, 24),
    "regnety_040": (22, 96, 31.41, 2.24, 64),
    "regnety_064": (25, 112, 33.22, 2.27, 72),
    "regnety_080": (17, 192, 76.82, 2.19, 56),
    "regnety_120": (19, 168, 73.36, 2.37, 112),
    "regnety_160": (18, 200, 106.23, 2.48, 112),
    "regnety_320": (20, 232, 115.89, 2.53, 232),
}
_Z = {"bottleneck": 4, "se_ratio": 0.25, "linear": True, "activation": "silu"}

CONFIGS: dict[str, RegNetConfig] = {
    name: regnet_config(*line, se_ratio=0.25 if name.startswith("regnety") else 0.0)
    for name, line in LINES.items()
} | {
    # The widths of the last convolution are timm's: no release of the authors states them.
    "regnetz_005": regnet_config(21, 16, 10.7, 2.51, 4, head_width=1024, **_Z),
    "regnetz_040": regnet_config(28, 48, 14.5, 2.226, 8, head_width=0, image_size=256, **_Z),
    "regnetz_040_h": regnet_config(28, 48, 14.5, 2.226, 8, head_width=1536, image_size=256, **_Z),
}

MODELS: dict[str, Callable[..., nn.Module]] = {
    name: partial(RegNet, config=config) for name, config in CONFIGS.items()
}
