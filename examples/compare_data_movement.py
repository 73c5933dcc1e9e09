"""Where the bytes of attention go, with and without the codec over the heads of Q and K.

python examples/compare_data_movement.py [MASK.npz or ViTCoD's MASK.npy] [MODEL]
"""

import sys

from sievit.accel import Schedule, simulate
from sievit.ae import latent_heads_for
from sievit.models import create, trace
from sievit.workload import AttentionMask, HeadCodec


def main(mask_path: str | None = None, model: str = "deit_tiny") -> None:
    workload = trace(create(model))
    mask = AttentionMask.load(mask_path) if mask_path else None  # None: nothing is pruned
    heads = workload.attention[0].heads
    codec = HeadCodec(heads, latent_heads_for(heads))  # ViTCoD: half the heads, rounded up

    workloads = workload.with_attention(mask), workload.with_attention(mask, codec)
    print(f"{model}, DRAM bytes of attention, codec {codec.heads} -> {codec.latent_heads} heads")
    for words, schedule in (
        ("all of Q, K and V goes to DRAM and comes back", Schedule(on_chip="nothing")),
        ("what fits stays on chip after the projection", Schedule()),
    ):
        plain, coded = (simulate(each, schedule=schedule) for each in workloads)
        print(f"\n{words}:")
        sides = [
            {row.tensor: row.total_bytes for row in report.traffic() if row.level == "dram"}
            for report in (plain, coded)
        ]
        for tensor in dict.fromkeys([*sides[0], *sides[1]]):
            print(f"{tensor:>14}: {sides[0].get(tensor, 0):>10,} -> {sides[1].get(tensor, 0):>10,}")
        print(f"{'all':>14}: {plain.dram_bytes():>10,} -> {coded.dram_bytes():>10,}")
        print(f"attention cycles: {plain.attention_cycles:,} -> {coded.attention_cycles:,}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
