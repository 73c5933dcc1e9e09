"""Vision models, their weights, where their attention is, and what they cost."""

from typing import TYPE_CHECKING

from .attention.calls import AttentionCall, find_attention
from .attention.intercept import AttentionHook, Handle, intercept
from .costs.complexity import Complexity, complexity
from .costs.trace import trace
from .families.conv_layers import fuse
from .features import features, prefix_tokens
from .registry import create, create_for, names
from .replace import replace_attention, replace_depthwise
from .saliency import SaliencyDecoder
from .weights.load import LoadReport, load_weights

if TYPE_CHECKING:
    from .scaling import scale

__all__ = [
    "AttentionCall",
    "AttentionHook",
    "Complexity",
    "Handle",
    "LoadReport",
    "SaliencyDecoder",
    "complexity",
    "create",
    "create_for",
    "features",
    "find_attention",
    "fuse",
    "intercept",
    "load_weights",
    "names",
    "prefix_tokens",
    "replace_attention",
    "replace_depthwise",
    "scale",
    "trace",
]


def __getattr__(name: str) -> object:
    """`scale` brings the networks it scales along: it is loaded when it is asked for."""
    if name == "scale":
        from .scaling import scale

        return scale
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
