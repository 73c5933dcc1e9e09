"""One attention call stepped by the compiled engine, and what each head took of it.

A stage belongs to one head, so the heads' cycles, with those after the last stage, sum to
the call's. `simulate` makes costs of an `AttentionRun`, `timeline` slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...workload import Attention
from ..hardware import Hardware
from ..report.report import HeadCost
from .builder import build
from .core import engine
from .core.registers import PHASES, STALLS, Trace
from .mapping import Mapping
from .pattern import SDDMM, SPMM
from .program import CODEC, LATENT, STORE, Counts, K, Program, Q

WAITS: dict[str, tuple[str, str]] = {
    "bank": ("Q bank", "V bank"),
    "key_register": ("K bank", "K bank"),
    "index_port": ("index port", "index port"),
    "index_refill": ("index from DRAM", "index from DRAM"),
    "dram": ("Q or K from DRAM", "V from DRAM"),
    "decoder": ("decoder", "decoder"),
    "softmax": ("softmax", "softmax"),
    "drain": ("output bank", "output bank"),
    "barrier": ("other lines (lockstep)", "other lines (lockstep)"),
    "imbalance": ("no work left in the stage", "no work left in the stage"),
    "store": ("room for output rows", "room for output rows"),
    "reconfigure": ("new split of the lines", "new split of the lines"),
    "pipeline": ("last results", "last results"),
}
"""What a line waits for in SDDMM and in SpMM, in words, by the engine's `registers.STALLS`."""
_WORDS = tuple(zip(*(WAITS.get(name, (name, name)) for name in STALLS), strict=True))


@dataclass(frozen=True, eq=False)
class AttentionRun:
    """A run of the engine: what was run, and what it left. ``instances``: windows x images."""

    mapping: Mapping
    instances: int
    program: Program
    counts: Counts
    trace: Trace

    @property
    def op(self) -> Attention:
        return self.mapping.op

    @property
    def hardware(self) -> Hardware:
        return self.mapping.whole

    @cached_property
    def units(self) -> tuple[tuple[int, int, slice], ...]:
        """(instance, head, rows) of each unit, in the order of execution."""
        return tuple(self.mapping.units(self.instances))

    @cached_property
    def stage_heads(self) -> np.ndarray:
        """The head of each stage, int64 [stages]."""
        heads = np.array([head for _, head, _ in self.units], dtype=np.int64)
        return heads[self.program.stages["unit"]]

    @property
    def cycles(self) -> int:
        return self.trace.count("cycles")

    def stalls(self) -> dict[str, int]:
        """MAC-line cycles by what the lines did ("busy") or waited for."""
        kinds = self.program.stages["kind"]
        table = self.trace.stage_stalls
        return named_stalls(np.stack([table[kinds == kind].sum(axis=0) for kind in (SDDMM, SPMM)]))

    def phases(self) -> dict[str, int]:
        """All cycles, those after the last stage included, by phase."""
        return named_phases(self.trace.stage_phases.sum(axis=0))


def named_stalls(table: np.ndarray) -> dict[str, int]:
    """Line-cycles in words, from an array [2 (SDDMM, SpMM), stalls]."""
    total: dict[str, int] = {}
    for words, row in zip(_WORDS, table.tolist(), strict=True):
        for name, cycles in zip(words, row, strict=True):
            if cycles:
                total[name] = total.get(name, 0) + cycles
    return total


def named_phases(row: np.ndarray) -> dict[str, int]:
    """Cycles by phase, from an array [phases]."""
    return {name: cycles for name, cycles in zip(PHASES, row.tolist(), strict=True) if cycles}


def run_mapping(mapping: Mapping, instances: int) -> AttentionRun:
    """Build and run ``instances`` windows of the mapping's call."""
    program, counts = build(mapping, instances)
    return AttentionRun(mapping, instances, program, counts, engine.run(program, mapping))


def head_costs(run: AttentionRun) -> tuple[HeadCost, ...]:
    """Each head's share of the call, all windows and images."""
    op, trace, heads = run.op, run.trace, run.stage_heads
    stalls = np.zeros((op.heads, 2, len(STALLS)), dtype=np.int64)
    np.add.at(stalls, (heads, run.program.stages["kind"]), trace.stage_stalls)
    phases = np.zeros((op.heads, len(PHASES)), dtype=np.int64)
    np.add.at(phases, heads, trace.stage_phases[:-1])
    moved = _head_dram_bytes(run)
    whole = op.queries * op.keys
    return tuple(
        HeadCost(
            head,
            cycles=int(phases[head].sum()),
            phases=named_phases(phases[head]),
            stalls=named_stalls(stalls[head]),
            global_keys=pattern.num_global,
            scores=int(pattern.row_scores.sum()) * run.instances,
            kept_scores=(op.masks[head].kept if op.masks else whole) * run.instances,
            dram_bytes=int(moved[head]),
            global_threshold=op.masks[head].global_threshold if op.masks else None,
        )
        for head, pattern in enumerate(run.mapping.patterns)
    )


def _head_dram_bytes(run: AttentionRun) -> np.ndarray:
    """Bytes by head; what a group of heads shares is split evenly, resident latents over the
    heads of their codec block, the codec's weights over all heads (first heads take what does
    not divide)."""
    program, heads = run.program, run.op.heads
    unit_heads = np.array([head for _, head, _ in run.units], dtype=np.int64)
    owners = run.stage_heads[program.transfers["need"] % len(program.stages)]
    first = program.channel_first
    owners[first[STORE] : first[STORE + 1]] = unit_heads  # one a unit, in their order
    owners[first[CODEC] : first[CODEC + 1]] = 0
    sizes = np.zeros((len(first) - 1, heads), dtype=np.int64)
    channels = np.repeat(np.arange(len(first) - 1), np.diff(first))
    np.add.at(sizes, (channels, owners), program.transfers["bytes"])
    block = heads // run.op.codec.groups if run.op.codec else 1
    group = run.mapping.group
    for channel, shared in ((Q, group), (K, group), (LATENT, block), (CODEC, heads)):
        if shared > 1:
            sizes[channel] = _shared_evenly(sizes[channel], shared)
    return sizes.sum(axis=0)


def _shared_evenly(sizes: np.ndarray, group: int) -> np.ndarray:
    groups = sizes.reshape(-1, group).sum(axis=1, keepdims=True)
    return (groups // group + (np.arange(group) < groups % group)).ravel()
