"""How each published figure of ViTCoD is set beside ours: the rows of `paper`.

A function a group of figures; each says what ours is against and gives one sentence why it
differs. Means are arithmetic, over the cases at the highest sparsity ("_90") or over all of
them ("_mean").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from ..accel import Hardware, Report
from ..accel.report.energy import PROFILES, area, energy
from ..accel.report.roofline import DEVICES, MEASURED, Device, Measured, Modelled, roofline, speedup
from ..accel.report.silicon import macs_words, uses_codec
from ..accel.simulate import simulate_silently
from .paper_case import OWN_SCHEDULE, Case, Row, Run, over
from .paper_movement import movement_rows
from .published import HEADLINES

__all__ = ["Case", "Row", "Run", "rows"]

PROFILE_NAMES = ("aladdin-28nm", "horowitz-28nm-lop")
"""The default of `energy`, and the lowest at the node of ViTCoD's chip."""

LOGGED_MODEL = "deit_tiny"
"""The published logs are of a ViT-Tiny with 196 tokens, this model without its class token."""


def rows(runs: Sequence[Run], hardware: Hardware, timed: Mapping[str, Measured]) -> tuple[Row, ...]:
    """All rows. ``timed``: eager attention of a model on this computer; may be empty."""
    top = max(run.case.sparsity for run in runs)
    parts = {"90": [run for run in runs if run.case.sparsity == top]}
    if len(parts["90"]) < len(runs):
        parts["mean"] = list(runs)
    made: list[Row] = []
    for suffix, chosen in parts.items():
        for group in ("cpu", "edge", "gpu"):
            made += _processor_rows(f"{group}_{suffix}", chosen, hardware, timed)
        made += _machine_rows(suffix, chosen)
        made += _idea_rows(suffix, chosen)
    for group in ("cpu", "edge"):
        made += _processor_rows(f"{group}_network", parts["90"], hardware, timed)
    made += movement_rows(parts["90"], hardware)
    made += _energy_rows(parts["90"], hardware)
    order = list(HEADLINES)
    return tuple(sorted(made, key=lambda row: order.index(row.figure.key)))


# Processors: a CPU, an edge GPU, a GPU.

DEVICE = {"cpu": "xeon-gold-6230r", "edge": "jetson-xavier-nx", "gpu": "rtx-2080-ti"}
LOG = {"edge": "jetson-tx2", "gpu": "rtx-2080-ti"}

WHY_PROCESSOR = {
    "modelled": "The paper timed PyTorch, which keeps far below the chip's peaks in small "
    "products; this roofline has each kernel at its peaks, operands through main memory.",
    "copies": "As the paper does for large batches the machine is copied until its MACs equal "
    "the chip's peak, but the chip is then taken to reach that peak too.",
    "measured here": "Another CPU than the paper's, whose threads and batch are not known to us.",
    "edge log": "The published log is of another board, under TensorRT, and of one model.",
    "gpu log": "At a batch of 2,048 the GPU is full and an image costs a fraction of what it "
    "costs alone, where starting kernels is most of the time.",
    "network": "Attention is a small part of these networks, and the rest runs densely on the "
    "same MACs; where the published factor is from is not known.",
}


def _processor_rows(
    key: str, runs: Sequence[Run], hardware: Hardware, timed: Mapping[str, Measured]
) -> Iterator[Row]:
    """One published factor over a processor: modelled, logged, timed here, scaled up."""
    group, part = key.split("_")
    attention = part != "network"
    device = DEVICES[DEVICE[group]]

    def row(name: str, chosen: Sequence[Run], against: Callable[[Run], Modelled | Measured]):
        others = [against(run) for run in chosen]
        pairs = list(zip(chosen, others, strict=True))
        mine = [speedup(run.reports["vitcod"], other, attention).factor for run, other in pairs]
        theirs = [speedup(r.released, o, attention).factor for r, o in pairs if r.released]
        why = WHY_PROCESSOR[name if attention else "network"]
        return Row(
            HEADLINES[key],
            fmean(theirs) if theirs else None,
            fmean(mine),
            others[0].basis,
            others[0].label,
            over(chosen),
            why,
        )

    yield row("modelled", runs, lambda run: roofline(run.case.workload, device))
    here = [run for run in runs if run.case.model in timed]
    if group == "cpu" and here:
        yield row("measured here", here, lambda run: timed[run.case.model])
    logged = [run for run in runs if run.case.model == LOGGED_MODEL]
    if group in LOG and logged:
        yield row(f"{group} log", logged, lambda run: MEASURED[LOG[group]])
    copies = round(device.product_flops_per_s["fp32"] / 2 / hardware.macs / hardware.clock_hz)
    if part == "90" and copies > 1:
        yield _copies_row(key, runs, hardware, device, copies)


def _copies_row(
    key: str, runs: Sequence[Run], hardware: Hardware, device: Device, copies: int
) -> Row:
    """As many machines as have the device's peak, an image each, sharing its bandwidth."""
    share = replace(hardware, dram_bytes_per_s=int(device.memory_bytes_per_s / copies))
    others = [roofline(run.case.workload, device, batch=copies) for run in runs]
    factors = [
        speedup(simulate_silently(run.case.workload, share), other).factor * copies
        for run, other in zip(runs, others, strict=True)
    ]
    text = (
        f"{others[-1].label}; {copies} copies of the machine, an image each, "
        f"{device.memory_bytes_per_s / 1e9:.4g} GB/s for all"
    )
    why = WHY_PROCESSOR["copies"]
    return Row(HEADLINES[key], None, fmean(factors), "modelled", text, over(runs), why)


