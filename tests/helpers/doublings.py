"""Random calls on random machines, and what twice of one field does to them.

    python tests/helpers/doublings.py SEED COUNT OBJECTIVE

prints each doubling after which the objective is more than 3 % worse.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import numpy as np

from sievit.accel.hardware import Hardware
from sievit.accel.report.energy import energy_pj
from sievit.accel.schedule import Schedule
from sievit.accel.vitcod.cost import cost_of
from sievit.accel.vitcod.run import run_attention
from sievit.workload import Attention, HeadCodec, polarize_head

FIELDS = {
    "lines": (4, 8, 15, 32, 64),
    "macs_per_line": (1, 4, 8),
    "q_buffer_bytes": (2000, 5000, 20_000, 54_272),
    "k_buffer_bytes": (2000, 5000, 20_000, 54_272),
    "v_buffer_bytes": (2000, 5000, 20_000, 54_272),
    "index_buffer_bytes": (2000, 6000, 20_480),
    "output_buffer_bytes": (9570, 30_000, 110_592),
    "other_buffer_bytes": (3000, 9000, 33_792),
    "q_banks": (1, 4, 8, 32),
    "k_banks": (1, 4, 8, 32),
    "v_banks": (1, 4, 8, 32),
    "output_banks": (4, 8, 32),
    "latent_banks": (4, 32),
    "index_entries_per_cycle": (1, 4, 8),
    "softmax_lanes": (1, 8, 32),
    "decoder_macs": (16, 64, 256),
    "dram_bytes_per_s": (262_000_000, 2_000_000_000, 9_600_000_000, 76_800_000_000),
}
"""Fields that are doubled, and the sizes that they have before."""


def random_call(rng: random.Random) -> Attention:
    """Up to 4 heads of up to 130 tokens; masks of any density, or none; a codec or none."""
    tokens = rng.choice([9, 20, 33, 55, 64, 90, 130])
    keys = tokens if rng.random() < 0.8 else rng.choice([9, 20, 60, 120])
    heads, dim = rng.choice([1, 2, 3, 4]), rng.choice([4, 8, 16, 32, 64])
    generator = np.random.default_rng(rng.randrange(10**9))
    keep = generator.random((heads, tokens, keys)) < rng.choice([0.05, 0.1, 0.2, 0.5, 1.0])
    keep[:, :, 0] = keep[:, 0] = True
    threshold = rng.choice([0.5, "none", "all", 0.8])
    masks = tuple(polarize_head(head, threshold) for head in keep) if rng.random() < 0.9 else None
    codec = HeadCodec(heads, max(heads // 2, 1)) if heads > 1 and rng.random() < 0.4 else None
    value_dim, windows = rng.choice([dim, 16]), rng.choice([1, 1, 2])
    return Attention("a", heads, tokens, keys, dim, value_dim, windows, masks, codec)


def random_machine(rng: random.Random) -> Hardware:
    """Sizes of `FIELDS`."""
    sizes = {name: rng.choice(values) for name, values in FIELDS.items()}
    clock = rng.choice([100_000_000, 500_000_000])
    return Hardware(**sizes, clock_hz=clock, score_bytes=rng.choice([1, 2]))


def worth(run, prices: Hardware) -> float:
    """What the schedule's objective counts of ``run``, energy at the prices of ``prices``: a
    larger buffer takes more for each access, which no schedule can help."""
    objective, cost = run.mapping.schedule.objective, cost_of(run, run.instances)
    if objective == "cycles":
        return run.cycles
    if objective == "bytes":
        return cost.dram_bytes
    energy = energy_pj(cost, prices)
    return energy if objective == "energy" else energy * run.cycles


def doublings(seed: int, count: int, objective: str):
    """(worth with twice the field over worth before, field) of random doublings; a call that the
    smaller machine refuses is left out, one that only the larger refuses counts as infinite."""
    rng, schedule = random.Random(seed), Schedule(objective=objective)
    for _ in range(count):
        op, hardware = random_call(rng), random_machine(rng)
        room, field = rng.choice([0, 0, 20_000, 10**6]), rng.choice(list(FIELDS))
        more = replace(hardware, **{field: 2 * getattr(hardware, field)})
        try:
            before = run_attention(op, hardware, 1, schedule, room)
        except ValueError:
            continue
        try:
            after = run_attention(op, more, 1, schedule, room)
        except ValueError:
            yield float("inf"), field
            continue
        yield worth(after, more) / max(worth(before, more), 1), field


if __name__ == "__main__":
    found = list(doublings(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
    worse = sorted((one for one in found if one[0] > 1.03), reverse=True)
    lines = [f"{len(worse)} of {len(found)} more than 3 % worse"]
    sys.stdout.write("\n".join([*lines, *(f"{ratio:.3f} {name}" for ratio, name in worse)]) + "\n")
