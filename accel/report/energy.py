"""Energy and area: the counts of a `Report` times a named profile of sourced figures.

A joule means something only beside its profile (published figures differ fourfold), so
every result carries the profile's name, and lists under ``not_charged`` what no source gave
a figure for and what the simulator did not count. Picojoules, square millimetres.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..hardware import Hardware
from .gates import crossbar_gates, line_gates
from .profiles import PROFILES, EnergyProfile, load_profile
from .report import LEVELS, OpCost, Report

__all__ = [
    "PROFILES",
    "Area",
    "Energy",
    "EnergyProfile",
    "OpEnergy",
    "area",
    "energy",
    "load_profile",
]

BUFFERS: dict[str, tuple[str, ...]] = {
    "Q": ("q_buffer_bytes",),
    "K": ("k_buffer_bytes",),
    "V": ("v_buffer_bytes",),
    "index": ("index_buffer_bytes",),
    "scores": ("output_buffer_bytes",),
    "output": ("output_buffer_bytes",),
    "partial sums": ("output_buffer_bytes",),
    "importance": ("other_buffer_bytes",),
    "latent Q and K": ("other_buffer_bytes",),
    "codec weights": ("other_buffer_bytes",),
    "attention bias": ("other_buffer_bytes",),
    "activations": ("q_buffer_bytes", "k_buffer_bytes", "v_buffer_bytes"),
    "weights": ("q_buffer_bytes", "k_buffer_bytes", "v_buffer_bytes"),
}
"""Where a tensor lives: an access costs what the largest of these buffers costs. A tensor
that is not named here is charged as if all SRAM were one buffer."""


@dataclass(frozen=True)
class OpEnergy:
    """One operation: picojoules by component ("MAC", "DRAM", "SRAM", ...)."""

    name: str
    kind: str
    seconds: float
    components_pj: Mapping[str, float]

    @property
    def total_pj(self) -> float:
        return sum(self.components_pj.values())


@dataclass(frozen=True)
class Energy:
    """A report under a profile. ``not_charged`` lists what the figures leave out."""

    profile: str
    simulator: str
    workload: str
    batch: int
    ops: tuple[OpEnergy, ...]
    not_charged: tuple[str, ...]

    def components_pj(self, attention_only: bool = True) -> dict[str, float]:
        """Picojoules by component, the whole batch."""
        total: dict[str, float] = {}
        for op in self._chosen(attention_only):
            for name, value in op.components_pj.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def total_pj(self, attention_only: bool = True) -> float:
        return sum(op.total_pj for op in self._chosen(attention_only))

    def mean_milliwatts(self, attention_only: bool = True) -> float:
        """Energy over time, DRAM included."""
        seconds = sum(op.seconds for op in self._chosen(attention_only))
        return self.total_pj(attention_only) * 1e-9 / seconds if seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, the profile's name first."""
        totals = {
            name: {
                "total_pj": self.total_pj(attention_only),
                "components_pj": self.components_pj(attention_only),
                "mean_milliwatts": self.mean_milliwatts(attention_only),
            }
            for name, attention_only in (("network", False), ("attention", True))
        }
        plain = asdict(self) | {"not_charged": list(self.not_charged)}
        ops = [asdict(op) | {"total_pj": op.total_pj} for op in self.ops]
        return plain | totals | {"ops": ops}

    def _chosen(self, attention_only: bool) -> Iterable[OpEnergy]:
        return (op for op in self.ops if op.kind == "attention" or not attention_only)


def energy(report: Report, profile: EnergyProfile = PROFILES["aladdin-28nm"]) -> Energy:
    """What the counts of ``report`` cost under ``profile``: nothing else enters.

    MAC = executed MACs x mac_pj; DRAM, SRAM and registers = bytes of that level; leakage =
    that of all buffers over the operation's time; softmax and vector = busy lane cycles.
    """
    rates = _Rates(report.hardware, profile)
    ops = tuple(_op_energy(op, rates) for op in report.ops)
    return Energy(
        profile.name,
        report.simulator,
        report.workload,
        report.batch,
        ops,
        _not_charged(report, profile),
    )


