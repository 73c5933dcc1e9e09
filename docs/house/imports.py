"""The imports of a checkout, read from its syntax trees: nothing of the project is imported.

The repository root is the package, so ``accel/simulate.py`` is the module
``sievit.accel.simulate``. A folder belongs to the package when it has an ``__init__.py``;
``tests``, ``examples`` and ``docs`` do not. A module that is named in a string only (a
registry that loads its entries by name) leaves no import to read.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PACKAGE = "sievit"
LEFT_OUT = frozenset({"tests", "examples", "docs"})
KINDS = ("plain", "lazy", "typing")
"""At the top of a file; inside a function; under ``if TYPE_CHECKING``."""


@dataclass(frozen=True, order=True)
class Import:
    """One file imports another; both are paths from the root, such as ``accel/simulate.py``."""

    source: str
    target: str
    kind: str = "plain"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, not {self.kind!r}")


@dataclass(frozen=True)
class Checkout:
    """The Python files of a package, each with its number of lines, and the imports among
    them: at most one of each kind between two files."""

    lines: dict[str, int]
    imports: tuple[Import, ...]


def read_checkout(root: Path, package: str = PACKAGE) -> Checkout:
    """Read the package whose folder is ``root``."""
    texts = {name: (root / name).read_text(encoding="utf-8") for name in package_files(root)}
    imports = {found for name in texts for found in file_imports(name, texts, package)}
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    return Checkout(lines, tuple(sorted(imports)))


def package_files(root: Path) -> list[str]:
    """The Python files of the root and of every package folder below it."""
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is not a folder")
    names = [file.relative_to(root).as_posix() for file in root.glob("*.py")]
    for folder in root.iterdir():
        if (folder / "__init__.py").is_file() and folder.name not in LEFT_OUT:
            names += [f"{folder.name}/{name}" for name in package_files(folder)]
    return sorted(names)


def file_imports(name: str, texts: dict[str, str], package: str = PACKAGE) -> set[Import]:
    """The imports of the file ``name`` that lead to another of the files ``texts``."""
    found = set()
    for node, kind in import_nodes(ast.parse(texts[name], name)):
        targets = {find_file(dotted, texts) for dotted in modules(node, name, package)}
        found |= {Import(name, target, kind) for target in targets - {None, name}}
    return found


def import_nodes(node: ast.AST, kind: str = "plain") -> Iterator[tuple[ast.AST, str]]:
    """Every import statement below ``node`` with its kind."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, kind
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        kind = "lazy"
    guarded = node.body if isinstance(node, ast.If) and is_type_checking(node.test) else ()
    for child in ast.iter_child_nodes(node):
        yield from import_nodes(child, "typing" if child in guarded else kind)


def is_type_checking(test: ast.expr) -> bool:
    """Whether a condition is ``TYPE_CHECKING`` or ``typing.TYPE_CHECKING``."""
    return "TYPE_CHECKING" in (getattr(test, "id", None), getattr(test, "attr", None))


def modules(node: ast.AST, name: str, package: str) -> list[tuple[str, ...]]:
    """What a statement in the file ``name`` may import, each as its parts below the package:
    ``from ..a import b`` gives ``("a", "b")``, be ``b`` a module or a name in ``a``."""
    if isinstance(node, ast.Import):
        dotted = [tuple(alias.name.split(".")) for alias in node.names]
        return [parts[1:] for parts in dotted if parts[0] == package]
    base = tuple(node.module.split(".")) if node.module else ()
    if node.level:
        folders = PurePosixPath(name).parent.parts
        if node.level > len(folders) + 1:
            raise ValueError(f"{name}, line {node.lineno}: the import leaves the package")
        base = folders[: len(folders) + 1 - node.level] + base
    elif base[0] == package:
        base = base[1:]
    else:
        return []
    return [(*base, alias.name) for alias in node.names]


def find_file(dotted: tuple[str, ...], files: dict[str, str]) -> str | None:
    """The file of the longest beginning of ``dotted`` that is a module; what is left over is
    a name in it."""
    for end in range(len(dotted), -1, -1):
        path = "/".join(dotted[:end])
        for name in (f"{path}.py", f"{path}/__init__.py".removeprefix("/")):
            if name in files:
                return name
    return None
