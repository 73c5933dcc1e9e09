"""Fixed attention masks: learn, polarize, attach, judge and recover.

Floor plan: average attention (`probe`) -> masks (`threshold`, `controls`) -> dense block
and sparse rest (`reorder`) -> into a model (`adapt`) -> what is left of its features
(`fidelity`) -> recovery (`finetune`).
"""

from .adapt import attach
from .controls import random_mask, window_mask
from .fidelity import Fidelity, fidelity, judge, token_features
from .finetune import recover
from .probe import average_attention
from .reorder import polarize
from .threshold import threshold

__all__ = [
    "Fidelity",
    "attach",
    "average_attention",
    "fidelity",
    "judge",
    "polarize",
    "random_mask",
    "recover",
    "threshold",
    "token_features",
    "window_mask",
]
