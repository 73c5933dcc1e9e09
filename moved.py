"""Where modules and names of earlier versions are now: one table, for one version.

A moved module stands in `sys.modules` under its old name; what is taken from it comes from its
new place, with a DeprecationWarning that names it. Nothing is imported before that.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

Made = TypeVar("Made", bound=Callable[..., Any])

MODULES = {
    "sievit.accel.assign": "sievit.accel.vitcod.assign",
    "sievit.accel.carried": "sievit.accel.vitcod.numbers.executor",
    "sievit.accel.comparison": "sievit.accel.report.speedups",
    "sievit.accel.compiled": "sievit.accel.jit",
    "sievit.accel.configurations": "sievit.accel.explore.grid",
    "sievit.accel.controller": "sievit.accel.dram.controller",
    "sievit.accel.ddr4": "sievit.accel.dram.ddr4",
    "sievit.accel.dense": "sievit.accel.products",
    "sievit.accel.digest": "sievit.accel.explore.fingerprint",
    "sievit.accel.dma": "sievit.accel.vitcod.core.dma_ddr4",
    "sievit.accel.dram_state": "sievit.accel.dram.state",
    "sievit.accel.energy": "sievit.accel.report.energy",
    "sievit.accel.engine": "sievit.accel.vitcod.core.engine",
    "sievit.accel.estimate": "sievit.accel.vitcod.estimate",
    "sievit.accel.front_plots": "sievit.accel.explore.plots",
    "sievit.accel.functional": "sievit.accel.vitcod.numbers.functional",
    "sievit.accel.integers": "sievit.accel.integer_attention",
    "sievit.accel.journal": "sievit.accel.explore.results_file",
    "sievit.accel.labels": "sievit.accel.explore.labels",
    "sievit.accel.ladder": "sievit.studies.ladder",
    "sievit.accel.layout": "sievit.accel.dram.address",
    "sievit.accel.lines": "sievit.accel.vitcod.core.mac_lines",
    "sievit.accel.machine": "sievit.accel.vitcod.core.registers",
    "sievit.accel.mapping": "sievit.accel.vitcod.mapper",
    "sievit.accel.memory": "sievit.accel.vitcod.core.dma_flat",
    "sievit.accel.pareto": "sievit.accel.explore.pareto",
    "sievit.accel.pattern": "sievit.accel.vitcod.pattern",
    "sievit.accel.perfetto": "sievit.accel.trace.perfetto",
    "sievit.accel.plots": "sievit.accel.trace.plots",
    "sievit.accel.points": "sievit.accel.explore.points",
    "sievit.accel.profiles": "sievit.accel.report.profiles",
    "sievit.accel.program": "sievit.accel.vitcod.program",
    "sievit.accel.published": "sievit.studies.published",
    "sievit.accel.remembered": "sievit.accel.cache",
    "sievit.accel.roofline": "sievit.accel.report.roofline",
    "sievit.accel.simulators.vitcod": "sievit.accel.vitcod.simulate",
    "sievit.accel.stepped": "sievit.accel.vitcod.run",
    "sievit.accel.timeline": "sievit.accel.trace.timeline",
    "sievit.accel.workers": "sievit.accel.explore.processes",
    "sievit.attachments": "sievit.pipeline.attachments",
    "sievit.cli.front_tables": "sievit.cli.tables.fronts",
    "sievit.cli.machine_tables": "sievit.cli.tables.machines",
    "sievit.cli.paper_tables": "sievit.cli.tables.paper",
    "sievit.cli.zoo_tables": "sievit.cli.tables.zoo",
    "sievit.figures": "sievit.pipeline.pictures",
    "sievit.masks": "sievit.workload.masks",
    "sievit.models.accesses": "sievit.models.costs.accesses",
    "sievit.models.aten_costs": "sievit.models.costs.aten_costs",
    "sievit.models.attention_forms": "sievit.models.attention.forms",
    "sievit.models.blocks": "sievit.models.training.blocks",
    "sievit.models.checkpoints": "sievit.models.training.checkpoints",
    "sievit.models.complexity": "sievit.models.costs.complexity",
    "sievit.models.conv_layers": "sievit.models.families.conv_layers",
    "sievit.models.convnext": "sievit.models.families.convnext",
    "sievit.models.dcn": "sievit.models.families.dcn",
    "sievit.models.dcn_traffic": "sievit.models.costs.dcn_traffic",
    "sievit.models.distill": "sievit.models.training.distill",
    "sievit.models.efficientnet": "sievit.models.families.efficientnet",
    "sievit.models.efficientvit": "sievit.models.families.efficientvit",
    "sievit.models.feeding": "sievit.models.training.feeding",
    "sievit.models.intercept": "sievit.models.attention.intercept",
    "sievit.models.internimage": "sievit.models.families.internimage",
    "sievit.models.internimage_scaling": "sievit.models.families.internimage_scaling",
    "sievit.models.layers": "sievit.models.families.layers",
    "sievit.models.levit": "sievit.models.families.levit",
    "sievit.models.mixed": "sievit.models.families.mixed",
    "sievit.models.objectives": "sievit.models.training.objectives",
    "sievit.models.parameter_use": "sievit.models.costs.parameter_use",
    "sievit.models.plots": "sievit.models.costs.plots",
    "sievit.models.processes": "sievit.models.training.processes",
    "sievit.models.products": "sievit.models.attention.products",
    "sievit.models.recipe": "sievit.models.training.recipe",
    "sievit.models.regnet": "sievit.models.families.regnet",
    "sievit.models.resnet": "sievit.models.families.resnet",
    "sievit.models.run_profile": "sievit.models.costs.run_profile",
    "sievit.models.shadow": "sievit.models.attention.shadow",
    "sievit.models.timm_names": "sievit.models.weights.timm_names",
    "sievit.models.trace": "sievit.models.costs.trace",
    "sievit.models.vit": "sievit.models.families.vit",
    "sievit.models.vit_names": "sievit.models.families.vit_names",
    "sievit.models.weight_files": "sievit.models.weights.weight_files",
    "sievit.networks": "sievit.pipeline.networks",
    "sievit.ops": "sievit.workload.ops",
    "sievit.recipes": "sievit.pipeline.train",
    "sievit.result": "sievit.pipeline.result",
    "sievit.settings": "sievit.pipeline.settings",
    "sievit.sparse_model": "sievit.pipeline.sparse_model",
    "sievit.sparsify.hardware_masks": "sievit.sparsify.budgeted_masks",
    "sievit.sparsify.observe": "sievit.models.attention.observe",
    "sievit.sparsify.probe": "sievit.sparsify.average",
    "sievit.stages": "sievit.pipeline.stages",
    "sievit.training_log": "sievit.pipeline.training_log",
}
"""Old module -> new module."""

PACKAGES = {
    "sievit.accel.dram": "sievit.accel.dram.bandwidth",
    "sievit.accel.explore": "sievit.accel.explore.sweep",
    "sievit.accel.report": "sievit.accel.report.report",
    "sievit.cli.tables": "sievit.cli.tables.codesign",
    "sievit.models.attention": "sievit.models.attention.calls",
    "sievit.models.training": "sievit.models.training.loop",
    "sievit.models.weights": "sievit.models.weights.load",
    "sievit.pipeline": "sievit.pipeline.codesign",
}
"""Modules whose name a package has now -> the module of it that has their names."""

_SIMULATORS = "sievit.accel.simulators"
_VARIANTS = {
    "simulate_vitcod": f"{_SIMULATORS}.variants.VITCOD",
    "simulate_no_codec": f"{_SIMULATORS}.variants.NO_CODEC",
    "simulate_no_reorder": f"{_SIMULATORS}.variants.NO_REORDER",
    "simulate_plain": f"{_SIMULATORS}.variants.PLAIN",
    "simulate_dense": f"{_SIMULATORS}.variants.DENSE",
}
_SYSTOLIC = {
    "simulate_systolic": f"{_SIMULATORS}.systolic.SYSTOLIC",
    "simulate_output_stationary": f"{_SIMULATORS}.systolic.OUTPUT_STATIONARY",
    "simulate_weight_stationary": f"{_SIMULATORS}.systolic.WEIGHT_STATIONARY",
    "simulate_input_stationary": f"{_SIMULATORS}.systolic.INPUT_STATIONARY",
}
_SANGER = {"simulate_sanger": f"{_SIMULATORS}.sanger.SANGER"}
_SPATTEN = {"simulate_spatten": f"{_SIMULATORS}.spatten.SPATTEN"}
_RELEASED = {"simulate_released": f"{_SIMULATORS}.released.RELEASED"}

NAMES: dict[str, dict[str, str]] = {
    "sievit.accel": {"Point": "DesignPoint"},
    "sievit.accel.cache": {"Remembered": "LruCache"},
    "sievit.accel.explore.fingerprint": {
        "code_digest": "code_fingerprint",
        "digest": "fingerprint",
    },
    "sievit.accel.explore.points": {"Point": "DesignPoint"},
    "sievit.accel.hardware": {
        name: f"sievit.accel.schedule.{name}" for name in ("ASSIGNMENTS", "DATAFLOWS", "FILLS")
    },
    "sievit.accel.simulators": {
        "SIMULATORS": f"{_SIMULATORS}.registry.SIMULATORS",
        **_VARIANTS,
        **_SYSTOLIC,
        **_SANGER,
        **_SPATTEN,
        **_RELEASED,
    },
    "sievit.accel.simulators.released": _RELEASED,
    "sievit.accel.simulators.sanger": {
        **_SANGER,
        "MASK_BITS_PER_CYCLE": f"{_SIMULATORS}.sanger.Sanger.mask_bits_per_cycle",
        "Packed": f"{_SIMULATORS}.packing.Packed",
        "pack": f"{_SIMULATORS}.packing.pack",
    },
    "sievit.accel.simulators.spatten": {
        **_SPATTEN,
        "cascade": f"{_SIMULATORS}.cascade.cascade",
    },
    "sievit.accel.simulators.systolic": _SYSTOLIC,
    "sievit.accel.vitcod.numbers.executor": {"CarriedRun": "ProgramExecutor"},
    "sievit.accel.vitcod.mapper": {
        "codec_side_bytes": "sievit.accel.vitcod.mapping.codec_side_bytes"
    },
    "sievit.accel.vitcod.simulate": _VARIANTS,
    "sievit.accel.vitcod.run": {"Stepped": "AttentionRun", "step": "run_attention"},
    "sievit.ae.closed_form": {
        "TURN_SWEEPS": "ROTATION_SWEEPS",
        "agreeing_turn": "agreeing_rotation",
    },
    "sievit.cli.machines": {"Simulators": "sievit.cli.options.Simulators"},
    "sievit.cli.options": {
        "MinKept": "sievit.cli.options.MaskGlobalKeys",
        "count_or_share": "sievit.cli.inputs.global_threshold_of",
        **{
            name: f"sievit.cli.inputs.{name}"
            for name in (
                *("SavedMask", "block_shape", "codec_shape", "hardware_named", "load_network"),
                *("load_photos", "normalization_named", "profile_named", "saved_mask"),
                *("simulators_named", "weights_source"),
            )
        },
    },
    "sievit.models.training.feeding": {
        name: f"sievit.models.running.{name}" for name in ("images_for", "moved")
    },
    "sievit.pipeline.result": {
        "PACKAGES": "sievit.provenance.PACKAGES",
        "versions": "sievit.provenance.versions",
        "write_json": "sievit.files.write_json",
    },
    "sievit.pipeline.networks": {"WHOLE_COLUMNS": "sievit.pipeline.settings.ALL"},
    "sievit.sparsify": {"codesign_masks": "budgeted_masks", "judge": "evaluate"},
    "sievit.sparsify.budgeted_masks": {"codesign_masks": "budgeted_masks"},
    "sievit.sparsify.fidelity": {"judge": "evaluate"},
    "sievit.sparsify.threshold": {
        "WARN_OFF_BY": "sievit.sparsify.rules.information.WARN_OFF_BY",
        "information": "sievit.sparsify.rules.information.at_theta",
        "mass_before": "sievit.sparsify.rules.information.mass_before",
        "quota": "sievit.sparsify.rules.information.at_sparsities",
        "ratio": "sievit.sparsify.rules.ratio.at_ratio",
    },
    "sievit.workload": {"PUBLISHED_MIN_KEPT": "PUBLISHED_GLOBAL_THRESHOLD"},
    "sievit.workload.masks": {"PUBLISHED_MIN_KEPT": "PUBLISHED_GLOBAL_THRESHOLD"},
}
"""Module or package of today -> {old name: new name, with its module where that is another}."""


def _variants_without() -> dict[str, dict[str, bool]]:
    return {
        name: dict.fromkeys(simulator.without, False)
        for name, simulator in _simulators().items()
        if name.startswith("vitcod")
    }


def _simulators_words() -> dict[str, str]:
    return {name: simulator.words for name, simulator in _simulators().items()}


def _simulators() -> dict[str, Any]:
    return importlib.import_module("sievit.accel.simulators.registry").SIMULATORS


TABLES: dict[str, dict[str, tuple[str, Callable[[], Any]]]] = {
    "sievit.accel.vitcod.simulate": {
        "WITHOUT": ("sievit.accel.simulators.registry.SIMULATORS", _variants_without)
    },
    "sievit.cli.tables.machines": {
        "WORDS": ("sievit.accel.simulators.registry.SIMULATORS", _simulators_words)
    },
}
"""Module of today -> {old table: (what holds its content now, how the table is made of it)}."""

ARGUMENTS = {"min_kept": "global_threshold", "turn": "rotation", "turned": "rotated"}
"""Arguments, fields and methods: old name -> new name."""

FLAGS = {
    "--min-kept": "--global-threshold",
    "--no-turn": "--no-rotation",
    "--turn": "--rotation",
}
"""Options of the command: old -> new."""


def forward_modules() -> None:
    """Let every moved module be imported under its old name."""
    for old, new in MODULES.items():
        sys.modules.setdefault(old, _Moved(old, new))


def old_names(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module or package that had other names: warns and forwards."""

    def find(name: str) -> Any:
        renamed = {**NAMES.get(module, {}), **TABLES.get(module, {})}
        place = module if name in renamed else PACKAGES.get(module)
        if name.startswith("__") or place is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return _taken(f"{module}.{name}", place, name)

    return find


