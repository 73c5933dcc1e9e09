"""The time line sums to the report, and its trace is what the Trace Event Format says."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from sievit.accel import presets, simulate
from sievit.accel.schedule import Schedule
from sievit.accel.simulators.registry import SIMULATORS
from sievit.accel.trace.perfetto import trace_events, write_trace
from sievit.accel.trace.timeline import Slice, Timeline, operation_starts, record
from sievit.workload import Attention, Elementwise, Gemm, HeadCodec, Workload, polarize_head

SMALL = replace(
    presets["vitcod"],
    lines=8,
    q_buffer_bytes=2048,
    k_buffer_bytes=2048,
    output_buffer_bytes=4096,
    clock_hz=300_000_000,
    dram_bytes_per_s=10_000_000_000,
)
STEPPED = ("vitcod", "vitcod_no_codec", "vitcod_no_reorder", "vitcod_plain", "vitcod_dense")


def workload(tokens=40, heads=4) -> Workload:
    generator = np.random.default_rng(3)
    masks = []
    for head in range(heads):
        keep = generator.random((tokens, tokens)) < 0.1
        keep[:, : head + 1] = keep[0] = True
        masks.append(polarize_head(keep, tokens // 2))
    calls = [
        Attention(
            name, heads, tokens, tokens, 16, 16, masks=tuple(masks), codec=HeadCodec(heads, 2)
        )
        for name in ("first", "second")
    ]
    product = Gemm("qkv", tokens, 64, 192)
    norm = Elementwise("norm", "layer_norm", tokens * 64, tokens * 64, 128)
    return Workload("small", (norm, product, calls[0], product, calls[1]))


@pytest.fixture(scope="module")
def timelines() -> dict[str, Timeline]:
    names = [name for name in SIMULATORS if name != "released"]
    return {name: record(workload(), SMALL, name) for name in names}


def by_track(timeline: Timeline) -> dict[str, list[Slice]]:
    found = defaultdict(list)
    for piece in timeline.slices:
        found[piece.track].append(piece)
    return found


def test_the_report_is_that_of_simulate(timelines):
    for name, timeline in timelines.items():
        assert timeline.report == simulate(workload(), SMALL, name)


def test_slices_of_a_track_follow_each_other_inside_their_operation(timelines):
    for timeline in timelines.values():
        starts = [start for start, _ in operation_starts(timeline.report)]
        bounds = [*starts, timeline.report.cycles]
        for pieces in by_track(timeline).values():
            for piece, following in itertools.pairwise(pieces):
                assert piece.end <= following.start
            for piece in pieces:
                assert piece.start <= piece.end
                assert piece.end <= bounds[np.searchsorted(bounds, piece.start, side="right")]
        assert [p.start for p in by_track(timeline)["operations"]] == starts


@pytest.mark.parametrize("name", STEPPED)
def test_work_is_what_the_report_counts(timelines, name):
    timeline = timelines[name]
    report = timeline.report
    assert timeline.work("operations") == report.cycles
    stepped = timeline.work("denser lines") + timeline.work("sparser lines")
    assert stepped == report.stalls()["busy"]
    busy, dense = report.busy(), sum(op.busy["MAC lines"] for op in report.ops[1::2])
    assert timeline.work("softmax") == busy["softmax"]
    assert timeline.work("MAC lines") == dense
    decoded = timeline.work("decoder Q") + timeline.work("decoder K")
    scored = sum(op.details["scores_computed"] for op in report.attention) * 32
    assert decoded == sum(op.macs for op in report.attention) - scored
    assert (decoded > 0) == (name in ("vitcod", "vitcod_no_reorder"))


def test_bytes_are_those_of_the_data_movement(timelines):
    for timeline in timelines.values():
        expected = defaultdict(int)
        for row in timeline.report.traffic(attention_only=False):
            if row.level == "dram":
                expected[f"DRAM {row.tensor}"] += row.total_bytes
        if timeline.report.simulator in ("vitcod", "vitcod_no_reorder"):
            # What the encoders load is in the traffic of their projections.
            assert expected["DRAM codec weights"] >= timeline.work("DRAM codec weights") > 0
        for track in (track for track in timeline.tracks if track.startswith("DRAM ")):
            assert timeline.work(track) == expected[track], track


def test_nothing_works_faster_than_its_peak(timelines):
    for timeline in timelines.values():
        for piece in timeline.slices:
            peak, unit = timeline.peak(piece.track)
            if piece.track in ("denser lines", "sparser lines", "softmax", "operations"):
                assert piece.work <= peak * (piece.end - piece.start), piece
            if unit == "bytes":
                # Neighbours on a channel may share a cycle, which the first one is given.
                assert piece.work <= peak * (piece.end - piece.start + 1) + 1, piece


def test_work_between_edges_loses_nothing(timelines):
    for timeline in timelines.values():
        edges = timeline.edges(5)
        assert edges[0] == 0
        assert edges[-1] == timeline.report.cycles
        assert (np.diff(edges) > 0).all()
        for track in timeline.tracks:
            parts = timeline.work_between(track, edges)
            assert parts.min() >= 0
            assert parts.sum() == pytest.approx(timeline.work(track))
    slices = (Slice("a", "x", 0, 10, 5), Slice("a", "y", 10, 20, 40))
    small = Timeline(timelines["systolic"].report, slices)
    found = small.work_between("a", np.array([0, 4, 12, 30]))
    assert found.tolist() == pytest.approx([2, 3 + 8, 32])
    assert small.work_between("b", np.array([0, 4])).tolist() == [0]
    marked = Slice("a", "x", 0, 10, 4, marks=np.array([1, 9])).moved(100)
    assert (marked.start, marked.end, marked.marks.tolist()) == (100, 110, [101, 109])
    found = Timeline(small.report, (marked,)).work_between("a", np.array([0, 101, 105, 110]))
    assert found.tolist() == pytest.approx([2, 1, 1])


def test_dram_and_decoder_stay_under_their_peak_in_every_bin(timelines):
    """Their tokens are marked one by one; a token's last cycle counts for the whole of it."""
    for name in STEPPED:
        timeline = timelines[name]
        edges = timeline.edges(20)
        for resource in ("DRAM ", "decoder "):
            tracks = [track for track in timeline.tracks if track.startswith(resource)]
            done = sum((timeline.work_between(track, edges) for track in tracks), np.zeros(1))
            peak = timeline.peak(tracks[0])[0] if tracks else 0
            token = 4 * 16 if resource == "DRAM " else 2 * 4 * 16
            assert (done <= peak * np.diff(edges) + token * len(tracks)).all()


