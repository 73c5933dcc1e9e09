"""Accelerators simulated cycle by cycle: what a workload costs in silicon.

Floor plan: the machine (`hardware`) and how it is used (`schedule`, with the `encodings` of an
index) -> what every machine does alike (`products`, `report`) -> ViTCoD's, stepped cycle by
cycle (`vitcod`) on its memory (`dram`) -> all machines by name (`simulators`) -> `simulate` ->
when it happens (`trace`), and many machines at once (`explore`). Beside it the machine's
integers (`arithmetic`), attention in them (`integer_attention`), and kernels for real
processors (`kernels`).
"""

from ..moved import old_names
from .arithmetic import Arithmetic, Quantized, quantize
from .explore.grid import grid
from .explore.points import DesignPoint, Exploration
from .explore.sweep import explore
from .hardware import Hardware, presets
from .integer_attention import integer_attention
from .report.energy import Area, Energy, EnergyProfile, area, energy, load_profile
from .report.profiles import PROFILES
from .report.report import HeadCost, OpCost, Report, Traffic
from .report.speedups import speedups
from .schedule import Schedule, UserMapping
from .simulate import compare, simulate
from .trace.perfetto import write_trace
from .trace.timeline import Timeline, record
from .vitcod.numbers.functional import (
    CodecWeights,
    FunctionalResult,
    arithmetic_of,
    simulate_attention,
)

__all__ = [
    "PROFILES",
    "Area",
    "Arithmetic",
    "CodecWeights",
    "DesignPoint",
    "Energy",
    "EnergyProfile",
    "Exploration",
    "FunctionalResult",
    "Hardware",
    "HeadCost",
    "OpCost",
    "Quantized",
    "Report",
    "Schedule",
    "Timeline",
    "Traffic",
    "UserMapping",
    "area",
    "arithmetic_of",
    "compare",
    "energy",
    "explore",
    "grid",
    "integer_attention",
    "load_profile",
    "presets",
    "quantize",
    "record",
    "simulate",
    "simulate_attention",
    "speedups",
    "write_trace",
]

__getattr__ = old_names(__name__)
