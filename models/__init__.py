"""Vision models, their weights, where their attention is, and what they cost."""

from .features import features, prefix_tokens
from .registry import create, names
from .saliency import SaliencyDecoder
from .weights import LoadReport, load_weights

__all__ = [
    "LoadReport",
    "SaliencyDecoder",
    "create",
    "features",
    "load_weights",
    "names",
    "prefix_tokens",
]
