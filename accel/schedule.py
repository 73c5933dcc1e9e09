"""How a machine is used: policies of its lines, of dense products, and a user's own mapping.

The third argument of `simulate`, beside what is computed (the workload) and what is built
(`Hardware`). Each default is today's best; variation is by `dataclasses.replace`. Simulators
without MAC lines of ViTCoD's kind look at the dense policies alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from .encodings import ENCODINGS

__all__ = ["ASSIGNMENTS", "DATAFLOWS", "DEFAULT", "FILLS", "Schedule", "UserMapping"]

ASSIGNMENTS = ("balanced", "round_robin", "lockstep")
"""How columns (rows) of the sparser part reach the lines; see `sievit.accel.vitcod.assign`."""

DATAFLOWS = ("os", "ws", "is")
"""Dense products: output-, weight- or input-stationary; see `sievit.accel.products`."""

FILLS = ("back_to_back", "per_tile")
"""Tiles of a dense product follow each other, or each pays the array's skew."""


@dataclass(frozen=True)
class UserMapping:
    """How attention is to be cut up, instead of what the mapper would choose.

    group            heads of a pass: a divisor of the heads of a codec block, 1 without codec
    query_tile       queries of a tile; None: all of them
    key_tile         keys of a tile; None: all of them
    whole_queries    all queries of a group stay on chip, tiles only limit the scores
    ahead            scores of the next unit are computed before the values of this one
    output_regions   accumulators of how many units fit: 2 = a store runs beside the next

    Whether it suits a call and the buffers is checked for each call by
    `sievit.accel.vitcod.mapper`. Raises ValueError, naming the field, for a size below 1.
    """

    group: int = 1
    query_tile: int | None = None
    key_tile: int | None = None
    whole_queries: bool = True
    ahead: bool = True
    output_regions: int = 2

    def __post_init__(self) -> None:
        for name in ("group", "query_tile", "key_tile"):
            value = getattr(self, name)
            if not (value is None and name != "group"):
                _at_least_one(name, value)
        for name in ("whole_queries", "ahead"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.output_regions not in (1, 2) or isinstance(self.output_regions, bool):
            raise ValueError(f"output_regions must be one of 1, 2, got {self.output_regions!r}")


@dataclass(frozen=True)
class Schedule:
    """What a run does with the hardware.

    assignment        one of `ASSIGNMENTS`
    mappings_stepped  how many of the mapper's best candidates the engine steps; the fastest
                      is taken
    dense_dataflow    one of `DATAFLOWS`
    dense_fill        one of `FILLS`
    index_encoding    one of `sievit.accel.encodings.ENCODINGS`
    mapping           of attention; None: the mapper chooses

    Raises ValueError, naming the field, for an unknown policy or a count below 1.
    """

    assignment: str = "balanced"
    mappings_stepped: int = 1  # choice
    dense_dataflow: str = "os"
    dense_fill: str = "back_to_back"
    index_encoding: str = "absolute"
    mapping: UserMapping | None = None

    def __post_init__(self) -> None:
        one_of("assignment", self.assignment, ASSIGNMENTS)
        _at_least_one("mappings_stepped", self.mappings_stepped)
        one_of("dense_dataflow", self.dense_dataflow, DATAFLOWS)
        one_of("dense_fill", self.dense_fill, FILLS)
        one_of("index_encoding", self.index_encoding, tuple(ENCODINGS))
        if self.mapping is not None and not isinstance(self.mapping, UserMapping):
            names = ", ".join(item.name for item in fields(UserMapping))
            raise ValueError(
                f"mapping must be None or a UserMapping of {names}, got {self.mapping!r}"
            )


def one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError, naming ``field``, for a value that is not among ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {value!r}")


def _at_least_one(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field} must be an integer >= 1, got {value!r}")


DEFAULT = Schedule()
"""What is used where no schedule is given."""
