"""Machines to try: grids and lists of changes to a base machine.

A configuration is a plain dict, field of `Hardware` or of `Schedule`, or "simulator.parameter",
-> value, so that one that makes no machine can be carried along and reported instead of
stopping the rest.
"""

from __future__ import annotations

import itertools
import json
import os
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from ..hardware import Hardware, apart
from ..schedule import DEFAULT, Schedule, UserMapping
from ..simulators.registry import SIMULATORS

Changes = Mapping[str, Any]

HARDWARE_FIELDS = tuple(item.name for item in fields(Hardware))
SCHEDULE_FIELDS = tuple(item.name for item in fields(Schedule))
PARAMETERS = tuple(
    f"{name}.{item.name}"
    for name, simulator in SIMULATORS.items()
    for item in fields(simulator.parameters)
)
"""All that a configuration may set, by name."""


def grid(values: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Any], ...]:
    """Every combination of ``values``, the last field changing fastest.

    A key is a field of `Hardware` or `Schedule`, a simulator's parameter
    ("spatten.lsb_share"), or several joined by "+" that take the same value:
    ``{"lines": (32, 64), "q_buffer_bytes+k_buffer_bytes": (27136, 54272)}``. Raises
    ValueError for an unknown field, one without values and one that is named twice.
    """
    names = [key.split("+") for key in values]
    _check_fields(name for joined in names for name in joined)
    twice = [name for name, times in Counter(itertools.chain(*names)).items() if times > 1]
    if twice:
        raise ValueError(f"{', '.join(twice)} would be set twice in one configuration")
    for key, allowed in values.items():
        if isinstance(allowed, str) or not isinstance(allowed, Sequence) or not allowed:
            raise ValueError(f"{key} needs a list of values, got {allowed!r}")
    return tuple(
        {name: value for joined, value in zip(names, chosen, strict=True) for name in joined}
        for chosen in itertools.product(*values.values())
    )


class Configuration(NamedTuple):
    """What a configuration makes. ``parameters``: simulator -> its own, where changed."""

    hardware: Hardware
    schedule: Schedule = DEFAULT
    parameters: Mapping[str, Any] = {}


def configured(
    base: Hardware,
    changes: Changes,
    schedule: Schedule = DEFAULT,
    parameters: Mapping[str, Any] | None = None,
) -> Configuration:
    """``base``, ``schedule`` and ``parameters`` (simulator -> its own) with ``changes``; a
    "mapping" may be a table of `UserMapping`'s fields.

    Raises ValueError for unknown fields and bad values.
    """
    _check_fields(changes)
    base, schedule = apart(base, schedule)
    own = {name: value for name, value in changes.items() if "." in name}
    used = {name: changes[name] for name in SCHEDULE_FIELDS if name in changes}
    built = {name: value for name, value in changes.items() if name not in {**own, **used}}
    if isinstance(used.get("mapping"), Mapping):
        used["mapping"] = _mapping_of(used["mapping"])
    made = dict(parameters or {})
    for name, value in own.items():
        simulator, _, field = name.partition(".")
        before = made.get(simulator, SIMULATORS[simulator].parameters)
        made[simulator] = replace(before, **{field: value})
    return Configuration(replace(base, **built), replace(schedule, **used), made)


def _mapping_of(table: Mapping[str, Any]) -> UserMapping:
    known = [item.name for item in fields(UserMapping)]
    unknown = [name for name in table if name not in known]
    if unknown:
        raise ValueError(
            f"no such field of mapping: {', '.join(unknown)}; fields are {', '.join(known)}"
        )
    return UserMapping(**table)


def load_configurations(path: str | os.PathLike[str]) -> tuple[dict[str, Any], ...]:
    """Configurations from a .toml or .json file: a table "grid" (field -> list of values, as
    `grid` takes it) and a list "configuration" of single ones, one of them or both; JSON
    may be that list alone. Raises ValueError, naming the file, for anything else.
    """
    with open(path, "rb") as file:
        text = file.read()
    try:
        table = json.loads(text) if str(path).endswith(".json") else tomllib.loads(text.decode())
        return _listed(table)
    except ValueError as error:
        raise ValueError(f"{path}: not a list of configurations ({error})") from None


def _listed(table: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(table, list):
        table = {"configuration": table}
    if not isinstance(table, dict) or not table or set(table) - {"grid", "configuration"}:
        got = sorted(table) if isinstance(table, dict) else table
        raise ValueError(f"it holds 'grid' and 'configuration', got {got!r}")
    single = table.get("configuration", [])
    if not isinstance(single, list) or not all(isinstance(one, dict) for one in single):
        raise ValueError(f"'configuration' is a list of tables, got {single!r}")
    combined = table.get("grid", {})
    if not isinstance(combined, dict):
        raise ValueError(f"'grid' is a table of lists, got {combined!r}")
    return (*(grid(combined) if combined else ()), *single)


def _check_fields(names: Any) -> None:
    known = [*HARDWARE_FIELDS, *SCHEDULE_FIELDS, *PARAMETERS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no such field: {', '.join(unknown)}; fields are {', '.join(known)}")
