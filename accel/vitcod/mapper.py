"""Which mappings of an attention call fit the buffers, ranked by the closed forms of `estimate`.

`choose` takes the first; `run` steps the first few and takes the fastest. The estimate only
ranks; cycles come from the engine.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ...workload import Attention
from ..cache import LruCache
from ..hardware import Hardware, schedule_of
from ..schedule import DEFAULT, Schedule, UserMapping
from .estimate import WorkOfTiles, ranked
from .mapping import Mapping
from .needs import shortages
from .pattern import Pattern, patterns_of
from .regions import Cut
from .scratchpad import cut_for, kept_chunks

TILE_PARTS = (1, 2, 3, 4, 6)
"""Tiles of queries that are tried for each one that the buffers ask for."""


WORK = LruCache(64 * 1024**2)
"""What tiles ask for, by the patterns of a call and the lines."""


def choose(
    op: Attention,
    hardware: Hardware,
    schedule: Schedule = DEFAULT,
    instances: int = 1,
    on_chip_bytes: int = 0,
) -> Mapping:
    """The mapping of ``op`` that the closed forms put first; see `fitting`."""
    return fitting(op, hardware, schedule, instances, on_chip_bytes)[0]


def fitting(
    op: Attention,
    hardware: Hardware,
    schedule: Schedule = DEFAULT,
    instances: int = 1,
    on_chip_bytes: int = 0,
) -> list[Mapping]:
    """`candidates`, at least one; where ``schedule`` holds a mapping, that one alone.

    Raises ValueError where a buffer cannot hold even one query's pass, or cannot hold the
    schedule's own mapping: which, and how much it would need; and for a codec on a machine
    without a decoder.
    """
    schedule = schedule_of(hardware, schedule)
    if op.codec is not None and not hardware.decoder_macs:
        raise ValueError(
            f"{op.name} has a codec, and hardware {hardware.name!r} has decoder_macs 0: take the "
            "codec from the workload, or give the machine a decoder"
        )
    if schedule.mapping is not None:
        made = _given(op, hardware, schedule, schedule.mapping, instances > 1)
        return [with_kept(made, instances, on_chip_bytes)]
    found = candidates(op, hardware, schedule, instances, on_chip_bytes)
    if not found:
        raise ValueError(_refusal(op, hardware, schedule))
    return found


def candidates(
    op: Attention,
    hardware: Hardware,
    schedule: Schedule = DEFAULT,
    instances: int = 1,
    on_chip_bytes: int = 0,
) -> list[Mapping]:
    """Mappings that fit the buffers, the most promising first by the schedule's objective.

    For each group of heads, order of stages and number of output regions: the fewest query
    tiles that fit, and a few more, which overlap more finely.

    instances      windows of all images
    on_chip_bytes  of Q, K and V that the projection before may leave in the scratchpad
    """
    schedule, patterns = schedule_of(hardware, schedule), patterns_of(op)
    lines, cut = hardware.lines, Cut.fixed(hardware)
    found: list[Mapping] = []
    while lines and not found:  # IdxBuf may be too small for what all lines ask of it
        work = _work(op, patterns, lines)
        given = Mapping(
            op, hardware, schedule, patterns, 1, 1, 1, True, True, 2, cut, repeated=instances > 1
        )
        if lines < hardware.lines:
            given = given.using(lines=lines)
        made = [with_kept(one, instances, on_chip_bytes) for one in _all_tilings(given, work)]
        found, lines = ranked(made, work), lines // 2
    return found


def _all_tilings(given: Mapping, work: WorkOfTiles) -> list[Mapping]:
    """Mappings on the lines of ``given``, in each order of stages, group and place of latents."""
    op, schedule = given.op, given.schedule
    made: list[Mapping] = []
    for ahead in (True, False):
        for group in _groups(op) if schedule.latents != "resident" or not op.codec else ():
            made += _tilings(replace(given, group=group, ahead=ahead), work)
        if op.codec and schedule.latents != "fill":
            made += _tilings(replace(given, ahead=ahead, resident_latents=True), work)
    return made


def _given(
    op: Attention, hardware: Hardware, schedule: Schedule, asked: UserMapping, repeated: bool
) -> Mapping:
    """The user's own mapping of ``op``; raises ValueError where it does not suit the call or
    does not fit the buffers."""
    patterns = patterns_of(op)
    work = _work(op, patterns, hardware.lines)
    tiles = {"query_tile": op.queries, "key_tile": op.keys}
    sizes = {name: getattr(asked, name) or most for name, most in tiles.items()}
    _check_asked(op, asked, sizes, work)
    made = Mapping(
        op, hardware, schedule, patterns, asked.group, sizes["query_tile"], sizes["key_tile"],
        asked.whole_queries, asked.ahead, asked.output_regions, Cut.fixed(hardware),
        resident_latents=asked.resident_latents, repeated=repeated,
    )  # fmt: skip
    short = [f"{name} is {size}, it needs {need}" for name, size, need in shortages(made, work)]
    if short:
        raise ValueError(
            f"the schedule's mapping of {op.name} does not fit the machine "
            f"{hardware.name!r}: {'; '.join(short)}"
        )
    return with_cut(made)


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
    if asked.resident_latents and op.codec is None:
        refuse("resident_latents", "False for a call without codec")
    if asked.resident_latents and asked.group > 1:
        refuse("group", "1 where latents are resident: each head is decoded when it is due")
    if asked.resident_latents and sizes["key_tile"] < op.keys:
        refuse("key_tile", f"None or its {op.keys} keys where latents are resident")
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
    regions, and one where that makes the tile larger. Keys come in tiles only where all of
    them do not fit; then of the largest size that fits."""
    made: list[Mapping] = []
    for key_tile in _key_tiles(given):
        tried = replace(given, key_tile=key_tile, query_tile=1, whole_queries=False)
        if not shortages(replace(tried, output_regions=1), work):
            made += _query_tilings(tried, work)
        if made and (key_tile < given.op.keys or not _cramped(made)):
            break
    return made


