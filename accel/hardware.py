"""The machine that is simulated: sizes, rates and widths (ViTCoD, HPCA 2023, section V).

Each default is the figure that ViTCoD gives, where it gives one; where it gives none, the
comment says "choice" and the field is there to be swept. Variation is by
`dataclasses.replace`. Bytes are bytes (1 KB = 1024 B in buffer sizes, as the released
script has it), rates are per second or per cycle, gigabytes of bandwidth are decimal.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from ..checks import check_fields, one_of
from ..moved import old_names
from .dram.bandwidth import MOST_CHANNELS, stream_efficiency
from .dram.ddr4 import DRAM_TIMINGS, checked_map
from .schedule import DEFAULT, Schedule

__all__ = ["DRAM_MODELS", "Hardware", "presets", "schedule_of"]

DRAM_MODELS = ("flat", "ddr4")
"""The full bandwidth at any address after a fixed latency; or banks, rows, queues and refresh
(`sievit.accel.dram.controller`), where the bandwidth is that of a whole number of channels."""

MOST_LINES = 2**16
MOST_PORTS = 2**20
MOST_WIDTH = 64
MOST_CLOCK_HZ = 10**11
MOST_BYTES_PER_S = 10**15
MOST_LATENCY_CYCLES = 10**9
MOST_STEPPED_LATENCY_CYCLES = 10**7
LEAST_STEPPED_CLOCK_HZ = 10**6
"""Choices, all far from what can be built: with them each number of the compiled core but
amounts of a whole run, which `sievit.accel.vitcod.core.limits` looks at, is one of 64 bits, and
a machine has so few lines and banks that their registers can be held. "stepped": of the memory
model "ddr4", whose refreshes are stepped through the longest wait, and whose clock runs
`DRAM_TIMINGS` cycles beside each of the machine's."""

RANGES: dict[str, tuple[int, int]] = {
    "clock_hz": (1, MOST_CLOCK_HZ),
    "lines": (1, MOST_LINES),
    "macs_per_line": (1, MOST_LINES),
    "pipeline_cycles": (0, MOST_LATENCY_CYCLES),
    "reconfigure_cycles": (0, MOST_LATENCY_CYCLES),
    "softmax_latency_cycles": (0, MOST_LATENCY_CYCLES),
    "dram_latency_cycles": (0, MOST_LATENCY_CYCLES),
    "q_banks": (1, MOST_PORTS),
    "k_banks": (1, MOST_PORTS),
    "v_banks": (1, MOST_PORTS),
    "output_banks": (1, MOST_PORTS),
    "latent_banks": (1, MOST_PORTS),
    "index_entries_per_cycle": (1, MOST_PORTS),
    "softmax_lanes": (1, MOST_PORTS),
    "vector_lanes": (1, MOST_PORTS),
    "encoder_macs": (0, MOST_PORTS),
    "decoder_macs": (0, MOST_PORTS),
    "dram_bytes_per_s": (1, MOST_BYTES_PER_S),
    "operand_bytes": (1, MOST_WIDTH),
    "score_bytes": (1, MOST_WIDTH),
    "accumulator_bytes": (1, MOST_WIDTH),
}
"""Least and most of the fields of `Hardware`; buffers have 1 byte to 1 TiB."""


