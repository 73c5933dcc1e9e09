"""A trained codec for the simulator with data: `QKCodec` -> the `CodecWeights` of Q and of K."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..accel import CodecWeights
from ..ae import HeadLinear, QKCodec


def codec_weights(codec: QKCodec) -> tuple[CodecWeights, CodecWeights]:
    """Of Q and of K, in float64, for `sievit.accel.simulate_attention`.

    Raises ValueError for a codec that carries a rotation: the machine has none, `fold` it
    into the projections first.
    """
    if codec.rotation is not None or codec.key_shift is not None:
        raise ValueError(
            "the codec carries a rotation of the heads, which the machine does not compute: "
            "fold it into the model's projections first (sievit.ae.fold)"
        )
    return (
        CodecWeights(codec.shape, *_of(codec.encoder_q), *_of(codec.decoder_q)),
        CodecWeights(codec.shape, *_of(codec.encoder_k), *_of(codec.decoder_k)),
    )


def _of(side: HeadLinear) -> tuple[np.ndarray, np.ndarray]:
    return _array(side.weight), _array(side.bias)


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()
