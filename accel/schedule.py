"""How a machine is used: policies of its lines, of dense products, and a mapping of one's own.

The third argument of `simulate`, beside what is computed (the workload) and what is built
(`Hardware`). Each default is today's best; variation is by `dataclasses.replace`. Simulators
without MAC lines of ViTCoD's kind look at the dense policies alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..checks import check_fields, integer, one_of
from ..workload import GlobalThreshold
from ..workload.masks import PUBLISHED_GLOBAL_THRESHOLD, check_global_threshold
from .encodings import ENCODINGS

__all__ = [
    "ASSIGNMENTS",
    "DATAFLOWS",
    "DEFAULT",
    "FILLS",
    "INDEX_LOADS",
    "KEY_LOADS",
    "LATENTS",
    "OBJECTIVES",
    "ON_CHIP",
    "ORIENTATIONS",
    "QUERY_LOADS",
    "SCRATCHPADS",
    "SPLITS",
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

QUERY_LOADS = ("once", "per_key_tile")
"""Queries stay for all keys of their head; or the lines hold as many keys as there are lines,
and queries come from DRAM again for each such tile of keys (K-stationary; with a codec each
pass decodes them once)."""

KEY_LOADS = ("used", "all")
"""Where keys and values come in tiles, again for each tile of queries: those that its queries
keep, or all of them."""

INDEX_LOADS = ("once", "each_instance")
"""The index of a head is loaded once for all images and windows of the call where IdxBuf holds
it, each head's images and windows one after the other; or for each of them."""

SPLITS = (104, 116)
"""Of `Schedule.sparser_percent` "best". Choice: lines of the sparser engine wait for banks more
often, by a few percent to a sixth of their time on the masks at hand."""

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
    query_loads       one of `QUERY_LOADS`
    key_loads         one of `KEY_LOADS`
    index_loads       one of `INDEX_LOADS`
    index_streams     1: SDDMM writes (key, score) into the lists of their rows, and SpMM reads
                      its keys there; 2: each product has its own, and that of SDDMM says for
                      each score where it is stored
    assignment        one of `ASSIGNMENTS`
    sparser_percent   what an entry of the sparser engine takes of a line's time, of what an
                      operand of the denser one takes: lines are split accordingly; "best":
                      each call that of `SPLITS` with which the engine is faster
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
    sparser_percent: int | str = "best"
    dense_orientation: str = "best"
    vector_fusion: str = "fused"
    query_loads: str = "once"
    key_loads: str = "used"
    index_loads: str = "once"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.global_threshold is not None and self.global_threshold != "best":
            held = check_global_threshold(self.global_threshold)
            object.__setattr__(self, "global_threshold", held)
        one_of("objective", self.objective, OBJECTIVES)
        one_of("scratchpad", self.scratchpad, SCRATCHPADS)
        one_of("on_chip", self.on_chip, ON_CHIP)
        one_of("latents", self.latents, LATENTS)
        one_of("query_loads", self.query_loads, QUERY_LOADS)
        one_of("key_loads", self.key_loads, KEY_LOADS)
        one_of("index_loads", self.index_loads, INDEX_LOADS)
        if self.index_streams not in (1, 2):
            raise ValueError(f"index_streams must be one of 1, 2, got {self.index_streams!r}")
        one_of("assignment", self.assignment, ASSIGNMENTS)
        if self.sparser_percent != "best":
            held = integer("sparser_percent", self.sparser_percent, 1, MOST_PERCENT)
            object.__setattr__(self, "sparser_percent", held)
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

    @property
    def split_percent(self) -> int:
        """What lines are split by; of several the first."""
        return SPLITS[0] if isinstance(self.sparser_percent, str) else self.sparser_percent

    @classmethod
    def published(cls) -> Schedule:
        """ViTCoD's own (HPCA 2023), as far as public text gives it.

        Its script: more than 50 queries make a key global; buffers of 53, 53 and 53 KB; an index
        for each product. Section V: K-stationary, so that queries come again for each tile of
        keys that the lines hold; with the codec a token's latents come once and are decoded as
        they load, for all heads of a pass; nothing stays on chip after the projection. Dense
        products are output-stationary with tokens on the lines, as its script counts them.
        """
        return cls(
            global_threshold=PUBLISHED_GLOBAL_THRESHOLD,
            objective="bytes",
            scratchpad="fixed",
            on_chip="nothing",
            latents="fill",
            query_loads="per_key_tile",
            key_loads="all",
            index_loads="each_instance",
            index_streams=2,
            index_encoding="absolute",
            sparser_percent=100,
            mappings_stepped=1,
            dense_dataflow="os",
            dense_orientation="tokens_on_lines",
            vector_fusion="apart",
        )


DEFAULT = Schedule()
"""What is used where no schedule is given."""
