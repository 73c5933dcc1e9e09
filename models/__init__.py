"""Vision models, their weights, where their attention is, and what they cost."""

from .registry import create, names

__all__ = ["create", "names"]
