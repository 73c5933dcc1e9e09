"""Data movement's share of latency, as the paper has it, beside ours: rows of `paper`.

By ViTCoD's own schedule and by the default one, and with a codec in blocks of few heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean

from ..accel import Hardware, Report
from ..accel.simulate import simulate_silently
from ..workload import Attention, HeadCodec, Workload
from .paper_case import OWN_SCHEDULE, Row, Run, over
from .published import HEADLINES

WAITS = ("load", "decode", "store")
WHY_MOVEMENT = {
    "published": "Nothing stays on chip and plain queries come again for each tile of keys, as "
    "the paper has it; where 53 KB do not hold all heads decoded, latents come more than once.",
    "unhidden": "If loads hid behind nothing: what a better schedule keeps on chip it does not "
    "load, so that little is left for a codec to save.",
    "waited": "Loads run beside computing here, so that little of the time is spent on them.",
}


def movement_rows(runs: Sequence[Run], hardware: Hardware) -> Iterator[Row]:
    """Readings of a share of latency, without codec and with it, by ViTCoD's own schedule and by
    the default one; and with a codec in blocks of few heads."""
    cut = [_in_blocks(run.case.workload) for run in runs]
    blocks = []
    if any(op.codec and op.codec.groups > 1 for workload in cut for op in workload.attention):
        blocks = [simulate_silently(workload, hardware) for workload in cut]
    for key, simulator, name in (
        ("movement_plain", "vitcod_no_codec", "no codec"),
        ("movement_codec", "vitcod", "codec of one block"),
    ):
        script = _script_shares(runs, hardware, codec=key == "movement_codec")
        own = [run.own[simulator] for run in runs]
        yield from _shares(key, f"{name}, {OWN_SCHEDULE}", own, runs, script, "published")
        reports = [run.reports[simulator] for run in runs]
        yield from _shares(key, name, reports, runs, None, "unhidden")
    if blocks:
        yield from _shares(
            "movement_codec", "codec in small blocks", blocks, runs, None, "unhidden"
        )


def _shares(
    key: str, name: str, reports: Sequence[Report], runs: Sequence[Run], script: float | None,
    why: str,
) -> Iterator[Row]:  # fmt: skip
    figure, named = HEADLINES[key], over(runs)
    moved = fmean(report.dram_bytes() for report in reports) / 1e3
    for text, share, reason, released in (
        (f"{name}, {moved:,.0f} kB: DRAM at work over latency, batch 1", _at_work, why, script),
        (f"{name}: DRAM over DRAM + MAC line cycles, batch 1", _unhidden, why, None),
        (
            f"{name}: cycles in which the array waits for loads, decoding or stores, batch 1",
            _waited,
            "waited",
            None,
        ),
    ):
        ours = fmean(map(share, reports))
        yield Row(figure, released, ours, "simulated", text, named, WHY_MOVEMENT[reason])


def _at_work(report: Report) -> float:
    return sum(op.busy.get("DRAM", 0) for op in report.attention) / report.attention_cycles


def _unhidden(report: Report) -> float:
    busy = [sum(op.busy.get(name, 0) for op in report.attention) for name in ("DRAM", "MAC lines")]
    return busy[0] / sum(busy)


def _waited(report: Report) -> float:
    phases = report.phases()
    return sum(phases.get(name, 0) for name in WAITS) / report.attention_cycles


def _script_shares(runs: Sequence[Run], hardware: Hardware, codec: bool) -> float | None:
    """Preloading over all that the script counts; without a codec nothing is decoded."""
    shares = []
    for run in runs:
        if run.released is None:
            continue
        workload = run.case.workload if codec else _with_codecs(run.case.workload, lambda op: None)
        details = simulate_silently(workload, hardware, "released").attention[0].details
        loading, decoding, computing = (
            float(details[name]) for name in ("preloading", "processing", "computation")
        )
        shares.append(loading / (loading + (decoding if codec else 0) + computing))
    return fmean(shares) if shares else None


def _in_blocks(workload: Workload) -> Workload:
    """The codecs of ``workload`` in as many blocks as heads and latent heads allow."""

    def blocks(op: Attention) -> HeadCodec | None:
        if op.codec is None:
            return None
        most = max(
            n
            for n in range(1, op.codec.latent_heads + 1)
            if op.heads % n == 0 and op.codec.latent_heads % n == 0
        )
        return replace(op.codec, groups=most)

    return _with_codecs(workload, blocks)


def _with_codecs(workload: Workload, codec: Callable[[Attention], HeadCodec | None]) -> Workload:
    masks = [op.masks for op in workload.attention]
    return workload.with_polarized(masks, [codec(op) for op in workload.attention])
