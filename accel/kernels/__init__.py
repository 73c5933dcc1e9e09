"""Attention on real processors: the only part of `sievit.accel` that imports torch."""

from .measure import MeasuredAttention, measure_attention

__all__ = ["MeasuredAttention", "measure_attention"]
