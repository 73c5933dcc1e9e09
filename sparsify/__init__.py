"""Fixed attention masks: learn, polarize, attach, evaluate and recover.

Floor plan: average attention (`average`) -> masks (`threshold` by one of the `rules`,
`budgeted_masks`) -> dense block and sparse rest (`reorder`) -> into a model (`adapt`) -> what is
left of its features (`fidelity`) -> recovery (`finetune`). The machine's integers in a model
stand in `int8`. Beside them two analyses of the EfficientViT paper: head similarity
(`similarity`) and Taylor pruning of channels (`taylor`); and synthetic maps for studies of
machines (`synthetic`).
"""

from ..moved import old_names
from .adapt import attach
from .average import average_attention
from .budgeted_masks import HardwareMask, budgeted_masks
from .controls import random_mask, window_mask
from .fidelity import Fidelity, accuracy, evaluate, fidelity, token_features
from .finetune import GradualMask, finetune, recover
from .int8 import attach_int8, calibrate_int8
from .reorder import polarize
from .rules import RULES
from .similarity import head_similarity
from .synthetic import synthetic_maps
from .taylor import prune, redistribute, taylor_importance
from .threshold import threshold

__all__ = [
    "RULES",
    "Fidelity",
    "GradualMask",
    "HardwareMask",
    "accuracy",
    "attach",
    "attach_int8",
    "average_attention",
    "budgeted_masks",
    "calibrate_int8",
    "evaluate",
    "fidelity",
    "finetune",
    "head_similarity",
    "polarize",
    "prune",
    "random_mask",
    "recover",
    "redistribute",
    "synthetic_maps",
    "taylor_importance",
    "threshold",
    "token_features",
    "window_mask",
]

__getattr__ = old_names(__name__)