# Machines of equal MACs, and the paper's two ideas.

WHY_MACHINE = {
    "sanger": "Predicting the mask, a dense product for every image, is most of Sanger's time "
    "at equal MACs; how the paper sized its Sanger is not known to us.",
    "spatten": "SpAtten is granted the mask's density here in whole tokens, which leaves it "
    "small dense products; how the paper sized its SpAtten is not known to us.",
}
WHY_IDEA = {
    "pruning": "Dense, this machine keeps its MACs busy; sparse, it loses some to banks, ends of "
    "columns, decoding and the pruned entries of dense blocks.",
    "reordering": "Long columns and rows are cut ahead of time and shared out evenly here even "
    "without reordering, which leaves reordering little to win.",
}


def _factor(run: Run, slower: str, faster: str = "vitcod") -> float:
    return run.reports[slower].attention_cycles / run.reports[faster].attention_cycles


def _macs(runs: Sequence[Run], own: str) -> str:
    """What both machines have, and what the codec of ours has on top."""
    ours = runs[0].reports[own]
    words = "equal MACs, bandwidth and clock"
    if not uses_codec(ours):
        return words
    return f"{words}, ours {macs_words(ours.hardware)}"


def _machine_rows(suffix: str, runs: Sequence[Run]) -> Iterator[Row]:
    for name in ("spatten", "sanger"):
        for own, note in (("vitcod", ""), ("vitcod_no_codec", "; ours without its codec")):
            text = f"{name} at {_macs(runs, own)}, batch 1{note}"
            yield Row(
                HEADLINES[f"{name}_{suffix}"],
                None,
                fmean(_factor(run, name, own) for run in runs),
                "simulated",
                text,
                over(runs),
                WHY_MACHINE[name],
            )
        yield Row(
            HEADLINES[f"{name}_{suffix}"],
            None,
            fmean(
                run.own[name].attention_cycles / run.own["vitcod"].attention_cycles for run in runs
            ),
            "simulated",
            f"{name} at equal MACs, bandwidth and clock, batch 1; both by {OWN_SCHEDULE}",
            over(runs),
            WHY_MACHINE[name],
        )


def _idea_rows(suffix: str, runs: Sequence[Run]) -> Iterator[Row]:
    for name, slower, what in (
        ("pruning", "vitcod_dense", "the same machine with nothing pruned, no codec"),
        ("reordering", "vitcod_no_reorder", "the same machine, no global keys"),
    ):
        yield Row(
            HEADLINES[f"{name}_{suffix}"],
            None,
            fmean(_factor(run, slower) for run in runs),
            "simulated",
            f"{what}, batch 1",
            over(runs),
            WHY_IDEA[name],
        )


# Energy, area and power.

WHY_ENERGY = {
    "energy_sanger": "DRAM is most of our energy, and both machines must load Q, K and V and store "
    "the output; the paper's figure is after layout, and what is in it is not known to us.",
    "area": "RAMs and MACs of a table, registers of the lines and crossbars by estimate: no "
    "control, softmax unit or pads.",
    "power": "Counts times a table only, DRAM left out: no control, clock tree or wires, and "
    "published tables themselves differ by up to four times.",
}


def _energy_rows(runs: Sequence[Run], hardware: Hardware) -> Iterator[Row]:
    for name in PROFILE_NAMES:
        profile = PROFILES[name]
        for own, dram, note in (
            ("vitcod", True, ""),
            ("vitcod_no_codec", True, "; ours without its codec"),
            ("vitcod", False, "; DRAM left out"),
        ):
            ratio = fmean(
                _picojoules(run.reports["sanger"], name, dram)
                / _picojoules(run.reports[own], name, dram)
                for run in runs
            )
            text = f"sanger at {_macs(runs, own)}, attention, batch 1, profile {name}{note}"
            yield _energy_row("energy_sanger", ratio, text, over(runs))
        space = area(hardware, profile)
        text = (
            f"{hardware.sram_bytes // 1024} KB of RAM, {macs_words(hardware)}, profile {name}; "
            f"{space.estimated_mm2:.2f} mm2 of it estimated"
        )
        yield _energy_row("area", space.total_mm2, text, "")
        milliwatts = fmean(_chip_milliwatts(run.reports["vitcod"], name) for run in runs)
        text = f"attention at {hardware.clock_hz / 1e6:.4g} MHz, batch 1, profile {name}"
        yield _energy_row("power", milliwatts, text, over(runs))


def _energy_row(key: str, value: float, against: str, over: str) -> Row:
    return Row(HEADLINES[key], None, value, "profile", against, over, WHY_ENERGY[key])


def _picojoules(report: Report, profile: str, dram: bool) -> float:
    """Of attention, with or without its DRAM."""
    parts = energy(report, PROFILES[profile]).components_pj()
    return sum(value for name, value in parts.items() if dram or name != "DRAM")


def _chip_milliwatts(report: Report, profile: str) -> float:
    """Mean power of attention without its DRAM."""
    return _picojoules(report, profile, dram=False) * 1e-9 / report.attention_seconds
