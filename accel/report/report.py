"""What a simulation found: cycles, bytes and stalls of each operation, and their sums.

Every total is a sum over operations; nothing is stored twice. Bytes are counted for each
tensor at each level: "dram", "buffer" (SRAM) and "lines" (what MAC lines took; one read
of a buffer may serve several lines).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...workload import GlobalThreshold
from ..hardware import Hardware, as_dict
from ..schedule import DEFAULT, Schedule

LEVELS = ("dram", "buffer", "lines")


@dataclass(frozen=True)
class Traffic:
    """Bytes of one tensor at one level; "read" and "written" as that level sees them."""

    tensor: str
    level: str
    read_bytes: int
    written_bytes: int

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {self.level!r}")

    @property
    def total_bytes(self) -> int:
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True)
class HeadCost:
    """One head's share of an attention call, all windows and images.

    cycles        of its stages; what the call does after its last stage is nobody's
    phases        they sum to ``cycles``
    stalls        MAC-line cycles by what lines did ("busy") or waited for
    scores        computed, the pruned entries of a dense block included
    dram_bytes    read and written; what heads share is split evenly
    global_threshold  the rule that chose the ``global_keys``; None for attention without a
                  mask and for masks that no rule made
    """

    head: int
    cycles: int
    phases: Mapping[str, int]
    stalls: Mapping[str, int]
    global_keys: int
    scores: int
    kept_scores: int
    dram_bytes: int
    global_threshold: GlobalThreshold | None = None

    def __post_init__(self) -> None:
        _check_phases(f"head {self.head}", self.phases, self.cycles)


@dataclass(frozen=True)
class OpCost:
    """One operation on the machine, the whole batch.

    kind            "attention", "dense" (products), "vector" or "unknown"
    phases          cycles by what the array did or waited for; they sum to ``cycles``
    macs            executed, the pruned entries of a dense block included
    kept_macs       those of kept entries alone (equal to ``macs`` for dense products)
    codec_macs      of ``macs``: on encoder and decoder, which have MACs of their own
    stalls          MAC-line cycles by what lines did ("busy") or waited for, where the
                    engine stepped them
    busy            cycles in which a resource worked ("MAC lines", "DRAM", "softmax", ...)
    details         further counts of this simulator
    heads           of attention, where the engine stepped it
    """

    name: str
    kind: str
    cycles: int
    phases: Mapping[str, int]
    macs: int
    kept_macs: int
    traffic: tuple[Traffic, ...] = ()
    stalls: Mapping[str, int] = field(default_factory=dict)
    busy: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, int | float | str] = field(default_factory=dict)
    heads: tuple[HeadCost, ...] = ()
    codec_macs: int = 0

    def __post_init__(self) -> None:
        _check_phases(self.name, self.phases, self.cycles)

    @property
    def line_macs(self) -> int:
        """Executed on the MAC lines (on a sampling operator's vector lanes)."""
        return self.macs - self.codec_macs

    @property
    def dram_bytes(self) -> int:
        """Read and written."""
        return sum(row.total_bytes for row in self.traffic if row.level == "dram")

    @property
    def bottleneck(self) -> str:
        """The resource that works for the largest share of the cycles; "-" for none."""
        return max(self.busy, key=lambda name: self.busy[name], default="-")


@dataclass(frozen=True)
class Report:
    """A workload on a machine: `simulator` names the model, `ops` holds every figure.

    ``unknown`` names operations that were charged for their bytes alone; ``parameters`` are
    the simulator's own, None where it ran with its defaults.
    """

    simulator: str
    workload: str
    hardware: Hardware
    batch: int
    ops: tuple[OpCost, ...]
    unknown: tuple[str, ...] = ()
    schedule: Schedule = DEFAULT
    parameters: Any = None

    @property
    def attention(self) -> tuple[OpCost, ...]:
        """The attention operations alone."""
        return tuple(op for op in self.ops if op.kind == "attention")

    @property
    def global_thresholds(self) -> tuple[GlobalThreshold, ...]:
        """The rules by which keys were made global, each once, in the order of the heads: one,
        or several where the schedule chose for each head. () where no engine was stepped."""
        rules = (head.global_threshold for op in self.attention for head in op.heads)
        return tuple(dict.fromkeys(rule for rule in rules if rule is not None))

    @property
    def cycles(self) -> int:
        """The whole network: operations run one after the other."""
        return sum(op.cycles for op in self.ops)

    @property
    def attention_cycles(self) -> int:
        return sum(op.cycles for op in self.attention)

    @property
    def seconds(self) -> float:
        return self.hardware.seconds(self.cycles)

    @property
    def attention_seconds(self) -> float:
        return self.hardware.seconds(self.attention_cycles)

    @property
    def macs(self) -> int:
        return sum(op.macs for op in self.ops)

    def phases(self, attention_only: bool = True) -> dict[str, int]:
        """Cycles by phase, in the order in which phases first appear."""
        return _summed(op.phases for op in self._chosen(attention_only))

    def stalls(self, attention_only: bool = True) -> dict[str, int]:
        """MAC-line cycles by what lines did ("busy") or waited for."""
        return _summed(op.stalls for op in self._chosen(attention_only))

    def busy(self, attention_only: bool = True) -> dict[str, int]:
        """Cycles in which each resource worked."""
        return _summed(op.busy for op in self._chosen(attention_only))

    def traffic(self, attention_only: bool = True) -> tuple[Traffic, ...]:
        """Bytes by tensor and level."""
        totals: dict[tuple[str, str], list[int]] = {}
        for op in self._chosen(attention_only):
            for row in op.traffic:
                total = totals.setdefault((row.tensor, row.level), [0, 0])
                total[0] += row.read_bytes
                total[1] += row.written_bytes
        return tuple(Traffic(*place, *total) for place, total in totals.items())

    def dram_bytes(self, attention_only: bool = True) -> int:
        """Read and written, together."""
        rows = self.traffic(attention_only)
        return sum(row.total_bytes for row in rows if row.level == "dram")

    def utilization(self, attention_only: bool = True) -> float:
        """MACs executed on the lines over what they could do in the cycles taken."""
        ops = self._chosen(attention_only)
        possible = sum(op.cycles for op in ops) * self.hardware.macs
        return sum(op.line_macs for op in ops) / possible if possible else 0.0

    def bottleneck(self, attention_only: bool = True) -> str:
        """The resource that is busy for the largest share of the cycles, and that share."""
        shares = self.busy_shares(attention_only)
        if not shares:
            return "-"
        name = max(shares, key=lambda resource: shares[resource])
        return f"{name} {shares[name]:.0%}"

    def busy_shares(self, attention_only: bool = True) -> dict[str, float]:
        """Share of all cycles in which each resource worked."""
        cycles = sum(op.cycles for op in self._chosen(attention_only))
        busy = self.busy(attention_only)
        return {name: value / cycles for name, value in busy.items()} if cycles else {}

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: totals first, then every operation.

        "hardware" holds the policies that it held in earlier versions as well, for one version.
        """
        own = {} if self.parameters is None else {"parameters": asdict(self.parameters)}
        return {
            "simulator": self.simulator,
            "workload": self.workload,
            "hardware": as_dict(self.hardware, self.schedule),
            "schedule": asdict(self.schedule),
            **own,
            "batch": self.batch,
            "unknown": list(self.unknown),
            "global_thresholds": list(self.global_thresholds),
            "network": self._totals(attention_only=False),
            "attention": self._totals(attention_only=True),
            "ops": [_op_dict(op) for op in self.ops],
        }

    def _totals(self, attention_only: bool) -> dict[str, Any]:
        ops = self._chosen(attention_only)
        cycles = sum(op.cycles for op in ops)
        return {
            "cycles": cycles,
            "seconds": self.hardware.seconds(cycles),
            "macs": sum(op.macs for op in ops),
            "kept_macs": sum(op.kept_macs for op in ops),
            "utilization": self.utilization(attention_only),
            "bottleneck": self.bottleneck(attention_only),
            "phases": self.phases(attention_only),
            "busy": self.busy(attention_only),
            "stalls": self.stalls(attention_only),
            "traffic": [asdict(row) for row in self.traffic(attention_only)],
        }

    def _chosen(self, attention_only: bool) -> tuple[OpCost, ...]:
        return self.attention if attention_only else self.ops


def _op_dict(op: OpCost) -> dict[str, Any]:
    names = ("name", "kind", "cycles", "macs", "kept_macs", "codec_macs")
    plain = {name: getattr(op, name) for name in names}
    tables = {name: dict(getattr(op, name)) for name in ("phases", "stalls", "busy", "details")}
    rows = {name: [asdict(row) for row in getattr(op, name)] for name in ("traffic", "heads")}
    return plain | tables | rows


def _check_phases(name: str, phases: Mapping[str, int], cycles: int) -> None:
    if sum(phases.values()) != cycles:
        raise ValueError(f"{name}: phases {dict(phases)} do not sum to {cycles} cycles")


def _summed(tables: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for table in tables:
        for name, value in table.items():
            total[name] = total.get(name, 0) + value
    return total