def old_arguments(*names: str) -> Callable[[Made], Made]:
    """Decorator of a function or class that had arguments of these `ARGUMENTS`: they are
    taken under their new name, with a warning, and win over it (as `dataclasses.replace`
    needs). What a class has can be read and set under the old name too."""

    def wrap(made: Made) -> Made:
        renamed: Any = made  # a type checker takes what this is given for what it gives
        if not isinstance(made, type):
            return _renaming(renamed, names)
        renamed.__init__ = _renaming(renamed.__init__, names)
        for name in names:
            setattr(renamed, name, property(_old_field(name), _set_old_field(name)))
        return renamed

    return wrap


def _renaming(function: Any, names: tuple[str, ...]) -> Any:
    @functools.wraps(function)
    def called(*positional: Any, **given: Any) -> Any:
        for name in names:
            if name in given:
                _warn_of_argument(name)
                given[ARGUMENTS[name]] = given.pop(name)
        return function(*positional, **given)

    return called


def _old_field(name: str) -> Callable[[Any], Any]:
    def read(instance: Any) -> Any:
        _warn_of_argument(name)
        return getattr(instance, ARGUMENTS[name])

    return read


def _set_old_field(name: str) -> Callable[[Any, Any], None]:
    def write(instance: Any, value: Any) -> None:
        _warn_of_argument(name)
        setattr(instance, ARGUMENTS[name], value)

    return write


