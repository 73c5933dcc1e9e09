"""Accelerators simulated cycle by cycle: what a workload costs in silicon.

Floor plan: the machine (`hardware`) -> how an attention call is cut up (`mapping`), assigned
to lines (`assign`) and written down (`program`) -> the compiled core (`engine`) -> dense
products beside it (`dense`) -> one function a machine (`simulators`) -> `simulate`, `Report`.
Beside it the machine's integers (`arithmetic`), carried by the same schedule (`functional`).
"""

from .arithmetic import Arithmetic, Quantized, integer_attention, quantize
from .functional import CodecWeights, FunctionalResult, simulate_attention
from .hardware import Hardware, presets
from .report import OpCost, Report, Traffic
from .simulate import compare, simulate

__all__ = [
    "Arithmetic",
    "CodecWeights",
    "FunctionalResult",
    "Hardware",
    "OpCost",
    "Quantized",
    "Report",
    "Traffic",
    "compare",
    "integer_attention",
    "presets",
    "quantize",
    "simulate",
    "simulate_attention",
]