def test_the_trace_is_valid(timelines, tmp_path):
    path = tmp_path / "new" / "trace.json"
    write_trace(timelines.values(), path)
    trace = json.loads(path.read_text())
    assert set(trace) == {"displayTimeUnit", "traceEvents"}
    kinds = {"M": {"args"}, "X": {"ts", "dur", "args", "cat"}, "C": {"ts", "args"}}
    for event in trace["traceEvents"]:
        assert set(event) == {"name", "ph", "pid", "tid"} | kinds[event["ph"]], event
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["name"], str)
        if event["ph"] == "C":
            assert all(value >= 0 for value in event["args"].values())


def test_slices_of_a_thread_follow_each_other(timelines, tmp_path):
    write_trace(timelines.values(), tmp_path / "trace.json")
    threads, last = {}, defaultdict(float)
    for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]:
        if event["ph"] == "M" and event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
        if event["ph"] == "X":
            place = event["pid"], event["tid"]
            assert place in threads
            assert event["dur"] >= 0
            assert event["ts"] >= last[place] - 1e-9
            last[place] = event["ts"] + event["dur"]
    assert {pid for pid, _ in threads} == set(range(1, len(timelines) + 1))
    assert len(set(threads.values())) >= 12


def test_a_trace_sums_to_the_report(timelines):
    timeline = timelines["vitcod"]
    report, events = timeline.report, trace_events(timeline, 7)
    assert {event["pid"] for event in events} == {7}
    slices = [event for event in events if event["ph"] == "X"]
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)
    whole = sum(event["dur"] for event in slices if event["cat"] == "operations")
    assert whole == pytest.approx(report.seconds * 1e6, abs=0.002)


