"""One co-design run: a pretrained ViT in, masks, codecs, fidelity and simulated silicon out.

`settings` say what decides its figures, `stages` what is done, `codesign` in which order;
`train` is the training in full; `networks` costs registered networks without photos. What is
left on disk is a `result` or a `sparse_model`, with `attachments` beside the weights."""

from ..moved import old_names
from .attachments import Attachments
from .codec_weights import codec_weights
from .codesign import codesign, learn_mask, learn_mask_within, learn_masks
from .result import CodesignResult
from .settings import Settings

__all__ = [
    "Attachments",
    "CodesignResult",
    "Settings",
    "codec_weights",
    "codesign",
    "learn_mask",
    "learn_mask_within",
    "learn_masks",
]

__getattr__ = old_names(__name__)
