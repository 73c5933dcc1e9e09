"""The options that are fields of a command's settings: their defaults, and the settings made.

A field's default stands once, in the dataclass. It is read when a command is used and not
before: `sievit --help` loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from .inputs import block_shape, global_threshold_of, grid_shape

if TYPE_CHECKING:
    from ..pipeline.settings import Settings
    from ..pipeline.train import TrainSettings


class _FromSettings:
    """Stands for a default until the command is used."""


FROM_SETTINGS: Any = _FromSettings()
"""The default of an option: the default of the field that is called like it."""

READ: dict[str, Callable[[Any], Any]] = {
    "granularity": block_shape,
    "grid": grid_shape,
    "global_threshold": global_threshold_of,
}
"""Fields that the command takes as text: how it is read."""

MASK_OPTIONS = (
    *("rule", "sparsity", "theta", "cycles", "tile_entries", "tile"),
    *("granularity", "grid", "global_threshold"),
)


def pipeline_settings() -> type[Settings]:
    """Of every command but `train`."""
    from ..pipeline.settings import Settings

    return Settings


def train_settings() -> type[TrainSettings]:
    from ..pipeline.train import TrainSettings

    return TrainSettings


class SettingsCommand(TyperCommand):
    """A command that reads the defaults of its options from its settings."""

    def get_params(self, ctx: Any) -> list[Any]:
        found: list[Any] = super().get_params(ctx)
        waiting = [option for option in found if option.default is FROM_SETTINGS]
        if waiting:
            from ..sparsify.rules import RULES

            made = settings_class(self.name)
            for option in waiting:
                option.default = as_text(getattr(made, option.name))
                option.help = option.help.replace("{rules}", ", ".join(RULES))
        return found


def settings_class(command: str | None) -> type[Settings] | type[TrainSettings]:
    """The settings whose fields are options of ``command``."""
    return train_settings() if command == "train" else pipeline_settings()


def as_text(value: object) -> object:
    """A field's value as its option takes it: a pair as ROWSxCOLUMNS."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


def given(ctx: typer.Context, names: tuple[str, ...] = MASK_OPTIONS) -> dict[str, Any]:
    """Those of the options ``names`` that the user gave, as --NAME VALUE wants them."""
    source = ctx.get_parameter_source
    named = (name for name in names if name in ctx.params)
    return {n: ctx.params[n] for n in named if getattr(source(n), "name", "") != "DEFAULT"}


def flag(name: str, value: object = None) -> str:
    """--NAME VALUE."""
    shown = "" if value is None else f" {value:g}" if isinstance(value, float) else f" {value}"
    return f"--{name.replace('_', '-')}{shown}"


def values_of(ctx: typer.Context, made: type[Any]) -> dict[str, Any]:
    """The fields of the settings ``made`` that are options, as the user has them.

    Raises ValueError for options that contradict each other or would be ignored.
    """
    names = {field.name for field in fields(made)}
    values = {
        name: READ[name](value) if name in READ else value
        for name, value in ctx.params.items()
        if name in names
    }
    return values | _amount(ctx)


def _amount(ctx: typer.Context) -> dict[str, None]:
    """What a mask keeps is said by one option; takes the default of --sparsity back where it
    is another."""
    from ..pipeline.settings import AMOUNTS, BUDGETS

    asked = given(ctx)
    amounts = {name: value for name, value in asked.items() if name in AMOUNTS}
    if len(amounts) > 1:
        got = " and ".join(flag(name, value) for name, value in amounts.items())
        raise ValueError(f"give one of {', '.join(map(flag, AMOUNTS))}; got {got}")
    if (budget := next((name for name in amounts if name in BUDGETS), None)) is not None:
        for name in ("rule", "granularity", "grid"):
            if name in asked:
                raise ValueError(
                    f"{flag(name, asked[name])} goes with --sparsity or --theta, not with the "
                    f"budget {flag(budget)}, which has a rule of its own"
                )
    if "tile" in asked and "tile_entries" not in asked:
        raise ValueError(f"{flag('tile', asked['tile'])} goes with --tile-entries alone")
    if "grid" in asked and ctx.params["rule"] != "window":
        raise ValueError(
            f"{flag('grid', asked['grid'])} goes with --rule window, got --rule "
            f"{ctx.params['rule']}"
        )
    return {} if not amounts or "sparsity" in amounts else {"sparsity": None}


def check_hardware(ctx: typer.Context) -> None:
    """ValueError where --hardware is given and no cycles are counted on it."""
    machine = given(ctx, ("hardware",))
    if machine and "cycles" not in given(ctx):
        raise ValueError(f"{flag('hardware', machine['hardware'])} goes with --cycles alone")
