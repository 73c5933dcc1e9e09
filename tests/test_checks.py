"""Every field of every dataclass of sizes and policies: what it may not hold is refused by the
field's name with the value, what it may hold runs."""

from __future__ import annotations

import re
import time
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.accel import Hardware, Schedule, presets, simulate
from sievit.accel.arithmetic import Arithmetic
from sievit.accel.dram.ddr4 import DRAM_TIMINGS
from sievit.accel.hardware import RANGES
from sievit.accel.schedule import UserMapping
from sievit.accel.simulators.registry import SIMULATORS
from sievit.accel.vitcod.run import run_attention
from sievit.checks import check_fields, integer, share
from sievit.workload import (
    Attention,
    AttentionMask,
    Conv,
    Deform,
    Elementwise,
    Gemm,
    HeadCodec,
    PolarizedMask,
    Unknown,
    Unused,
    Workload,
    polarize_head,
)

fast = settings(derandomize=True, deadline=None, max_examples=60)

KEEP = np.random.default_rng(0).random((2, 9, 9)) < 0.4
CALL = Attention("call", 2, 9, 9, 8, 8, masks=tuple(polarize_head(h, 0.5) for h in KEEP))

MADE = [
    Hardware(),
    Schedule(),
    UserMapping(query_tile=4, key_tile=4),
    HeadCodec(4, 2, 2),
    Gemm("gemm", 4, 5, 6),
    Conv("conv", 4, 4, (5, 5), (5, 5), (3, 3)),
    Deform("deform", 4, 2, 9, (5, 5), 25),
    Elementwise("gelu", "gelu", 4, 4),
    Unknown("other", "other", 4, 4),
    Unused("weight", 4),
    replace(CALL, codec=HeadCodec(2, 1)),
    Workload("network", (CALL,)),
    AttentionMask((KEEP,), 3),
    polarize_head(KEEP[0], 0.5),
    DRAM_TIMINGS["ddr4_2400"],
    Arithmetic(),
    *(entry.parameters for entry in SIMULATORS.values() if fields(entry.parameters)),
]
CASES = [(made, item.name) for made in MADE for item in fields(made) if item.name != "keep"]
IDS = [f"{type(made).__name__}.{field}" for made, field in CASES]

NEVER = [object(), {}, 1j, [object()], b"3"]
"""What no field takes."""
WRONG = {
    int: [True, 1.5, 2.0, "3", None, float("nan"), 10**30, -1, -(10**30), np.float64(2), np.True_],
    float: [True, "3", None, float("nan"), float("inf"), -0.1, 10**30],
    bool: [0, 1, "yes", None, 1.0],
    str: [0, True, None, 1.5],
}


def wrong_values(made, field):
    """Values that ``field`` does not take, by the type of what it holds."""
    held = getattr(made, field)
    wrong = NEVER + WRONG.get(type(held), [])
    optional = next(item.type for item in fields(made) if item.name == field)
    if "None" in str(optional):
        wrong = [value for value in wrong if value is not None]
    if field in ("lsb_share", "head_share"):
        return wrong
    if field == "global_threshold":
        return [*NEVER, True, -1, 1.5, float("nan"), 10**30, "some", [3]]
    return wrong


@pytest.mark.parametrize(("made", "field"), CASES, ids=IDS)
def test_wrong_values_are_refused_by_name(made, field):
    wrong = wrong_values(made, field)
    assert len(wrong) >= 5
    for value in wrong:
        with pytest.raises(ValueError, match=rf"\b{field}\b|{field}\[") as refusal:
            replace(made, **{field: value})
        assert shown(value) & set(re.findall(r"got .*", str(refusal.value), re.DOTALL)), value


def shown(value):
    """What a refusal says of ``value``: itself, or of an array its type and shape."""
    array = np.array(value)
    return {f"got {value!r}", f"got {value}", f"got {array.dtype} {list(array.shape)}"} | {
        f"got {item!r}" for item in (value if isinstance(value, list | dict | bytes) else ())
    }


@pytest.mark.parametrize(("made", "field"), CASES, ids=IDS)
def test_integers_and_truths_of_numpy_are_held_as_pythons(made, field):
    held = getattr(made, field)
    if type(held) is int:
        again = getattr(replace(made, **{field: np.int64(held)}), field)
    elif type(held) is bool:
        again = getattr(replace(made, **{field: np.bool_(held)}), field)
    else:
        return
    assert type(again) is type(held)
    assert again == held


@pytest.mark.parametrize("field", RANGES)
def test_both_ends_of_a_range_are_taken_and_nothing_beyond(field):
    least, most = RANGES[field]
    for value in (least, most):
        assert getattr(replace(Hardware(), **{field: value}), field) == value
    for value in (least - 1, most + 1):
        said = f"{field} must be an integer in {least}..{most}, got {value}"
        with pytest.raises(ValueError, match=re.escape(said)):
            replace(Hardware(), **{field: value})


def test_every_size_of_a_machine_has_a_range():
    """A field that is added gets one, or is a buffer."""
    sizes = {item.name for item in fields(Hardware) if item.type == "int"}
    assert set(RANGES) == {name for name in sizes if not name.endswith("_buffer_bytes")}


@pytest.fixture(scope="module")
def compiled():
    """The core is compiled, so that a test may look at the time of a run."""
    run_attention(CALL, presets["vitcod_ddr4"])


@st.composite
def machines(draw):
    """Any machine that `Hardware` takes: a few fields anywhere in their ranges, the ends too."""
    changed = draw(st.lists(st.sampled_from(sorted(RANGES)), min_size=1, max_size=4, unique=True))
    given_values = {}
    for field in changed:
        least, most = RANGES[field]
        bits = draw(st.integers(0, most.bit_length()))
        near = draw(st.integers(-3, 3))
        given_values[field] = min(max(2**bits + near, least), most)
    return replace(presets["vitcod"], **given_values)


