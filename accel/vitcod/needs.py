"""What a mapping asks of each buffer, and what is short."""

from __future__ import annotations

from ..dram.ddr4 import LINE_BYTES
from .estimate import WorkOfTiles
from .mapping import Mapping
from .regions import Cut
from .scratchpad import least, scratchpad_bytes

REGIONS = ("q_buffer_bytes", "k_buffer_bytes", "v_buffer_bytes", "other_buffer_bytes")
"""Fields of the hardware, in the order of `Cut`."""
SCRATCHPAD = " + ".join(REGIONS)


def shortages(mapping: Mapping, work: WorkOfTiles) -> list[tuple[str, int, int]]:
    """(field of the hardware, what it is, bytes needed) of each buffer that overflows."""
    hardware, regions = mapping.hardware, least(mapping)
    needs = _ports_needs(mapping, work)
    found = [
        (name, getattr(hardware, name), need)
        for name, need in needs.items()
        if need > getattr(hardware, name)
    ]
    if mapping.schedule.scratchpad == "fixed":
        sides = zip(REGIONS, Cut.fixed(hardware), regions, strict=True)
        return [side for side in sides if side[2] > side[1]] + found
    space = scratchpad_bytes(hardware)
    return [(SCRATCHPAD, space, sum(regions))] * (sum(regions) > space) + found


def _ports_needs(mapping: Mapping, work: WorkOfTiles) -> dict[str, int]:
    """Of the index and of the output buffer."""
    hardware, units = mapping.hardware, mapping.units_in_flight
    alive, regions = (units if mapping.ahead else 1), min(mapping.output_regions, units)
    accumulators = mapping.query_tile * mapping.value_words * hardware.macs_per_line
    scores, bitmap, entries = work.most(mapping.query_tile)
    starts, widths = max(mapping.query_tile, mapping.key_tile) + hardware.lines, mapping.widths
    lists = -(-mapping.query_tile * mapping.row_bits // 8) if mapping.one_stream else 0
    burst = LINE_BYTES if hardware.dram_model == "ddr4" else 0  # enters IdxBuf whole
    keys = -(-entries * mapping.key_bits // 8)
    entry = -(-widths.entry_bits // 8) + mapping.address_bytes
    return {
        "index_buffer_bytes": alive * (bitmap + lists)
        + -(-(starts * widths.start_bits + widths.stage_bits) // 8)
        + max(hardware.lines * entry, burst),
        "output_buffer_bytes": alive * (scores * hardware.score_bytes + keys)
        + regions * accumulators * hardware.accumulator_bytes,
    }