def energy_pj(
    op: OpCost, hardware: Hardware, profile: EnergyProfile = PROFILES["aladdin-28nm"]
) -> float:
    """Picojoules of one operation, as `energy` counts them."""
    return _op_energy(op, _Rates(hardware, profile)).total_pj


class _Rates:
    """A profile's figures for the buffers of one machine, each interpolated once."""

    def __init__(self, hardware: Hardware, profile: EnergyProfile) -> None:
        self.hardware, self.profile = hardware, profile
        self.leakage_mw = leakage_mw(hardware, profile)
        self._access_pj: dict[str, tuple[float, float]] = {}

    def access_pj(self, tensor: str) -> tuple[float, float]:
        """A byte of ``tensor`` read from its buffer, and written to it."""
        if tensor not in self._access_pj:
            size = _buffer_bytes(tensor, self.hardware)
            pair = (self.profile.sram_read_pj(size), self.profile.sram_write_pj(size))
            self._access_pj[tensor] = pair
        return self._access_pj[tensor]


def _op_energy(op: OpCost, rates: _Rates) -> OpEnergy:
    hardware, profile = rates.hardware, rates.profile
    spent = {"MAC": op.macs * profile.mac_pj, "DRAM": 0.0, "SRAM": 0.0, "registers": 0.0}
    for row in op.traffic:
        if row.level == "dram":
            spent["DRAM"] += 8 * row.total_bytes * profile.dram_pj_per_bit
        elif row.level == "buffer":
            read_pj, write_pj = rates.access_pj(row.tensor)
            spent["SRAM"] += row.read_bytes * read_pj + row.written_bytes * write_pj
        else:
            spent["registers"] += row.total_bytes * (profile.register_pj_per_byte or 0.0)
    for unit, lanes in (("softmax", hardware.softmax_lanes), ("vector", hardware.vector_lanes)):
        cost = getattr(profile, f"{unit}_pj")
        if cost is not None:
            spent[unit] = op.busy.get(unit, 0) * lanes * cost
    seconds = hardware.seconds(op.cycles)
    spent["SRAM leakage"] = rates.leakage_mw * seconds * 1e9
    return OpEnergy(op.name, op.kind, seconds, {k: v for k, v in spent.items() if v})


def _buffer_bytes(tensor: str, hardware: Hardware) -> int:
    names = BUFFERS.get(tensor)
    return max(getattr(hardware, name) for name in names) if names else hardware.sram_bytes


def _buffers(hardware: Hardware) -> dict[str, int]:
    return {k: v for k, v in asdict(hardware).items() if k.endswith("_buffer_bytes")}


def leakage_mw(hardware: Hardware, profile: EnergyProfile) -> float:
    """Of all buffers; 0 where the profile has no figure."""
    return sum(profile.sram_leakage_mw(size) or 0.0 for size in _buffers(hardware).values())


def _not_charged(report: Report, profile: EnergyProfile) -> tuple[str, ...]:
    """What has no figure, and what the simulator did not count."""
    out = []
    for unit in ("softmax", "vector"):
        if getattr(profile, f"{unit}_pj") is None and any(op.busy.get(unit) for op in report.ops):
            out.append(f"{unit} unit: the profile has no figure")
    if profile.register_pj_per_byte is None:
        out.append("line registers: the profile has no figure")
    if any(row.leakage_mw is None for row in profile.sram):
        out.append("SRAM leakage: the profile has no figure")
    out += _uncounted(report)
    out += [f"{name}: its MACs are not known" for name in report.unknown]
    out.append("accumulator registers, control, clock tree, wires and their leakage: no figure")
    return tuple(out)


def _uncounted(report: Report) -> list[str]:
    """Bytes of a level that the simulator gives for no tensor of a kind of operation."""
    missing: dict[tuple[str, str], set[str]] = {}
    for op in report.ops:
        at = {level: {r.tensor for r in op.traffic if r.level == level} for level in LEVELS}
        if op.cycles and not (op.macs or op.traffic):
            missing.setdefault((op.kind, "MACs and all"), set()).add("all tensors")
        if op.macs and not at["dram"]:
            missing.setdefault((op.kind, "DRAM"), set()).add("all tensors")
        if op.kind != "unknown" and at["dram"] - at["buffer"]:
            missing.setdefault((op.kind, "SRAM"), set()).update(at["dram"] - at["buffer"])
        if op.macs and op.kind != "vector" and not at["lines"]:
            missing.setdefault((op.kind, "line register"), set()).add("all operands")
    return [
        f"{level} bytes of {', '.join(sorted(tensors))} in {kind} operations: "
        f"simulator {report.simulator} does not count them"
        for (kind, level), tensors in missing.items()
    ]


