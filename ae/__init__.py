"""Auto-encoders over the heads of Q and K: less to move, a little more to compute.

Floor plan: the module (`codec`) -> its closed-form weights and the free rotation of the heads
(`closed_form`) -> more latent heads where heads agree least (`budget`) -> into a model and
back (`adapt`) -> training (`train`) -> what they do to each layer (`errors`) -> the rotation
moved into the projections (`fold`).
"""

from .adapt import FittedCodecs, attach_codec, fit_codecs, head_moments
from .budget import latent_heads_by_layer
from .closed_form import ExplainedVariance, HeadMoments, fit_closed_form
from .codec import HeadLinear, QKCodec, latent_heads_for
from .errors import CodecErrors, codec_errors, mean_errors
from .fold import fold
from .train import Reconstruction, train_codec

__all__ = [
    "CodecErrors",
    "ExplainedVariance",
    "FittedCodecs",
    "HeadLinear",
    "HeadMoments",
    "QKCodec",
    "Reconstruction",
    "attach_codec",
    "codec_errors",
    "fit_closed_form",
    "fit_codecs",
    "fold",
    "head_moments",
    "latent_heads_by_layer",
    "latent_heads_for",
    "mean_errors",
    "train_codec",
]
