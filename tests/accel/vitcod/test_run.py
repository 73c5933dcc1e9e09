"""Heads' shares of a stepped call sum to the call, and waits are named in words."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from sievit.accel import presets, simulate
from sievit.accel.report.report import HeadCost, OpCost
from sievit.accel.schedule import LATENTS, Schedule
from sievit.accel.vitcod.core.registers import STALLS
from sievit.accel.vitcod.run import run_attention
from sievit.accel.vitcod.simulate import cost_of
from sievit.accel.vitcod.stepped import WAITS, head_costs
from sievit.workload import Attention, Gemm, HeadCodec, Workload, polarize_head

SMALL = replace(
    presets["vitcod"], lines=8, q_buffer_bytes=2048, k_buffer_bytes=2048, output_buffer_bytes=4096
)


def attention(heads=4, tokens=24, codec=None, seed=0) -> Attention:
    generator = np.random.default_rng(seed)
    masks = []
    for head in range(heads):
        keep = generator.random((tokens, tokens)) < 0.1 + 0.1 * head
        keep[:, head] = keep[0] = True
        masks.append(polarize_head(keep, tokens // 2))
    return Attention("attn", heads, tokens, tokens, 16, 16, masks=tuple(masks), codec=codec)


CALLS = {
    "plain": (attention(), 1),
    "two images": (attention(seed=1), 2),
    "codec over all heads": (attention(codec=HeadCodec(4, 3)), 1),
    "codec in two blocks": (attention(codec=HeadCodec(4, 2, 2)), 2),
    "dense": (Attention("attn", 2, 12, 20, 16, 24), 1),
}


@pytest.mark.parametrize(("op", "batch"), CALLS.values(), ids=CALLS)
def test_heads_sum_to_the_call(op, batch):
    run = run_attention(op, SMALL, batch)
    cost = cost_of(run, batch)
    heads = head_costs(run)
    assert cost.heads == heads
    assert [head.head for head in heads] == list(range(op.heads))
    assert sum(head.cycles for head in heads) + run.trace.count("tail_cycles") == cost.cycles
    for name in cost.stalls:
        assert sum(head.stalls.get(name, 0) for head in heads) == cost.stalls[name]
    for head in heads:
        assert sum(head.stalls.values()) == SMALL.lines * head.cycles
    assert sum(head.dram_bytes for head in heads) == cost.dram_bytes
    assert sum(head.kept_scores for head in heads) == op.kept * batch
    assert sum(head.scores for head in heads) == run.counts.scores


@pytest.mark.parametrize(("op", "batch"), CALLS.values(), ids=CALLS)
def test_bytes_of_a_head_are_what_it_loads_and_stores(op, batch):
    """A twin, transfer by transfer."""
    for latents in LATENTS:
        check_bytes(run_attention(op, SMALL, batch, Schedule(latents=latents), 700))


def check_bytes(run):
    op = run.op
    units, expected = list(run.mapping.units(run.instances)), [0.0] * op.heads
    for channel in range(7):
        first, last = run.program.channel_first[channel : channel + 2]
        for number, transfer in enumerate(run.program.transfers[first:last]):
            if channel == 5:
                owners = [units[number][1]]
            elif channel == 4:
                owners = range(op.heads)
            else:
                head = units[run.program.stages[transfer["need"]]["unit"]][1]
                group = run.mapping.group if channel < 2 else 1
                if channel == 6:
                    group = op.heads // op.codec.groups
                owners = range(head - head % group, head - head % group + group)
            for owner in owners:
                expected[owner] += int(transfer["bytes"]) / len(owners)
    found = [head.dram_bytes for head in head_costs(run)]
    assert found == pytest.approx(expected, abs=4)  # four tensors are split, to a byte each


def test_every_wait_of_the_engine_has_a_name():
    assert set(WAITS) >= set(STALLS) - {"busy"}
    words = [name for pair in WAITS.values() for name in dict.fromkeys(pair)]
    assert len(set(words)) == len(words)


def test_the_report_carries_heads_busy_and_bottleneck():
    workload = Workload("small", (Gemm("qkv", 24, 64, 192), attention()))
    report = simulate(workload, SMALL)
    stored = json.loads(json.dumps(report.to_dict()))
    assert [head["head"] for head in stored["ops"][1]["heads"]] == [0, 1, 2, 3]
    assert stored["ops"][0]["heads"] == []
    assert stored["network"]["busy"]["MAC lines"] == sum(op.busy["MAC lines"] for op in report.ops)
    shares = report.busy_shares()
    name = report.attention[0].bottleneck
    assert shares[name] == max(shares.values())
    assert report.bottleneck() == f"{name} {shares[name]:.0%}"
    assert OpCost("nothing", "dense", 0, {}, 0, 0).bottleneck == "-"
    with pytest.raises(ValueError, match=r"head 2: phases .* do not sum to 3"):
        HeadCost(2, 3, {"sddmm": 1}, {}, 0, 0, 0, 0)
