"""Accelerators simulated cycle by cycle: what a workload costs in silicon.

Floor plan: the machine (`hardware`) -> how an attention call is cut up (`mapping`), assigned
to lines (`assign`) and written down (`program`) -> the compiled core (`engine`) -> dense
products beside it (`dense`) -> one function a machine (`simulators`) -> `simulate`, `Report`.
"""

from .hardware import Hardware, presets
from .report import OpCost, Report, Traffic
from .simulate import compare, simulate

__all__ = ["Hardware", "OpCost", "Report", "Traffic", "compare", "presets", "simulate"]
