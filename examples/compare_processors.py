"""A network's attention on this computer, on logged and on modelled processors, beside ours.

python examples/compare_processors.py [MASK.npz or ViTCoD's MASK.npy] [MODEL]
"""

import sys

from sievit.accel import simulate
from sievit.models import create, trace
from sievit.pipeline.networks import sparse_workload
from sievit.studies.processors import beside, logs, modelled, timed_here
from sievit.workload import AttentionMask

HEADINGS = ("att. ms", "net. ms", "att. x", "net. x")


def main(mask_path: str | None = None, model: str = "deit_tiny") -> None:
    mask = AttentionMask.load(mask_path) if mask_path else 0.9  # 90 %, synthetic
    workload, about = sparse_workload(model, mask, latent_heads=0)
    network = create(model)
    report = simulate(workload)
    print(about)
    print(
        f"Simulated, batch {report.batch}: {report.attention_seconds * 1e3:.3f} ms attention, "
        f"{report.seconds * 1e3:.3f} ms network. An image elsewhere, and how many times longer:\n"
    )
    here = [
        row
        for batch in (1, 8)
        for row in timed_here(
            workload, network, batch=batch, kernels=("eager", "fused", "masked", "sparse")
        )
    ]
    dense = trace(network)  # what a processor without kernels for the mask computes
    print(*(f"{heading:>9}" for heading in HEADINGS), sep="")
    for row in beside(report, [*here, *logs(), *modelled(dense)]):
        times = (row.attention_seconds, row.network_seconds)
        factors = (row.attention_speedup, row.network_speedup)
        cells = [f"{t * 1e3:9.3f}" if t else "        -" for t in times]
        cells += [f"{f:9.2f}" if f else "        -" for f in factors]
        print(*cells, f"  {row.against.label}", sep="")


if __name__ == "__main__":
    main(*sys.argv[1:3])