@dataclass(frozen=True)
class Hardware:
    """A ViTCoD-style accelerator; the defaults are the published machine.

    How it is used is a `Schedule`. Raises ValueError, naming the field, for a value of
    another type, a size out of its range (`RANGES`) and an unknown name.
    """

    name: str = "vitcod"

    # Compute. ViTCoD: 512 MACs at 500 MHz, int8; its script's flags say 64 x 8.
    clock_hz: int = 500_000_000
    lines: int = 64
    macs_per_line: int = 8
    pipeline_cycles: int = 4  # choice: SRAM read, multiply, adder tree, accumulate
    reconfigure_cycles: int = 4  # choice: to change the denser/sparser split

    # Buffers. ViTCoD's script: Q, K, V 53 KB, index 20 KB, output 108 KB, of 320 KB in all.
    q_buffer_bytes: int = 53 * 1024
    k_buffer_bytes: int = 53 * 1024
    v_buffer_bytes: int = 53 * 1024
    index_buffer_bytes: int = 20 * 1024
    output_buffer_bytes: int = 108 * 1024  # scores and output accumulators
    other_buffer_bytes: int = 33 * 1024  # the rest: codec weights, latents in decoding, bias

    # Ports. A bank is one word (macs_per_line operands) wide, one read and one write a cycle.
    q_banks: int = 32  # choice
    k_banks: int = 32  # choice
    v_banks: int = 32  # choice
    output_banks: int = 32  # choice: of macs_per_line accumulators, one add a cycle
    latent_banks: int = 32  # choice: of the region that latents stay in
    index_entries_per_cycle: int = 8  # choice: what 64 lines use at 64 dimensions a head

    # Units beside the lines. The paper gives no counts: all choices. The MACs of encoder and
    # decoder come on top of those of the lines; 0 is a machine without a codec.
    softmax_lanes: int = 8
    softmax_latency_cycles: int = 16
    sorted_lists: bool = True  # choice: see `sievit.accel.vitcod.coded`
    encoder_macs: int = 64
    decoder_macs: int = 256
    vector_lanes: int = 64  # norms, activations, residual adds

    # DRAM. ViTCoD: DDR4-2400, 76.8 GB/s. Latency is a choice: 50 ns, about an ACT and a read.
    dram_bytes_per_s: int = 76_800_000_000
    dram_latency_cycles: int = 25
    # The model "ddr4" takes that bandwidth as the peak of its channels, that latency as the
    # least; "flat" does not look at timing and map.
    dram_model: str = "flat"
    dram_timing: str = "ddr4_2400"
    dram_map: str = "groups_interleaved"

    # Widths. ViTCoD: int8. Scores 16 bits and accumulators 32 bits are choices.
    operand_bytes: int = 1
    score_bytes: int = 2
    accumulator_bytes: int = 4

    def __new__(cls, *_sizes: Any, **given: Any) -> Hardware:
        """Takes the policies of earlier versions as well: see `HardwareWithPolicies`."""
        if cls is Hardware and not POLICIES.isdisjoint(given):
            _warn_of_policies(sorted(POLICIES & set(given)))
            return object.__new__(HardwareWithPolicies)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_fields(self, RANGES)
        one_of("dram_model", self.dram_model, DRAM_MODELS)
        one_of("dram_timing", self.dram_timing, tuple(DRAM_TIMINGS))
        checked_map(self.dram_map)
        if self.dram_model == "ddr4":
            self._check_stepped_memory()

    def _check_stepped_memory(self) -> None:
        peak, most = DRAM_TIMINGS[self.dram_timing].peak_bytes_per_s, MOST_CHANNELS
        if self.dram_bytes_per_s % peak or self.dram_bytes_per_s > most * peak:
            raise ValueError(
                f"dram_bytes_per_s must be a multiple of {peak}, the peak of a channel of "
                f"{self.dram_timing}, with the model 'ddr4', and at most {most} channels, got "
                f"{self.dram_bytes_per_s}"
            )
        limits = {name: RANGES[name] for name in RANGES if name.endswith("_cycles")}
        limits = {name: (least, MOST_STEPPED_LATENCY_CYCLES) for name, (least, _) in limits.items()}
        limits["clock_hz"] = (LEAST_STEPPED_CLOCK_HZ, MOST_CLOCK_HZ)
        for name, (least, limit) in limits.items():
            value = getattr(self, name)
            if not least <= value <= limit:
                raise ValueError(
                    f"{name} must be in {least}..{limit} with the model 'ddr4', got {value}"
                )

    @property
    def macs(self) -> int:
        """MACs of the lines that can run in one cycle: the codec's are beside them."""
        return self.lines * self.macs_per_line

    @property
    def codec_macs(self) -> int:
        """MACs of encoder and decoder, which run nothing but the codec."""
        return self.encoder_macs + self.decoder_macs

    @property
    def total_macs(self) -> int:
        """MACs of the lines and of the codec."""
        return self.macs + self.codec_macs

    @property
    def word_bytes(self) -> int:
        """Bytes that a bank gives, and a line takes, in one cycle."""
        return self.macs_per_line * self.operand_bytes

    @property
    def sram_bytes(self) -> int:
        """All buffers together."""
        sizes = asdict(self)
        return sum(value for name, value in sizes.items() if name.endswith("_buffer_bytes"))

    @property
    def dram_bytes_per_cycle(self) -> Fraction:
        """Exact: 768/5 bytes for the published machine."""
        return Fraction(self.dram_bytes_per_s, self.clock_hz)

    @property
    def dram_channels(self) -> int:
        """Of the model "ddr4"."""
        return self.dram_bytes_per_s // DRAM_TIMINGS[self.dram_timing].peak_bytes_per_s

    @property
    def dram_stream_bytes_per_cycle(self) -> Fraction:
        """What one long stream of reads reaches: all of the bandwidth in the flat model, what
        `sievit.accel.dram.bandwidth.stream_efficiency` measures in the other."""
        if self.dram_model == "flat":
            return self.dram_bytes_per_cycle
        share = stream_efficiency(self.dram_timing, self.dram_map, self.dram_channels)
        return self.dram_bytes_per_cycle * share

    def seconds(self, cycles: int) -> float:
        """Time of ``cycles`` at this clock."""
        return cycles / self.clock_hz

    def dram_cycles(self, size_bytes: int) -> int:
        """Cycles in which the DRAM moves ``size_bytes`` as a stream, rounded up."""
        rate = self.dram_stream_bytes_per_cycle
        return -(-size_bytes * rate.denominator // rate.numerator)


@dataclass(frozen=True)
class HardwareWithPolicies(Hardware):
    """A `Hardware` that still holds what is a `Schedule`'s today, for one version: what
    ``Hardware(assignment=...)`` makes, and ``replace(hardware, assignment=...)``."""

    assignment: str = DEFAULT.assignment
    mappings_stepped: int = DEFAULT.mappings_stepped
    dense_dataflow: str = DEFAULT.dense_dataflow
    dense_fill: str = DEFAULT.dense_fill

    def __post_init__(self) -> None:
        super().__post_init__()
        self.schedule  # noqa: B018 (checks them)

    @property
    def schedule(self) -> Schedule:
        """The policies that it holds."""
        return Schedule(**{name: getattr(self, name) for name in POLICIES})

    @property
    def without_policies(self) -> Hardware:
        """The machine alone."""
        sizes = asdict(self)
        return Hardware(**{name: sizes[name] for name in sizes if name not in POLICIES})


POLICIES = frozenset(HardwareWithPolicies.__annotations__)
"""Fields of `Schedule` that were fields of `Hardware` in earlier versions."""


def _warn_of_policies(names: list[str]) -> None:
    given = ", ".join(f"{name}=..." for name in names)
    warnings.warn(
        f"{', '.join(names)} of Hardware belong to Schedule now: give simulate, explore or "
        f"record schedule=Schedule({given}); the old fields go with the next version",
        DeprecationWarning,
        stacklevel=3,
    )


def schedule_of(hardware: Hardware, schedule: Schedule) -> Schedule:
    """The schedule of a run: ``schedule``, or the policies that ``hardware`` still holds
    where none was given. Raises ValueError where both are there and differ."""
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule must be a Schedule, got {schedule!r}")
    if not isinstance(hardware, HardwareWithPolicies) or schedule == hardware.schedule:
        return schedule
    if schedule is DEFAULT:
        return hardware.schedule
    raise ValueError(
        f"hardware holds {hardware.schedule}, schedule is {schedule}: give one of them"
    )


presets: dict[str, Hardware] = {
    "vitcod": Hardware(),
    "vitcod_ddr4": Hardware(name="vitcod_ddr4", dram_model="ddr4"),
    "vitcod_64_banks": Hardware(
        name="vitcod_64_banks",
        q_banks=64,
        k_banks=64,
        v_banks=64,
        output_banks=64,
        latent_banks=64,
    ),
}
"""Named machines. 'vitcod' (the default of `simulate`) is the only one whose sizes are
published; 'vitcod_ddr4' is the same machine with its memory stepped command by command, and
'vitcod_64_banks' has a bank for every line in each banked buffer, where 'vitcod' has one for
two: fewer waits, and a crossbar of twice the area (`sievit.accel.report.energy.area`). Others are
made with `dataclasses.replace`."""


def apart(hardware: Hardware, schedule: Schedule) -> tuple[Hardware, Schedule]:
    """The machine alone, and the schedule of a run on it (`schedule_of`)."""
    used = schedule_of(hardware, schedule)
    if isinstance(hardware, HardwareWithPolicies):
        hardware = hardware.without_policies
    return hardware, used


def as_dict(hardware: Hardware, schedule: Schedule) -> dict[str, Any]:
    """``hardware`` for JSON, with the policies that readers of earlier versions look for."""
    policies = {name: getattr(schedule, name) for name in sorted(POLICIES)}
    return asdict(hardware) | policies


__getattr__ = old_names(__name__)
