"""The released script's figures: exactly those it prints, and its loops on other masks."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.accel import presets, simulate
from sievit.workload import Attention, AttentionMask, HeadCodec, Workload, polarize_head

MACHINE = presets["vitcod"]
GIB = 76.8 * 1024**3 / 500e6  # bytes a cycle


def network(mask: AttentionMask, codec: HeadCodec | None, dim: int = 64) -> Workload:
    ops = tuple(
        Attention(
            f"blocks.{index}",
            len(layer),
            layer.shape[1],
            layer.shape[2],
            dim,
            dim,
            masks=tuple(polarize_head(head) for head in layer),
            codec=codec,
        )
        for index, layer in enumerate(mask.keep)
    )
    return Workload("deit", ops)


@pytest.fixture(scope="module")
def published(golden) -> AttentionMask:
    return AttentionMask.load(golden("vitcod-deit-tiny-masks/info_0.95.npy"))


def test_published_figures(published):
    report = simulate(network(published, HeadCodec(3, 2)), simulator="released")
    attention, dense = report.ops
    assert dict(attention.details) == {
        "preloading": 9492,
        "processing": 4728,
        "computation": 4709,
    }
    assert report.attention_cycles == 9492
    assert dense.phases == {"linear": 681_492, "ffn": 1_361_664}
    assert dense.details["linear preloading"] == 23_304
    assert dense.cycles == 2_043_156
    assert report.cycles == 2_052_648
    assert report.seconds == pytest.approx(4.105296e-3)


def test_without_codec_only_loading_changes(published):
    (attention, _) = simulate(network(published, None), simulator="released").ops
    assert attention.cycles == attention.details["preloading"] == 14_220
    assert attention.details["processing"] == 4728
    assert attention.details["computation"] == 4709


def script(keep: np.ndarray, ratio: float, dim: int, width: int = 64) -> tuple[int, int, int]:
    """(preloading, processing, computation) the way the script counts: one by one."""
    loads = decodes = computes = 0
    for layer in keep:
        heads, tokens = len(layer), layer.shape[1]
        kept = layer[0].sum(axis=0)
        hot = int((kept > 50).sum())
        entries = int(kept[kept <= 50].sum())
        decode = len(range(0, ceil(heads * ratio * dim / int(width * width / heads))))
        for part in (hot, tokens, tokens - hot):  # denser K, Q, sparser K
            for vector in range(part):
                loads += ceil(heads * ratio * dim / GIB)
                loads += ceil(heads * ratio / (GIB / heads)) if vector == 0 else 0
                decodes += decode
        for _ in range(tokens):
            loads += ceil(heads * dim / GIB)
        wide = int(width * (hot * tokens / (entries + hot * tokens)))
        narrow = width - wide
        steps = ceil(dim / (width / heads))
        dense_scores = sum(steps for _ in range(hot) for _ in range(ceil(tokens / wide)))
        computes += max(dense_scores, steps * ceil(entries / narrow))
        dense_values = ceil(tokens * dim * hot / int(wide * width / heads))
        computes += max(dense_values, ceil(entries * dim / int(narrow * width / heads)))
    return loads, decodes, computes


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 3, 6]),
    tokens=st.integers(60, 90),
    dim=st.sampled_from([16, 32, 64]),
    hot=st.integers(2, 20),
    density=st.floats(0.02, 0.4),
    seed=st.integers(0, 99),
)
def test_equals_the_scripts_loops(heads, tokens, dim, hot, density, seed):
    generator = np.random.default_rng(seed)
    keep = generator.random((3, heads, tokens, tokens)) < density
    keep[..., :hot] = True
    codec = HeadCodec(heads, max(heads // 2, 1))
    workload = network(AttentionMask(tuple(keep)), codec, dim)
    details = simulate(workload, simulator="released").ops[0].details
    assert tuple(details.values()) == script(keep, codec.ratio, dim)


def test_a_long_network_loads_ffn_weights():
    tokens, heads, dim = 600, 2, 16
    keep = np.zeros((heads, tokens, tokens), dtype=bool)
    keep[:, :, :30], keep[:, 0] = True, True
    workload = network(AttentionMask((keep,)), HeadCodec(2, 1), dim)
    dense = simulate(workload, simulator="released").ops[1]
    embed = heads * dim
    once = 4 * embed * ceil(embed / GIB) + embed * ceil(4 * embed / GIB)
    assert dense.details["ffn preloading"] == 600 // 512 * once
    assert dense.details["linear preprocessing"] == 2 * tokens * (embed // 512)


def masked(keep: np.ndarray, **changes) -> Workload:
    workload = network(AttentionMask((keep,)), HeadCodec(3, 2))
    return replace(workload, ops=(replace(workload.ops[0], **changes),))


@pytest.mark.parametrize(
    ("hot", "rest", "lines", "message"),
    [
        (0, 0.1, 64, "0 global keys"),
        (5, 0.0, 64, "0 kept entries beside"),
        (197, 0.0, 64, "0 kept entries beside"),
        (1, 0.18, 32, "0 lines of the denser engine"),
        (1, 0.01, 1, "0 decoder lanes"),
    ],
)
def test_refuses_what_the_script_divides_by(hot, rest, lines, message):
    keep = np.random.default_rng(0).random((3, 197, 197)) < rest
    keep[..., :hot] = True
    with pytest.raises(ValueError, match=rf"blocks\.0.*{message}"):
        simulate(masked(keep), replace(MACHINE, lines=lines), "released")


def test_refuses_a_buffer_exactly_full_of_global_keys():
    keep = np.random.default_rng(0).random((16, 197, 197)) < 0.02
    keep[..., :53] = True  # 53 KB of K hold 53 keys of 16 heads x 64
    workload = network(AttentionMask((keep,)), HeadCodec(16, 8))
    with pytest.raises(ValueError, match="keys that fit less global"):
        simulate(workload, simulator="released")


def test_refuses_a_narrow_machine(published):
    with pytest.raises(ValueError, match=r"divides by zero at blocks\.0"):
        simulate(network(published, None), replace(MACHINE, lines=8), "released")


def test_refuses_what_the_script_cannot_express(published):
    workload = network(published, None)
    with pytest.raises(ValueError, match="one image, got batch 2"):
        simulate(workload, simulator="released", batch=2)
    dense = replace(workload, ops=(replace(workload.ops[0], masks=None),))
    with pytest.raises(ValueError, match=r"needs masks, blocks\.0 has none"):
        simulate(dense, simulator="released")
    wide = replace(workload, ops=(replace(workload.ops[0], value_dim=32),))
    with pytest.raises(ValueError, match="dims 64 and 32"):
        simulate(wide, simulator="released")
    with pytest.raises(ValueError, match="no attention"):
        simulate(Workload("mlp", ()), simulator="released")
