"""The machines by name, each with all that is said of it (`Simulator`).

All of them have the hardware's MACs, bandwidth and clock.
"""

from __future__ import annotations

from .released import RELEASED
from .sanger import SANGER
from .simulator import Simulator
from .spatten import SPATTEN
from .systolic import INPUT_STATIONARY, OUTPUT_STATIONARY, SYSTOLIC, WEIGHT_STATIONARY
from .variants import DENSE, NO_CODEC, NO_REORDER, PLAIN, VITCOD

SIMULATORS: dict[str, Simulator] = {
    simulator.name: simulator
    for simulator in (
        VITCOD,
        NO_CODEC,
        NO_REORDER,
        PLAIN,
        DENSE,
        SYSTOLIC,
        OUTPUT_STATIONARY,
        WEIGHT_STATIONARY,
        INPUT_STATIONARY,
        SANGER,
        SPATTEN,
        RELEASED,
    )
}


def simulator_named(name: str) -> Simulator:
    """The entry of ``name``. Raises ValueError, naming those there are, for another."""
    if name not in SIMULATORS:
        raise ValueError(f"simulator must be one of {', '.join(SIMULATORS)}, got {name!r}")
    return SIMULATORS[name]