def test_lines_of_a_trace_sum_to_the_busy_cycles(timelines):
    report = timelines["vitcod"].report
    slices = [event for event in trace_events(timelines["vitcod"], 7) if event["ph"] == "X"]
    lines = [e for e in slices if e["cat"] in ("denser lines", "sparser lines")]
    busy = sum(event["args"]["work (line-cycles)"] for event in lines)
    assert busy == report.stalls()["busy"]
    softmax = sum(e["args"]["work (cycles)"] for e in slices if e["cat"] == "softmax")
    assert softmax == report.busy()["softmax"]
    assert {event["name"].split()[0] for event in lines} == {"SDDMM", "SpMM"}
    heads = {e["name"].split(",")[0] for e in lines}
    assert heads == {f"{kind} head {head}" for kind in ("SDDMM", "SpMM") for head in range(4)}


def test_counters_integrate_to_the_bytes(timelines):
    timeline = timelines["vitcod"]
    counters = [e for e in trace_events(timeline) if e["ph"] == "C" and e["name"] == "DRAM GB/s"]
    assert not any(counters[-1]["args"].values())
    total = defaultdict(float)
    for event, following in itertools.pairwise(counters):
        for tensor, rate in event["args"].items():
            total[tensor] += rate * 1e9 * (following["ts"] - event["ts"]) * 1e-6
    for tensor, size in total.items():
        assert size == pytest.approx(timeline.work(f"DRAM {tensor}"), rel=0.02), tensor


@pytest.mark.parametrize("latents", ["fill", "resident"])
@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("images", [2, 12])
def test_resident_latents_kept_chunks_and_lists_have_their_slices(images, latents, lists):
    """Each head decoded, DRAM bytes and busy lines as reported; what is on chip has no slice."""
    hardware = replace(SMALL, sorted_lists=lists, other_buffer_bytes=8192)
    schedule = Schedule(latents=latents)
    found = record(workload(), hardware, batch=images, schedule=schedule)
    expected = defaultdict(int)
    for row in found.report.traffic(attention_only=True):
        if row.level == "dram":
            expected[row.tensor] += row.total_bytes
    for tensor in ("Q", "K", "V", "latent Q and K", "output"):
        mine = [piece for piece in found.slices if piece.track == f"DRAM {tensor}"]
        slices = [piece for piece in mine if " head " in piece.name]  # of no dense product
        assert sum(piece.work for piece in slices) == expected[tensor]
        assert all(piece.work for piece in slices)
    assert (expected["latent Q and K"] > 0) == (latents == "resident" and images == 12)
    assert expected["V"] < 2 * images * 4 * 40 * 16  # of both calls: the first heads stayed
    lines = found.work("denser lines") + found.work("sparser lines")
    assert lines == found.report.stalls()["busy"]
    decoded = found.work("decoder Q") + found.work("decoder K")
    assert decoded == 2 * images * 4 * 2 * 16 * (
        40 + 40
    )  # calls, images, heads, latents, dim, tokens


def test_batches_and_bad_arguments():
    timeline = record(workload(), SMALL, batch=2)
    assert timeline.report.batch == 2
    assert any("window 1" in piece.name for piece in timeline.slices)
    with pytest.raises(ValueError, match="simulator must be one of"):
        record(workload(), SMALL, "abacus")
    with pytest.raises(ValueError, match=r"batch must be an integer in 1..1048576, got 0"):
        record(workload(), SMALL, batch=0)
