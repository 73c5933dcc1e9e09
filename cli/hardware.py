"""`sievit hardware`: the machines that have a name, with their MACs, banks and area."""

from __future__ import annotations

from . import options as o
from .inputs import profile_named
from .report_formats import Found, format_named, show
from .terminal import one_line_errors


def hardware(profile: o.Profile = o.DEFAULT_PROFILE, output: o.Format = "table") -> None:
    """List the presets of the simulated machine: MACs, banks, buffers, memory and area."""
    with one_line_errors(False):
        from dataclasses import asdict

        from ..accel import area, presets
        from .tables.hardware import hardware_table

        shown, costs = format_named(output), profile_named(profile)
        areas = {name: area(machine, costs) for name, machine in presets.items()}
        figures = {
            name: asdict(machine) | {"area": areas[name].to_dict()}
            for name, machine in presets.items()
        }
        show(shown(Found(figures, lambda: hardware_table(presets, areas))))
