"""A DDR4 memory in numbers: its timing, its geometry and how addresses spread over it.

Times are in cycles of the memory's own clock, rounded up as a controller does. A line is the
burst of 64 bytes that a 64-bit channel moves in four cycles. Sources: JEDEC JESD79-4 names
the parameters; the values are those of an 8 Gb x8 part at 2400 MT/s in two ranks, as the
configuration of DRAMsim3 (Li et al., CAL 2020) has them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import permutations

from ...checks import check_fields

LINE_BYTES = 64
"""One burst: 8 beats of 8 bytes."""

MOST_TIME = 2**16
"""Of a time or a size of a `DramTiming`, a choice: ten times the longest of a DDR4 memory."""

MOST_CLOCK_HZ = 10**11

FIELDS = ("ro", "ra", "ba", "bg", "co", "ch")
"""Of an address: row, rank, bank, bank group, column (a line of a row), channel."""

ADDRESS_MAPS = {
    "groups_interleaved": ("ro", "ra", "co", "ba", "bg", "ch"),
    "rows_interleaved": ("ro", "ra", "ba", "bg", "co", "ch"),
}
"""Fields from the most significant down. With the groups interleaved, lines that follow each
other lie in different bank groups and go at full rate; with the rows interleaved they fill a
row of one bank first, and the rate is that of one bank group, 2/3. Channels take lines in
turn in both."""


@dataclass(frozen=True)
class DramTiming:
    """One channel of a DDR4 memory; times in its clock cycles.

    Raises ValueError, naming the field, for a value that is not an integer in its range.
    """

    clock_hz: int  # of commands: half the data rate
    ranks: int
    bank_groups: int
    banks_per_group: int
    row_lines: int  # lines of a row, all devices of a rank together
    burst: int  # data cycles of a line
    cl: int  # read command to data
    cwl: int  # write command to data
    rcd: int  # activate to read or write
    rp: int  # precharge to activate
    ras: int  # activate to precharge
    rtp: int  # read to precharge
    wr: int  # end of write data to precharge
    ccd_s: int  # column command to the next: other bank group
    ccd_l: int  # ... same bank group
    rrd_s: int  # activate to activate: other bank group
    rrd_l: int  # ... same bank group
    faw: int  # window of at most four activates of a rank
    wtr_s: int  # end of write data to read: other bank group
    wtr_l: int  # ... same bank group
    rtrs: int  # data of one rank to data of another
    rfc: int  # refresh to activate
    refi: int  # mean time between refreshes of a rank

    # The controller. Queue sizes are those that DRAMsim3 takes.
    read_queue: int = 32  # requests that wait before the banks' queues
    write_queue: int = 32
    bank_queue: int = 8  # requests that wait at each bank
    drain_above: int = 8  # writes that are worth a turnaround while no read waits
    row_hits: int = 4  # after so many, a request for another row may close the row

    def __post_init__(self) -> None:
        limits = {item.name: (1, MOST_TIME) for item in fields(self)}
        check_fields(self, limits | {"clock_hz": (1, MOST_CLOCK_HZ)})

    @property
    def banks(self) -> int:
        """Of a channel, all ranks."""
        return self.ranks * self.bank_groups * self.banks_per_group

    @property
    def peak_bytes_per_s(self) -> int:
        """Of a channel, with data in every cycle."""
        return self.clock_hz * LINE_BYTES // self.burst

    def size(self, field: str, channels: int) -> int:
        """Values that an address field below the row can take."""
        return {
            "ra": self.ranks,
            "ba": self.banks_per_group,
            "bg": self.bank_groups,
            "co": self.row_lines,
            "ch": channels,
        }[field]


DRAM_TIMINGS = {
    "ddr4_2400": DramTiming(
        clock_hz=1_200_000_000,
        ranks=2,
        bank_groups=4,
        banks_per_group=4,
        row_lines=128,
        burst=4,
        cl=17,
        cwl=12,
        rcd=17,
        rp=17,
        ras=39,
        rtp=9,
        wr=18,
        ccd_s=4,
        ccd_l=6,
        rrd_s=4,
        rrd_l=6,
        faw=26,
        wtr_s=3,
        wtr_l=9,
        rtrs=1,
        rfc=420,
        refi=9360,
    )
}
"""Named memories. 'ddr4_2400': 19.2e9 bytes/s a channel, ViTCoD's memory has four."""


def checked_map(address_map: str) -> tuple[str, ...]:
    """Fields of a named map, or of one spelt out from the top, "ro-ra-co-ba-bg-ch"."""
    if address_map in ADDRESS_MAPS:
        return ADDRESS_MAPS[address_map]
    fields = tuple(address_map.split("-"))
    if fields not in set(permutations(FIELDS)) or fields[0] != "ro":
        raise ValueError(
            f"address map must be one of {', '.join(ADDRESS_MAPS)} or the fields "
            f"{'-'.join(FIELDS)} in any order with the row first, got {address_map!r}"
        )
    return fields
