"""What ViTCoD (HPCA 2023, arXiv 2210.09573) published, figure by figure, as plain facts.

``read`` says where a figure was read: in the "paper" itself, in "notes" on the paper, or in
one "unconfirmed" place that names no table. Speed-ups are factors, shares are of latency.
"""

from __future__ import annotations

from dataclasses import dataclass

READ = ("paper", "notes", "unconfirmed")

MODELS = ("deit_tiny", "deit_small", "deit_base", "levit_128", "levit_192", "levit_256")
"""The six vision models whose mean is published, by our names."""

SPARSITIES = (0.6, 0.7, 0.8, 0.9)
"""The sparsities of the published mean."""


@dataclass(frozen=True)
class Published:
    """One figure; ``unit`` is "x", "share", "mm2" or "mW"."""

    key: str
    text: str
    value: float
    unit: str
    read: str

    def __post_init__(self) -> None:
        if self.read not in READ:
            raise ValueError(f"read must be one of {', '.join(READ)}, got {self.read!r}")


HEADLINES: dict[str, Published] = {
    figure.key: figure
    for figure in (
        Published("cpu_90", "attention over a Xeon Gold 6230R, 90 %", 235.3, "x", "paper"),
        Published("edge_90", "attention over a Jetson Xavier NX, 90 %", 142.9, "x", "paper"),
        Published("gpu_90", "attention over an RTX 2080 Ti, 90 %", 86.0, "x", "paper"),
        Published("spatten_90", "attention over SpAtten, 90 %", 10.1, "x", "paper"),
        Published("sanger_90", "attention over Sanger, 90 %", 6.8, "x", "paper"),
        Published("cpu_mean", "attention over a Xeon Gold 6230R, 60-90 %", 127.2, "x", "notes"),
        Published("edge_mean", "attention over a Jetson Xavier NX, 60-90 %", 77.0, "x", "notes"),
        Published("gpu_mean", "attention over an RTX 2080 Ti, 60-90 %", 46.5, "x", "notes"),
        Published("spatten_mean", "attention over SpAtten, 60-90 %", 6.8, "x", "notes"),
        Published("sanger_mean", "attention over Sanger, 60-90 %", 4.3, "x", "notes"),
        Published("cpu_network", "end to end over the CPU", 33.0, "x", "unconfirmed"),
        Published("edge_network", "end to end over the edge GPU", 5.0, "x", "unconfirmed"),
        Published("pruning_90", "pruning, on top of reordering, 90 %", 8.14, "x", "paper"),
        Published("pruning_mean", "pruning, on top of reordering, 60-90 %", 5.14, "x", "paper"),
        Published("reordering_90", "reordering, on top of pruning, 90 %", 2.03, "x", "paper"),
        Published("reordering_mean", "reordering, on top of pruning, 60-90 %", 2.59, "x", "paper"),
        Published("movement_plain", "data movement's share of latency, no codec", 0.5, "share",
                  "paper"),
        Published("movement_codec", "data movement's share of latency, codec", 0.28, "share",
                  "paper"),
        Published("energy_sanger", "energy efficiency over Sanger", 9.8, "x", "notes"),
        Published("area", "area, 28 nm", 3.0, "mm2", "notes"),
        Published("power", "power at 500 MHz", 323.9, "mW", "notes"),
    )
}  # fmt: skip
"""By key. The paper's edge GPU figure is 142.9 in its abstract and 160.6 in an earlier figure;
the means of its pruning and reordering are taken to be over the same sparsities."""