@pytest.mark.usefixtures("compiled")
@fast
@given(machines(), st.sampled_from([None, HeadCodec(2, 1)]))
def test_a_machine_that_is_taken_runs_or_says_what_is_short(hardware, codec):
    """No overflow, no endless run: the law of bandwidth holds, and time is that of a host."""
    began, run, said = time.process_time(), None, ""
    try:
        run = run_attention(replace(CALL, codec=codec), hardware)
    except ValueError as refusal:
        said = str(refusal)
    if run is None:
        assert re.search("does not fit|more than the simulator can count|has decoder_macs 0", said)
    else:
        rate = hardware.dram_bytes_per_cycle
        moved = sum(run.program.dram_bytes(channel) for channel in range(7))
        assert run.trace.count("dram_units") == moved * rate.denominator
        assert run.cycles * rate >= moved
        assert run.trace.stage_stalls.min() >= 0
        lines = run.trace.stage_stalls.sum() + run.trace.count("tail_cycles") * hardware.lines
        assert lines == run.cycles * hardware.lines
    assert time.process_time() - began < 20


STEPPED = presets["vitcod_ddr4"]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    "change",
    [
        {"clock_hz": 10**6},
        {"clock_hz": 10**7 + 3},
        {"clock_hz": 10**11},
        {"clock_hz": 10**9 + 7, "dram_latency_cycles": 10**7},
        {"dram_latency_cycles": 10**7, "pipeline_cycles": 10**7},
        {"reconfigure_cycles": 10**7, "softmax_latency_cycles": 10**7},
        {"dram_bytes_per_s": 16 * 19_200_000_000},
    ],
    ids=str,
)
def test_a_stepped_memory_beside_any_clock_and_latency_comes_to_an_end(change):
    began = time.process_time()
    hardware = replace(STEPPED, **change)
    cycles = run_attention(CALL, hardware).cycles
    assert cycles > hardware.dram_latency_cycles
    assert time.process_time() - began < 30


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dram_latency_cycles", 10**9),
        ("pipeline_cycles", 10**8),
        ("clock_hz", 10**5),
        ("dram_bytes_per_s", 257 * 19_200_000_000),
        ("dram_bytes_per_s", 50_000_000_000),
    ],
)
def test_what_cannot_be_stepped_in_time_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be .* 'ddr4'.* got {value}"):
        replace(STEPPED, **{field: value})


def test_a_bandwidth_whose_bytes_do_not_fit_64_bits_is_refused_by_name():
    wide = Attention("wide", 2, 400, 400, 2**14, 2**14)
    odd = Hardware(
        clock_hz=10**11,
        dram_bytes_per_s=76_800_000_001,
        macs_per_line=2**14,
        **{f"{name}_buffer_bytes": 2**30 for name in ("q", "k", "v", "output", "index", "other")},
    )
    with pytest.raises(ValueError, match="dram_bytes_per_s 76800000001 and clock_hz 1000"):
        run_attention(wide, odd)
    assert run_attention(wide, replace(odd, dram_bytes_per_s=76_800_000_000)).cycles > 0


@pytest.mark.parametrize("batch", [0, True, 1.5, "2", None, 10**30])
def test_a_wrong_batch_is_refused(batch):
    with pytest.raises(ValueError, match=r"batch must be an integer in 1.."):
        simulate(Workload("network", (CALL,)), batch=batch)


@pytest.mark.parametrize(
    ("given_as", "value"), [("workload", CALL), ("hardware", "vitcod"), ("schedule", "edp")]
)
def test_simulate_names_an_argument_of_another_kind(given_as, value):
    arguments = {"workload": Workload("network", (CALL,)), given_as: value}
    with pytest.raises(ValueError, match=f"{given_as} must be a"):
        simulate(**arguments)


def test_an_operation_of_no_known_kind_is_named_by_its_place():
    with pytest.raises(ValueError, match=r"ops\[1\] must be one of Gemm, .* got 'gelu'"):
        Workload("network", (CALL, "gelu"))


def test_polarized_masks_take_no_fractions_of_a_token():
    whole = polarize_head(KEEP[0], 0.5)
    for field in ("query_order", "key_order", "indptr", "indices"):
        with pytest.raises(ValueError, match=f"{field} must be integers"):
            replace(whole, **{field: getattr(whole, field) + 0.5})
    with pytest.raises(ValueError, match="global_keep must be bool, got int64"):
        replace(whole, global_keep=whole.global_keep.astype(np.int64))
    assert isinstance(replace(whole, num_global=np.int64(whole.num_global)), PolarizedMask)


@pytest.mark.parametrize("keep", [None, 3, (), {}, [object()], KEEP, (KEEP.astype(int),)])
def test_a_mask_that_is_no_array_a_layer_is_refused(keep):
    with pytest.raises(ValueError, match=r"keep must be|layer 0 of a mask is|needs at least one"):
        AttentionMask(keep)


def test_checks_of_single_values():
    assert integer("count", np.uint8(3)) == 3
    assert share("part", 1) == 1.0
    with pytest.raises(ValueError, match=r"part must be a number in \[0.0, 1.0\], got 1.01"):
        share("part", 1.01)
    check_fields(Gemm("g", 1, 1, 1), {"rows": (1, 1)})
    with pytest.raises(ValueError, match=r"rows must be an integer in 2..3, got 1"):
        check_fields(Gemm("g", 1, 1, 1), {"rows": (2, 3)})
