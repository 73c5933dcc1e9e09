"""Rooflines by hand, published peaks, and the measured logs against their files."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest

from sievit.accel import presets, simulate
from sievit.accel.report.roofline import DEVICES, MEASURED, Device, Modelled, roofline, speedup
from sievit.workload import Attention, Conv, Elementwise, Gemm, Unknown, Unused, Workload

ATTENTION = Attention("attn", 3, 196, 196, 64, 64)
SMALL = Workload(
    "small",
    (
        Gemm("qkv", 196, 192, 576),
        ATTENTION,
        Elementwise("norm", "layer_norm", 196 * 192, 196 * 192, 384),
        Conv("patch", 3, 192, (224, 224), (14, 14), (16, 16), (16, 16)),
        Unknown("odd", "fft", 100, 100),
        Unused("spare", 10),
    ),
)
SLOW = Device("slow", {"fp32": 1e9}, 1e8, 1e9, 0.0, "made for this test")


def test_eager_attention_by_hand():
    made = roofline(Workload("one", (ATTENTION,)), SLOW)
    scores, vectors = 3 * 196 * 196, 3 * 196 * 64
    assert [kernel.name for kernel in made.kernels] == ["scores", "scale", "softmax", "values"]
    assert [kernel.flops for kernel in made.kernels] == [
        2 * scores * 64,
        scores,
        4 * scores,
        2 * scores * 64,
    ]
    assert [kernel.moved_bytes for kernel in made.kernels] == [
        4 * (2 * vectors + scores),
        8 * scores,
        8 * scores,
        4 * (2 * vectors + scores),
    ]
    expected = 2 * (2 * scores * 64 / 1e9) + scores / 1e8 + 4 * scores / 1e8
    assert made.seconds == pytest.approx(expected) == made.attention_seconds
    assert {kernel.bound for kernel in made.kernels} == {"compute"}


def test_fused_attention_never_moves_its_scores():
    work = Workload("one", (ATTENTION,))
    eager, fused = (roofline(work, DEVICES["a100"], "fp16", 64, s) for s in ("eager", "fused"))
    assert len(fused.kernels) == 1
    assert fused.kernels[0].moved_bytes == 2 * 64 * 4 * 3 * 196 * 64
    assert fused.kernels[0].flops == sum(kernel.flops for kernel in eager.kernels)
    assert fused.seconds < eager.seconds


def test_each_bound_is_reached():
    work = Workload("one", (ATTENTION,))
    launch = roofline(work, DEVICES["h200"], "bf16")
    assert all(kernel.bound == "launch" for kernel in launch.kernels)
    assert launch.seconds == pytest.approx(4 * DEVICES["h200"].launch_s)
    memory = roofline(work, DEVICES["h200"], "bf16", batch=4096)
    assert {kernel.name for kernel in memory.kernels if kernel.bound == "memory"} >= {"scale"}
    assert memory.kernels[1].seconds == pytest.approx(memory.kernels[1].moved_bytes / 4.8e12)


def test_the_rest_of_the_network_reads_weights_once_a_batch():
    one, four = (roofline(SMALL, SLOW, batch=batch) for batch in (1, 4))
    assert [k.op for k in one.kernels] == ["qkv", *["attn"] * 4, "norm", "patch", "odd"]
    assert one.unknown == ("odd",)
    weights = 192 * 576 * 4
    assert four.kernels[0].moved_bytes - weights == 4 * (one.kernels[0].moved_bytes - weights)
    assert four.kernels[0].flops == 4 * one.kernels[0].flops == 8 * SMALL.ops[0].macs
    assert one.attention_seconds < one.seconds
    assert one.kernels[-1].flops == 0
    stored = json.loads(json.dumps(one.to_dict()))
    assert stored["basis"] == "modelled"
    assert stored["seconds"] == one.seconds
    assert stored["device"]["source"]


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_has_sourced_figures_and_is_never_faster_than_its_peaks(name):
    device = DEVICES[name]
    assert len(device.source) > 20
    for precision, peak in device.product_flops_per_s.items():
        made = roofline(SMALL, device, precision, batch=16)
        flops = sum(kernel.flops for kernel in made.kernels)
        moved = sum(kernel.moved_bytes for kernel in made.kernels)
        assert made.seconds >= moved / device.memory_bytes_per_s * (1 - 1e-9)
        assert made.seconds >= flops / peak
        assert made.seconds >= len(made.kernels) * device.launch_s * (1 - 1e-9)
        assert "(modelled)" in made.label


def test_peaks_that_follow_from_counts():
    assert DEVICES["xeon-gold-6230r"].memory_bytes_per_s == pytest.approx(140.8e9, rel=1e-3)
    assert DEVICES["jetson-xavier-nx"].memory_bytes_per_s == 51.2e9
    turing = DEVICES["rtx-2080-ti"]  # 4352 cores at 1545 MHz, 352 bits at 14 Gbit/s
    assert turing.vector_flops_per_s == pytest.approx(4352 * 2 * 1.545e9, rel=0.01)
    assert turing.memory_bytes_per_s == 352 / 8 * 14e9


def test_the_roofline_is_below_what_was_measured():
    """The same network at the same batch: a bound on time may not exceed the log."""
    log = MEASURED["rtx-2080-ti"]
    work = Workload("ViT-Tiny", (ATTENTION,) * 12)
    made = roofline(work, DEVICES["rtx-2080-ti"], "fp32", batch=log.batch)
    bound = made.attention_seconds / log.batch
    assert 0.3 * log.attention_seconds_per_image < bound < log.attention_seconds_per_image


def test_the_turing_log(golden):
    with open(golden("measured-baselines/rtx2080ti_fp32_vit_tiny_196.csv")) as file:
        rows = [(row["op"], float(row["total_us_in_3_steps"])) for row in csv.DictReader(file)]
    names = {"aten::bmm", "aten::mul", "aten::_softmax"}
    log = MEASURED["rtx-2080-ti"]
    images = 3 * log.batch
    attention = sum(us for op, us in rows if op in names) * 1e-6 / images
    assert log.attention_seconds_per_image == pytest.approx(attention)
    assert log.seconds_per_image == pytest.approx(sum(us for _, us in rows) * 1e-6 / images)
    assert log.attention_seconds_per_image == pytest.approx(0.108e-3, rel=0.005)


def test_the_jetson_log(golden):
    with open(golden("measured-baselines/jetson_tx2_tensorrt_vit_tiny_196.csv")) as file:
        rows = [(row["layer"], float(row["average_ms"])) for row in csv.DictReader(file)]
    at = [i for i, (layer, _) in enumerate(rows) if layer.startswith("Softmax")]
    assert len(at) == 12
    attention = sum(rows[j][1] for i in at for j in (i - 1, i, i + 1)) * 1e-3
    log = MEASURED["jetson-tx2"]
    assert log.attention_seconds_per_image == pytest.approx(attention)
    assert log.seconds_per_image == pytest.approx(sum(ms for _, ms in rows) * 1e-3)
    assert json.loads(json.dumps(log.to_dict()))["basis"] == "measured log"


def test_a_speedup_says_against_what():
    report = simulate(SMALL, presets["vitcod"], "systolic", batch=2)
    made = roofline(SMALL, DEVICES["rtx-2080-ti"], batch=8)
    against_model = speedup(report, made)
    assert against_model.factor == pytest.approx(
        (made.attention_seconds / 8) / (report.attention_seconds / 2)
    )
    text = str(against_model)
    assert "modelled" in text
    assert "batch 8" in text
    assert "systolic, batch 2 (simulated)" in text
    log = MEASURED["jetson-tx2"]
    whole = speedup(report, log, attention_only=False)
    assert whole.factor == pytest.approx(log.seconds_per_image / (report.seconds / 2))
    assert (whole.basis, whole.part) == ("measured log", "end to end")
    assert "(measured log)" in str(whole)
    empty = simulate(Workload("none", SMALL.ops[:1]), presets["vitcod"], "systolic")
    with pytest.raises(ValueError, match="none on systolic takes no time"):
        speedup(empty, log)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "bf16"}, "precision on rtx-2080-ti must be one of fp32, fp16, got 'bf16'"),
        ({"attention_style": "lazy"}, "got 'lazy'"),
        ({"batch": 0}, "got 0"),
        ({"batch": True}, "got True"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        roofline(SMALL, DEVICES["rtx-2080-ti"], **arguments)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("product_flops_per_s", {"int1": 1.0}, "'int1'"),
        ("memory_bytes_per_s", 0, "memory_bytes_per_s must be positive, got 0"),
        ("launch_s", -1, "launch_s must not be negative, got -1"),
    ],
)
def test_devices_check_themselves(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(SLOW, **{field: value})


def test_attention_alone_gives_no_speedup_end_to_end():
    here = replace(MEASURED["jetson-tx2"], origin="here", seconds_per_image=None)
    report = simulate(SMALL, presets["vitcod"], "systolic")
    assert speedup(report, here).basis == "measured here"
    with pytest.raises(ValueError, match="attention alone was measured"):
        speedup(report, here, attention_only=False)
    with pytest.raises(ValueError, match="origin must be one of log, here, got 'there'"):
        replace(here, origin="there")


def test_basis_is_part_of_the_type():
    made = roofline(SMALL, SLOW)
    assert isinstance(made, Modelled)
    assert not any(isinstance(log, Modelled) for log in MEASURED.values())