UTILIZATION = 0.7
"""Of the area of logic, what cells fill; the rest is for wires. A choice: usual for a routed
block of this kind."""


@dataclass(frozen=True)
class Area:
    """A machine under a profile: square millimetres by part.

    estimated  parts that are counted from the project's own Verilog, synthesized but not placed
               (`sievit.accel.report.gates`); the others are published figures times counts
    """

    profile: str
    hardware: str
    parts_mm2: Mapping[str, float]
    not_charged: tuple[str, ...] = field(default=())
    estimated: tuple[str, ...] = field(default=())

    @property
    def total_mm2(self) -> float:
        return sum(self.parts_mm2.values())

    @property
    def estimated_mm2(self) -> float:
        """Of the total, what is estimated."""
        return sum(self.parts_mm2[name] for name in self.estimated)

    @property
    def words(self) -> str:
        """Parts with their figures, what is published before what is estimated."""
        shown = {n: v for n, v in self.parts_mm2.items() if not n.endswith(" buffer")}
        buffers = sum(v for n, v in self.parts_mm2.items() if n not in shown)
        published = {"buffers": buffers} | {
            n: v for n, v in shown.items() if n not in self.estimated
        }
        text = f"{_figures(published)} from published figures"
        if self.estimated:
            text += f"; {_figures({n: shown[n] for n in self.estimated})} estimated"
        return f"{self.total_mm2:.2f} mm2: {text}"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        sums = {"total_mm2": self.total_mm2, "estimated_mm2": self.estimated_mm2}
        lists = {"not_charged": list(self.not_charged), "estimated": list(self.estimated)}
        return asdict(self) | sums | lists


def _figures(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in parts.items())


def area(hardware: Hardware, profile: EnergyProfile = PROFILES["aladdin-28nm"]) -> Area:
    """Buffers, MACs of lines, encoder and decoder, the lines' registers, and crossbars.

    Each buffer is one RAM of its size: banks are not charged beyond their crossbar, though 32
    small RAMs take more than one large one. "line registers" are accumulators, keys and pipeline
    registers with the logic that selects among them; "crossbars" connect lines and banks;
    "wires" is what `UTILIZATION` leaves free between the cells of all logic.
    """
    parts = {
        name.removesuffix("_bytes").replace("_", " "): profile.sram_area_mm2(size)
        for name, size in _buffers(hardware).items()
    }
    logic: dict[str, float] = {}
    missing = ["softmax and vector units, control, arbitration of banks, adders of output banks"]
    missing[0] += ", pads, DRAM interface: no figure"
    if profile.mac_area_um2 is None:
        missing.insert(0, "MACs: the profile has no figure")
    else:
        macs = {"MAC lines": hardware.macs, "encoder": hardware.encoder_macs}
        macs["decoder"] = hardware.decoder_macs
        logic = {n: count * profile.mac_area_um2 * 1e-6 for n, count in macs.items() if count}
    estimated = _estimated_mm2(hardware, profile, sum(logic.values()))
    if not estimated:
        missing.insert(0, "line registers, crossbars, wires: the profile has no figure")
    missing.append("banking and second ports of the buffers: one single-port RAM each")
    parts |= logic | estimated
    return Area(profile.name, hardware.name, parts, tuple(missing), tuple(estimated))


def _estimated_mm2(hardware: Hardware, profile: EnergyProfile, macs_mm2: float) -> dict[str, float]:
    """What `gates` counts, and the room between cells; nothing without a gate's area."""
    if profile.gate_area_um2 is None:
        return {}
    gates = {
        "line registers": hardware.lines * line_gates(hardware),
        "crossbars": crossbar_gates(hardware),
    }
    made = {name: count * profile.gate_area_um2 * 1e-6 for name, count in gates.items()}
    cells = macs_mm2 + sum(made.values())
    return made | {"wires": cells * (1 / UTILIZATION - 1)}
