"""The machines by name: each a plain function (workload, hardware, batch) -> Report.

All of them have the hardware's MACs, bandwidth and clock.
"""

from __future__ import annotations

from collections.abc import Callable

from ...workload import Workload
from ..hardware import Hardware
from ..report.report import Report
from ..vitcod.simulate import (
    simulate_dense,
    simulate_no_codec,
    simulate_no_reorder,
    simulate_plain,
    simulate_vitcod,
)
from .released import simulate_released
from .sanger import simulate_sanger
from .spatten import simulate_spatten
from .systolic import (
    simulate_input_stationary,
    simulate_output_stationary,
    simulate_systolic,
    simulate_weight_stationary,
)

SIMULATORS: dict[str, Callable[[Workload, Hardware, int], Report]] = {
    "vitcod": simulate_vitcod,
    "vitcod_no_codec": simulate_no_codec,
    "vitcod_no_reorder": simulate_no_reorder,
    "vitcod_plain": simulate_plain,
    "vitcod_dense": simulate_dense,
    "systolic": simulate_systolic,
    "systolic_os": simulate_output_stationary,
    "systolic_ws": simulate_weight_stationary,
    "systolic_is": simulate_input_stationary,
    "sanger": simulate_sanger,
    "spatten": simulate_spatten,
    "released": simulate_released,
}
