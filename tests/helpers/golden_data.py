"""Where the data of the published systems lies: all of it beside the project, or the part of it
that the project ships (`tests/data`, its README says what). Tests run over whatever is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
WHOLE = ROOT.parent / "shared" / "data"
SHIPPED = ROOT / "tests" / "data"


def locate(name: str) -> Path | None:
    """The file of that name: the whole one where it is there, else the shipped part."""
    found = [folder / name for folder in (WHOLE, SHIPPED) if (folder / name).exists()]
    return found[0] if found else None


def cases(name: str) -> list[str]:
    """The cases that a file of golden data has, in its order: what stands before the first /."""
    path = locate(name)
    if path is None:
        raise FileNotFoundError(f"{name} is neither in {WHOLE} nor in {SHIPPED}")
    if path.suffix == ".json":
        return list(json.loads(path.read_text()))
    with np.load(path) as data:
        return list(dict.fromkeys(key.split("/")[0] for key in data.files))
