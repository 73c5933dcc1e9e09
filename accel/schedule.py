"""How a machine is used: policies of its lines, of dense products, and a mapping of one's own.

The third argument of `simulate`, beside what is computed (the workload) and what is built
(`Hardware`). Each default is today's best; variation is by `dataclasses.replace`. Simulators
without MAC lines of ViTCoD's kind look at the dense policies alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..checks import check_fields, one_of
from ..workload import GlobalThreshold
from ..workload.masks import check_global_threshold
from .encodings import ENCODINGS

__all__ = [
    "ASSIGNMENTS",
    "DATAFLOWS",
    "DEFAULT",
    "FILLS",
    "LATENTS",
    "OBJECTIVES",
    "ON_CHIP",
    "ORIENTATIONS",
    "SCRATCHPADS",
    "VECTOR_FUSIONS",
    "Schedule",
    "UserMapping",
]

ASSIGNMENTS = ("balanced", "round_robin", "lockstep")
"""How columns (rows) of the sparser part reach the lines; see `sievit.accel.vitcod.assign`."""

DATAFLOWS = ("best", "os", "ws", "is")
"""Dense products: each in the dataflow that is best for it, or all output-, weight- or
input-stationary; see `sievit.accel.products.array`."""

ORIENTATIONS = ("best", "tokens_on_lines", "features_on_lines")
"""Which side of an output-stationary product lies on the lines, the other on a line's MACs: rows
of the result, its columns, or whichever is faster. Weight- and input-stationary products have
K on the lines."""

VECTOR_FUSIONS = ("fused", "apart")
"""Vector operations take the results of the product before them as they come, where the buffers
allow it (`sievit.accel.products.epilogue`), and the softmax unit takes scores row by row; or all
of them run after it, with their operands from DRAM."""

OBJECTIVES = ("edp", "cycles", "energy", "bytes")
"""What the mapper of attention looks for the least of: the product of energy and cycles,
either of them, or the bytes that DRAM moves. Energy is that of the profile "aladdin-28nm"."""

SCRATCHPADS = ("shared", "fixed")
"""The buffers of Q, K, V and the rest are one scratchpad that is cut for each attention call,
or four buffers of the hardware's sizes."""

ON_CHIP = ("fitting", "nothing")
"""What of Q, K and V (of latents) stays on chip between a projection and attention: the first
heads, as many as fit, or none."""

LATENTS = ("best", "fill", "resident")
"""Where latents of Q and K are decoded: as they are loaded, so that decoded heads fill the
buffers and latents come again for each further group of heads; or from the scratchpad, where
all latents of a codec block stay and each head is decoded when its turn comes; or whichever
the mapper puts first."""

FILLS = ("back_to_back", "per_tile")
"""Tiles of a dense product follow each other, or each pays the array's skew."""

MOST_PERCENT = 10**6
"""Of ``sparser_percent``; so much that all lines but one go to the sparser engine."""


@dataclass(frozen=True)
class UserMapping:
    """How attention is to be cut up, instead of what the mapper would choose.

    group            heads of a pass: a divisor of the heads of a codec block, 1 without codec
    query_tile       queries of a tile; None: all of them
    key_tile         keys of a tile; None: all of them
    whole_queries    all queries of a group stay on chip, tiles only limit the scores
    ahead            scores of the next unit are computed before the values of this one
    output_regions   accumulators of how many units fit: 2 = a store runs beside the next
    resident_latents latents of a codec block stay on chip, each head is decoded from there

    Whether it suits a call and the buffers is checked for each call by
    `sievit.accel.vitcod.mapper`. Raises ValueError, naming the field, for another type and a
    size below 1.
    """

    group: int = 1
    query_tile: int | None = None
    key_tile: int | None = None
    whole_queries: bool = True
    ahead: bool = True
    output_regions: int = 2
    resident_latents: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.output_regions not in (1, 2):
            raise ValueError(f"output_regions must be one of 1, 2, got {self.output_regions!r}")


@dataclass(frozen=True)
class Schedule:
    """What a run does with the hardware.

    global_threshold  which keys of a head are global, as `sievit.workload.polarize_head`;
                      "best": as many as make each head fastest; None: as the masks of the
                      workload are polarized
    objective         of the mapper, one of `OBJECTIVES`
    scratchpad        one of `SCRATCHPADS`
    on_chip           one of `ON_CHIP`
    latents           one of `LATENTS`
    index_streams     1: SDDMM writes (key, score) into the lists of their rows, and SpMM reads
                      its keys there; 2: each product has its own, and that of SDDMM says for
                      each score where it is stored
    assignment        one of `ASSIGNMENTS`
    sparser_percent   what an entry of the sparser engine takes of a line's time, of what an
                      operand of the denser one takes: lines are split accordingly
    mappings_stepped  how many of the mapper's best candidates the engine steps; the best by
                      the objective is taken
    dense_dataflow    one of `DATAFLOWS`
    dense_orientation one of `ORIENTATIONS`
    dense_fill        one of `FILLS`
    vector_fusion     one of `VECTOR_FUSIONS`
    index_encoding    one of `sievit.accel.encodings.ENCODINGS`
    mapping           of attention; None: the mapper chooses

    Raises ValueError, naming the field, for another type, an unknown policy, a count below 1.
    """

    assignment: str = "balanced"
    mappings_stepped: int = 2  # choice
    dense_dataflow: str = "best"
    dense_fill: str = "back_to_back"
    index_encoding: str = "relative"
    mapping: UserMapping | None = None
    global_threshold: GlobalThreshold | None = None
    objective: str = "edp"
    scratchpad: str = "shared"
    on_chip: str = "fitting"
    latents: str = "best"
    index_streams: int = 1
    sparser_percent: int = 108  # choice: its lines wait for banks more often
    dense_orientation: str = "best"
    vector_fusion: str = "fused"

    def __post_init__(self) -> None:
        check_fields(self, {"sparser_percent": (1, MOST_PERCENT)})
        if self.global_threshold is not None and self.global_threshold != "best":
            held = check_global_threshold(self.global_threshold)
            object.__setattr__(self, "global_threshold", held)
        one_of("objective", self.objective, OBJECTIVES)
        one_of("scratchpad", self.scratchpad, SCRATCHPADS)
        one_of("on_chip", self.on_chip, ON_CHIP)
        one_of("latents", self.latents, LATENTS)
        if self.index_streams not in (1, 2):
            raise ValueError(f"index_streams must be one of 1, 2, got {self.index_streams!r}")
        one_of("assignment", self.assignment, ASSIGNMENTS)
        one_of("dense_dataflow", self.dense_dataflow, DATAFLOWS)
        one_of("dense_orientation", self.dense_orientation, ORIENTATIONS)
        one_of("dense_fill", self.dense_fill, FILLS)
        one_of("vector_fusion", self.vector_fusion, VECTOR_FUSIONS)
        one_of("index_encoding", self.index_encoding, tuple(ENCODINGS))
        if self.mapping is not None and not isinstance(self.mapping, UserMapping):
            names = ", ".join(item.name for item in fields(UserMapping))
            raise ValueError(
                f"mapping must be None or a UserMapping of {names}, got {self.mapping!r}"
            )


DEFAULT = Schedule()
"""What is used where no schedule is given."""