def _warn_of_argument(name: str) -> None:
    message = f"{name} is called {ARGUMENTS[name]}; the old name goes with the next version"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


class _Moved(ModuleType):
    """A module of an earlier version."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, f"Moved to `{new}`.")
        self.__spec__ = ModuleSpec(old, None, origin=new)
        self._new = new

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return _public(self._new)
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return _taken(f"{self.__name__}.{name}", self._new, name)


def _public(module: str) -> list[str]:
    """What ``from OLD import *`` takes: the public names that ``module`` defines, under their
    old names where they have one."""
    names = vars(importlib.import_module(module))
    own = [
        name
        for name, value in names.items()
        if not name.startswith("_") and getattr(value, "__module__", module) == module
        if not isinstance(value, ModuleType)
    ]
    return [*own, *NAMES.get(module, {}), *TABLES.get(module, {})]


def _taken(old: str, module: str, name: str) -> Any:
    """``name``, or what it is called today, of ``module``, with a warning about ``old``."""
    if name in TABLES.get(module, {}):
        place, make = TABLES[module][name]
        _warn_of_name(old, place)
        return make()
    today = NAMES.get(module, {}).get(name, name)
    path = today if "." in today else f"{module}.{today}"
    try:
        found = _at(path)
    except AttributeError:
        raise AttributeError(f"{old} is neither here nor in {module}") from None
    _warn_of_name(old, path)
    return found


def _at(path: str) -> Any:
    """The object at MODULE.NAME or MODULE.CLASS.NAME."""
    module, name = path.rsplit(".", 1)
    holder = module.rsplit(".", 1)
    if holder[1][0].isupper():
        return getattr(_at(module), name)
    return getattr(importlib.import_module(module), name)


def _warn_of_name(old: str, path: str) -> None:
    message = f"{old} has moved to {path}; the old name goes with the next version"
    warnings.warn(message, DeprecationWarning, stacklevel=4)