def _cramped(made: list[Mapping]) -> bool:
    """Whether all keys leave room for so few queries that tiles of keys may be better."""
    op, hardware = made[0].op, made[0].hardware
    return max(mapping.query_tile for mapping in made) < min(op.queries, 2 * hardware.lines)


def _query_tilings(given: Mapping, work: WorkOfTiles) -> list[Mapping]:
    op, residences = given.op, (True, False)
    if given.group > 1 and not work.in_order:
        residences = (True,)  # a tile of queries is not the same tokens for all its heads
    if given.fetched_again:
        residences = (False,)
    made: dict[tuple[int, bool], Mapping] = {}
    for regions in (2, 1):
        largest = replace(given, output_regions=regions)
        largest = _largest_tile(largest, residences, work)
        if largest is None:
            continue
        for parts in TILE_PARTS:
            size = -(-op.queries // (len(largest.query_tiles) * parts))
            for whole in residences:
                tried = replace(largest, query_tile=size, whole_queries=whole)
                same = (size, whole or size == op.queries)
                if same not in made and not shortages(tried, work):
                    made[same] = tried
    return [with_cut(mapping) for mapping in made.values()]


def with_cut(mapping: Mapping) -> Mapping:
    """A mapping that fits, with the scratchpad cut for it."""
    if mapping.schedule.scratchpad == "fixed":
        return mapping
    return replace(mapping, cut=cut_for(mapping))


def with_kept(mapping: Mapping, instances: int, on_chip_bytes: int) -> Mapping:
    """The mapping with what stays on chip after the projection, where the schedule lets it."""
    if mapping.schedule.on_chip == "nothing" or on_chip_bytes == 0:
        return mapping
    return replace(mapping, kept=kept_chunks(mapping, instances, on_chip_bytes))


def _largest_tile(
    given: Mapping, residences: tuple[bool, ...], work: WorkOfTiles
) -> Mapping | None:
    """The fewest query tiles that fit, or None."""
    tiles, queries = 1, given.op.queries
    while True:
        tile = -(-queries // tiles)
        for whole in residences:
            made = replace(given, query_tile=tile, whole_queries=whole)
            if not shortages(made, work):
                return made
        if tile == 1:
            return None
        tiles = -(-queries // (tile - 1))


def _key_tiles(given: Mapping) -> list[int]:
    """Sizes of key tiles to try, the largest first: all keys; else so few that the next tile
    loads beside the one in work, in equal parts; down to one. Where
    queries come again for each, no more keys than the lines hold."""
    op = given.op
    if given.group > 1 or given.resident_latents:
        return [op.keys]
    sizes = [min(op.keys, given.hardware.lines) if given.fetched_again else op.keys]
    while sizes[-1] > 1:
        sizes.append(-(-op.keys // -(-op.keys // (sizes[-1] - 1))))
    return sizes


def _refusal(op: Attention, hardware: Hardware, schedule: Schedule) -> str:
    patterns = patterns_of(op)
    cut = Cut.fixed(hardware)
    least = Mapping(op, hardware, schedule, patterns, 1, 1, 1, False, False, 1, cut)
    least = least.using(lines=1)
    if op.codec and schedule.latents == "resident":
        least = replace(least, resident_latents=True, key_tile=op.keys)
    short = "; ".join(
        f"{name} is {size}, one pass needs at least {need}"
        for name, size, need in shortages(least, WorkOfTiles(op, patterns, 1))
    )
    return f"{op.name} does not fit the machine {hardware.name!r}: {short}"
