"""Names for content: what a result depends on, as one short word."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...workload import PolarizedMask


def fingerprint(content: Any) -> str:
    """32 hex digits that equal content shares: numbers, words, sequences and mappings of
    them, dataclasses with their type's name, polarized masks by their own digest."""
    return hashlib.blake2b(repr(_plain(content)).encode(), digest_size=16).hexdigest()


@functools.cache
def code_fingerprint() -> str:
    """Of every source file of this package that a simulated figure depends on: `simulate`,
    `energy` and all that they import."""
    package = Path(__file__).parents[2]
    made = hashlib.blake2b(digest_size=16)
    for path in sorted(_with_imports({package / "accel" / name for name in _STARTS})):
        text = path.read_bytes()
        made.update(f"{path.relative_to(package).as_posix()} {len(text)} ".encode())
        made.update(text)
    return made.hexdigest()


_STARTS = ("simulate.py", "report/energy.py")


def _with_imports(paths: set[Path]) -> set[Path]:
    """These files and those that they import relatively, and so on."""
    found: set[Path] = set()
    while paths:
        path = paths.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and node.level:
                paths |= _imported(path, node) - found
    return found


def _imported(path: Path, node: ast.ImportFrom) -> set[Path]:
    """The files that a relative import can mean: a module, a package, modules of one."""
    target = path.parents[node.level - 1]
    target = target.joinpath(*(node.module or "").split("."))
    names = (target / alias.name for alias in node.names)
    tried = [name.with_suffix(".py") for name in names]
    if node.module:  # else the package that this file belongs to
        tried += [target.with_suffix(".py"), target / "__init__.py"]
    return {file for file in tried if file.is_file()}


def _plain(content: Any) -> Any:
    if isinstance(content, PolarizedMask):
        return content.digest
    if is_dataclass(content):
        values = (_plain(getattr(content, item.name)) for item in fields(content))
        return (type(content).__name__, *values)
    if isinstance(content, Mapping):
        return tuple(sorted((str(key), _plain(value)) for key, value in content.items()))
    if isinstance(content, (tuple, list)):
        return tuple(_plain(value) for value in content)
    if isinstance(content, np.generic):
        return content.item()
    if content is None or isinstance(content, (bool, int, float, str)):
        return content
    raise TypeError(f"no digest of a {type(content).__name__}")
