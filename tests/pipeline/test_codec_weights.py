"""A trained codec, from its file to the simulator with data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sievit.accel import simulate_attention
from sievit.accel.arithmetic import quantize
from sievit.accel.kernels.int8 import Int8Scales, int8_attention
from sievit.accel.vitcod.numbers.functional import coded_operands
from sievit.ae import QKCodec
from sievit.pipeline import Attachments, codec_weights
from sievit.workload import HeadCodec


def in_torch(q, k, v, weights, found) -> np.ndarray:
    """The same integers by `int8_attention`."""
    q, k, v = (quantize(x.double().numpy()) for x in (q, k, v))
    q, k = (side.operands for side in coded_operands(q, k, weights))
    ends = (q.scale, k.scale, v.scale, found.output.scale)
    values = (torch.from_numpy(x.values)[None] for x in (q, k, v))
    return int8_attention(*values, Int8Scales(*ends, found.score_shift))[0].numpy()


@pytest.mark.parametrize("groups", [1, 2])
def test_the_machine_computes_the_saved_codec(groups, tmp_path):
    generator = torch.Generator().manual_seed(0)
    codec = QKCodec(HeadCodec(4, 2, groups))
    for value in codec.parameters():
        value.data.copy_(0.3 * torch.randn(value.shape, generator=generator))
    Attachments(64, None, torch.nn.ModuleList([codec])).save(tmp_path / "a.safetensors")
    codec = Attachments.load(tmp_path / "a.safetensors").codecs[0]
    q, k, v = torch.randn(3, 4, 12, 8, generator=generator)
    weights = codec_weights(codec)
    found = simulate_attention(q.numpy(), k.numpy(), v.numpy(), codecs=weights)
    assert np.array_equal(found.output.values, in_torch(q, k, v, weights, found))
    with torch.no_grad():
        q, k = codec(q[None], k[None])
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v[None])[0].numpy()
    np.testing.assert_allclose(found.reference, wanted, atol=1e-5)
    steps = np.abs(found.output.real - wanted) / found.output.scale[:, None, None]
    assert steps.max() < 1.5  # half a step is rounding of the output, the rest of what is before


def test_a_rotation_must_be_folded_first():
    codec = QKCodec(HeadCodec(4, 2))
    codec.rotation = torch.eye(8).expand(4, 8, 8)
    with pytest.raises(ValueError, match=r"carries a rotation.*fold"):
        codec_weights(codec)
