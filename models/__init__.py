"""Vision models, their weights, where their attention is, and what they cost."""

from .attention import AttentionCall, find_attention
from .complexity import Complexity, complexity
from .features import features, prefix_tokens
from .intercept import AttentionHook, Handle, intercept
from .registry import create, names
from .saliency import SaliencyDecoder
from .trace import trace
from .weights import LoadReport, load_weights

__all__ = [
    "AttentionCall",
    "AttentionHook",
    "Complexity",
    "Handle",
    "LoadReport",
    "SaliencyDecoder",
    "complexity",
    "create",
    "features",
    "find_attention",
    "intercept",
    "load_weights",
    "names",
    "prefix_tokens",
    "trace",
]
