"""Which mappings of an attention call fit the buffers, ranked by the closed forms of `estimate`.

`choose` takes the first; `run` steps the first few and takes the fastest. The estimate only
ranks; cycles come from the engine.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ...workload import Attention
from ..cache import LruCache
from ..dram.ddr4 import LINE_BYTES
from ..hardware import Hardware, schedule_of
from ..schedule import DEFAULT, Schedule, UserMapping
from .estimate import WorkOfTiles, ranked
from .mapping import Mapping, padded_bytes
from .pattern import Pattern, patterns_of

TILE_PARTS = (1, 2, 3)
"""Tiles of queries that are tried for each one that the buffers ask for."""


WORK = LruCache(64 * 1024**2)
"""What tiles ask for, by the patterns of a call and the lines."""


def choose(op: Attention, hardware: Hardware, schedule: Schedule = DEFAULT) -> Mapping:
    """The mapping of ``op`` that the closed forms put first; raises as `fitting`."""
    return fitting(op, hardware, schedule)[0]


def fitting(op: Attention, hardware: Hardware, schedule: Schedule = DEFAULT) -> list[Mapping]:
    """`candidates`, at least one; where ``schedule`` holds a mapping, that one alone.

    Raises ValueError where a buffer cannot hold even one query's pass, or cannot hold the
    schedule's own mapping: which, and how much it would need.
    """
    schedule = schedule_of(hardware, schedule)
    if schedule.mapping is not None:
        return [_given(op, hardware, schedule, schedule.mapping)]
    made = candidates(op, hardware, schedule)
    if not made:
        raise ValueError(_refusal(op, hardware, schedule))
    return made


def candidates(op: Attention, hardware: Hardware, schedule: Schedule = DEFAULT) -> list[Mapping]:
    """Mappings that fit the buffers, the most promising first.

    For each group of heads, order of stages and number of output regions: the fewest query
    tiles that fit, and a few more, which overlap more finely.
    """
    schedule, patterns = schedule_of(hardware, schedule), patterns_of(op)
    work = _work(op, patterns, hardware.lines)
    made: list[Mapping] = []
    for group in _groups(op):
        for ahead in (True, False):
            given = Mapping(op, hardware, schedule, patterns, group, 1, 1, True, ahead, 2)
            made += _tilings(given, work)
    return ranked(made, work)


def _given(op: Attention, hardware: Hardware, schedule: Schedule, asked: UserMapping) -> Mapping:
    """The user's own mapping of ``op``; raises ValueError where it does not suit the call or
    does not fit the buffers."""
    patterns = patterns_of(op)
    work = _work(op, patterns, hardware.lines)
    tiles = {"query_tile": op.queries, "key_tile": op.keys}
    sizes = {name: getattr(asked, name) or most for name, most in tiles.items()}
    _check_asked(op, asked, sizes, work)
    made = Mapping(
        op, hardware, schedule, patterns, asked.group, sizes["query_tile"], sizes["key_tile"],
        asked.whole_queries, asked.ahead, asked.output_regions,
    )  # fmt: skip
    short = [f"{name} is {getattr(hardware, name)}, it needs {need}"
             for name, need in _shortages(made, work)]  # fmt: skip
    if short:
        raise ValueError(
            f"the schedule's mapping of {op.name} does not fit the machine "
            f"{hardware.name!r}: {'; '.join(short)}"
        )
    return made


def _check_asked(
    op: Attention, asked: UserMapping, sizes: dict[str, int], work: WorkOfTiles
) -> None:
    """Raises ValueError for a mapping that the call cannot have, whatever the buffers."""

    def refuse(field: str, must: str) -> None:
        raise ValueError(
            f"the schedule's mapping of {op.name}: {field} must be {must}, got "
            f"{getattr(asked, field)}"
        )

    if asked.group not in _groups(op):
        refuse("group", f"one of {', '.join(map(str, _groups(op)))}")
    if sizes["query_tile"] > op.queries:
        refuse("query_tile", f"None or at most its {op.queries} queries")
    if sizes["key_tile"] > op.keys:
        refuse("key_tile", f"None or at most its {op.keys} keys")
    if asked.group > 1 and sizes["key_tile"] < op.keys:
        refuse("key_tile", f"None or its {op.keys} keys for a group of {asked.group} heads")
    if asked.group > 1 and not work.in_order and not asked.whole_queries:
        refuse("whole_queries", "True for heads of a group that order their queries apart")


def _work(op: Attention, patterns: tuple[Pattern, ...], lines: int) -> WorkOfTiles:
    """Kept for all machines that have these patterns and lines."""
    digests = tuple(pattern.digest for pattern in patterns)
    made = partial(WorkOfTiles, op, patterns, lines)
    if not all(digests):
        return made()
    kept_alive = sum(pattern.held_bytes for pattern in patterns)
    return WORK.get((digests, lines), made, lambda work: kept_alive)


def _groups(op: Attention) -> list[int]:
    """Heads that may be decoded together: divisors of the heads of a codec block."""
    block = op.heads // op.codec.groups if op.codec else 1
    return [group for group in range(1, block + 1) if block % group == 0]


def _tilings(given: Mapping, work: WorkOfTiles) -> list[Mapping]:
    """``given`` with the largest query tile that fits, and with parts of it: two output
    regions, and one where that makes the tile larger."""
    op, residences = given.op, (True, False)
    if given.group > 1 and not work.in_order:
        residences = (True,)  # a tile of queries is not the same tokens for all its heads
    key_tile = _key_tile(op, given.hardware, given.group)
    if key_tile == 0 or (given.group > 1 and key_tile < op.keys):
        return []
    made: dict[tuple[int, bool], Mapping] = {}
    for regions in (2, 1):
        largest = replace(given, key_tile=key_tile, output_regions=regions)
        largest = _largest_tile(largest, residences, work)
        if largest is None:
            continue
        for parts in TILE_PARTS:
            size = -(-op.queries // (len(largest.query_tiles) * parts))
            for whole in residences:
                tried = replace(largest, query_tile=size, whole_queries=whole)
                same = (size, whole or size == op.queries)
                if same not in made and not _shortages(tried, work):
                    made[same] = tried
    return list(made.values())


def _largest_tile(
    given: Mapping, residences: tuple[bool, ...], work: WorkOfTiles
) -> Mapping | None:
    """The fewest query tiles that fit, or None."""
    tiles, queries = 1, given.op.queries
    while True:
        tile = -(-queries // tiles)
        for whole in residences:
            made = replace(given, query_tile=tile, whole_queries=whole)
            if not _shortages(made, work):
                return made
        if tile == 1:
            return None
        tiles = -(-queries // (tile - 1))


def _key_tile(op: Attention, hardware: Hardware, group: int) -> int:
    """Keys of a tile: all where K and V fit, else half a buffer, so that the next one loads
    beside it (a buffer of one key holds that)."""
    key_row = group * padded_bytes(op.key_dim, hardware)
    value_row = padded_bytes(op.value_dim, hardware)
    fit = min(hardware.k_buffer_bytes // key_row, hardware.v_buffer_bytes // value_row)
    if fit >= op.keys:
        return op.keys
    half = min(hardware.k_buffer_bytes // 2 // key_row, hardware.v_buffer_bytes // 2 // value_row)
    if half == 0:
        return fit
    tiles = -(-op.keys // half)
    return -(-op.keys // tiles)


def _shortages(mapping: Mapping, work: WorkOfTiles) -> list[tuple[str, int]]:
    """(field of the hardware, bytes needed) of each buffer that the mapping overflows."""
    op, hardware = mapping.op, mapping.hardware
    units = op.heads * -(-op.queries // mapping.query_tile)
    alive = 2 if mapping.ahead and units > 1 else 1
    regions = min(mapping.output_regions, units)
    accumulators = mapping.query_tile * mapping.value_words * hardware.macs_per_line
    scores, bitmap = work.most(mapping.query_tile)
    starts = max(mapping.query_tile, mapping.key_tile) + hardware.lines
    row = mapping.key_words * hardware.word_bytes
    latents = 2 * mapping.token_bytes + mapping.codec_bytes if op.codec else 0
    burst = LINE_BYTES if hardware.dram_model == "ddr4" else 0  # enters IdxBuf whole
    needs = {
        "q_buffer_bytes": mapping.group * _resident_queries(mapping) * row,
        "k_buffer_bytes": mapping.group * mapping.key_tile * row,
        "v_buffer_bytes": mapping.key_tile * mapping.value_words * hardware.word_bytes,
        "index_buffer_bytes": alive * bitmap
        + starts * mapping.start_bytes
        + max(hardware.lines * mapping.entry_bytes, burst),
        "output_buffer_bytes": alive * scores * hardware.score_bytes
        + regions * accumulators * hardware.accumulator_bytes,
        "other_buffer_bytes": latents + (0 if mapping.bias_stays else mapping.pass_bias_bytes),
    }
    return [(name, need) for name, need in needs.items() if need > getattr(hardware, name)]


def _resident_queries(mapping: Mapping) -> int:
    """All of them, or two tiles, so that the next one loads beside the one in work (a buffer
    of one query holds that)."""
    tile, queries = mapping.query_tile, mapping.op.queries
    if mapping.whole_queries:
        return queries
    return min(2 * tile, queries) if tile > 1 else 1


def _refusal(op: Attention, hardware: Hardware, schedule: Schedule) -> str:
    patterns = patterns_of(op)
    key_tile = max(_key_tile(op, hardware, 1), 1)
    least = Mapping(op, hardware, schedule, patterns, 1, 1, key_tile, False, False, 1)
    short = "; ".join(
        f"{name} is {getattr(hardware, name)}, one pass needs at least {need}"
        for name, need in _shortages(least, WorkOfTiles(op, patterns, hardware.lines))
    )
    return f"{op.name} does not fit the machine {hardware.name!r}: {short}"
