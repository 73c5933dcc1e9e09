"""The structure of the library, read from its imports, and the script that reads and draws it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def house(part: str) -> ModuleType:
    """A module of ``docs/house``, loaded from its file."""
    if "house" not in sys.modules:
        package = ModuleType("house")
        package.__path__ = [str(ROOT / "docs" / "house")]
        sys.modules["house"] = package
    return importlib.import_module(f"house.{part}")


imports, rooms, layout, table = map(house, ("imports", "rooms", "layout", "table"))
Import = imports.Import


# The library itself.

FLOORS = {
    "cli/": 6,
    "studies/": 5,
    "pipeline/": 4,
    "sparsify/": 3,
    "ae/": 3,
    "models/": 2,
    "accel/": 2,
    "workload/": 1,
}
"""The floor plan; the single files of the root are the leaves, on floor 0."""


@pytest.fixture(scope="module")
def library():
    return imports.read_checkout(ROOT)


def test_no_circle_of_files(library):
    assert rooms.file_circles(library) == []


def test_every_folder_has_its_floor(library):
    level = rooms.read_level(library)
    assert {room.name for room in level.rooms if room.is_folder} == set(FLOORS)


def test_arrows_lead_to_lower_floors(library):
    arrows = rooms.read_level(library).arrows
    floor = {name: FLOORS.get(name, 0) for arrow in arrows for name in (arrow.source, arrow.target)}
    wrong = [
        one
        for arrow in arrows
        if floor[arrow.source] > 0 or floor[arrow.target] > 0
        if floor[arrow.source] <= floor[arrow.target]
        for one in arrow.imports
    ]
    assert wrong == []


def test_no_folder_has_more_than_18_python_files():
    left_out = {"tests", "build", "dist", "out"}
    counts: dict[Path, int] = {}
    for file in ROOT.rglob("*.py"):
        folder = file.relative_to(ROOT).parent
        if not any(part in left_out or part.startswith(".") for part in folder.parts):
            counts[folder] = counts.get(folder, 0) + 1
    assert counts
    assert {str(folder): count for folder, count in counts.items() if count > 18} == {}


def test_no_file_of_the_library_has_more_than_400_lines(library):
    assert {name: lines for name, lines in library.lines.items() if lines > 400} == {}


# The script, on small trees.


@pytest.fixture
def tree(tmp_path):
    """Writes files given as {path: text} and reads the checkout that they make."""

    def read(files: dict[str, str]):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return imports.read_checkout(tmp_path)

    return read


def found(checkout) -> set[tuple[str, str, str]]:
    return {(one.source, one.target, one.kind) for one in checkout.imports}


FILES = {
    "__init__.py": "VERSION = 1",
    "leaf.py": "",
    "a/__init__.py": "def name(): pass",
    "a/b.py": "def value(): pass",
    "c/__init__.py": "",
    "c/d/__init__.py": "",
}


@pytest.mark.parametrize(
    ("statement", "targets"),
    [
        ("from .. import a", {"a/__init__.py"}),
        ("from .. import leaf, VERSION", {"leaf.py", "__init__.py"}),
        ("from ..a import b", {"a/b.py"}),
        ("from ..a import name", {"a/__init__.py"}),
        ("from ..a.b import value", {"a/b.py"}),
        ("from ..a import b as other, name", {"a/b.py", "a/__init__.py"}),
        ("from ..a import *", {"a/__init__.py"}),
        ("from . import d", {"c/d/__init__.py"}),
        ("from . import VERSION", {"c/__init__.py"}),
        ("from sievit.a import b", {"a/b.py"}),
        ("from sievit import a", {"a/__init__.py"}),
        ("import sievit.a.b as x", {"a/b.py"}),
        ("import sievit", {"__init__.py"}),
        ("import numpy.linalg, os", set()),
        ("from a import b", set()),
    ],
)
def test_what_a_statement_imports(tree, statement, targets):
    checkout = tree(FILES | {"c/here.py": statement})
    assert found(checkout) == {("c/here.py", target, "plain") for target in targets}


def test_relative_imports_of_a_door_start_in_its_own_folder(tree):
    checkout = tree(FILES | {"a/__init__.py": "from .b import value\nfrom ..leaf import x"})
    assert found(checkout) == {
        ("a/__init__.py", "a/b.py", "plain"),
        ("a/__init__.py", "leaf.py", "plain"),
    }


def test_an_import_that_leaves_the_package_is_refused(tree):
    with pytest.raises(ValueError, match=r"leaf\.py, line 1"):
        tree({"leaf.py": "from .. import x"})


def test_imports_in_functions_and_for_types_are_told_apart(tree):
    text = """
from typing import TYPE_CHECKING
import typing
if TYPE_CHECKING:
    from .a import b
else:
    from .a import name
if typing.TYPE_CHECKING:
    from . import c
class Part:
    def work(self):
        if self:
            from .leaf import x
"""
    checkout = tree(FILES | {"top.py": text})
    assert found(checkout) == {
        ("top.py", "a/b.py", "typing"),
        ("top.py", "a/__init__.py", "plain"),
        ("top.py", "c/__init__.py", "typing"),
        ("top.py", "leaf.py", "lazy"),
    }
    arrows = {arrow.target: arrow for arrow in rooms.read_level(checkout).arrows}
    assert not arrows["a/"].deferred
    assert arrows["c/"].deferred
    assert arrows["leaf"].deferred


def test_tests_examples_docs_and_folders_without_a_door_are_left_out(tree):
    outside = ("tests/__init__.py", "examples/__init__.py", "docs/__init__.py", "build/a.py")
    assert set(tree(FILES | dict.fromkeys(outside, "")).lines) == set(FILES)


@pytest.mark.parametrize(
    "back",
    ["from .a import x", "def f():\n from .a import x", "if TYPE_CHECKING:\n from .a import x"],
)
def test_a_circle_is_found_whatever_the_kind_of_import(tree, back):
    checkout = tree({"a.py": "from .b import y", "b.py": "from .c import z", "c.py": back})
    assert rooms.file_circles(checkout) == [("a.py", "b.py", "c.py")]
    assert rooms.read_level(checkout).height == 1


def test_a_circle_through_a_door_is_found(tree):
    checkout = tree({"p/__init__.py": "from .q import x", "p/q.py": "from . import name"})
    assert rooms.file_circles(checkout) == [("p/__init__.py", "p/q.py")]


def test_folders_can_form_a_circle_when_no_files_do(tree):
    doors = {"p/__init__.py": "", "q/__init__.py": ""}
    files = {
        "p/a.py": "from ..q import b",
        "q/b.py": "",
        "q/c.py": "from ..p import d",
        "p/d.py": "",
    }
    checkout = tree(doors | files)
    assert rooms.file_circles(checkout) == []
    assert rooms.read_level(checkout).circles == [("p/", "q/")]


def test_floors_by_hand():
    #  e -> d -> (b <-> c) -> a, and e -> a: the circle is one floor.
    pairs = ["ed", "db", "bc", "cb", "ca", "ea"]
    assert rooms.floors("abcdef", [tuple(pair) for pair in pairs]) == {
        "a": 0,
        "b": 1,
        "c": 1,
        "d": 2,
        "e": 3,
        "f": 0,
    }


def test_a_level_by_hand(tree):
    checkout = tree(
        FILES
        | {
            "a/low.py": "",
            "c/one.py": "from ..a import b, low\nfrom ..leaf import x",
            "c/d/two.py": "from ...a.b import value\nfrom ..one import z",
        }
    )
    whole = rooms.read_level(checkout)
    assert [(room.name, room.files) for room in whole.rooms] == [("a/", 3), ("c/", 4), ("leaf", 1)]
    assert {(a.source, a.target): len(a.imports) for a in whole.arrows} == {
        ("c/", "a/"): 3,
        ("c/", "leaf"): 1,
    }
    assert whole.floors == {"a/": 0, "leaf": 0, "c/": 1}
    inside = rooms.read_level(checkout, "c")
    assert inside.names == ["d/", "one"]
    assert inside.pairs == [("d/", "one")]
    with pytest.raises(ValueError, match="'nowhere'"):
        rooms.read_level(checkout, "nowhere")


def test_the_table_names_the_largest_and_the_circles(tree):
    text = table.table(tree(FILES | {"a/b.py": "from . import name", "a/e.py": "\n\n\n"}))
    assert "largest folder: a, 3 files" in text
    assert "longest file: a/e.py, 3 lines" in text
    assert "circles among rooms: none" in text
    cells = [line.split() for line in text.splitlines()]
    assert ["house", "3", "1", "0", "0", "0", "2", "__init__.py", "1"] in cells


# The pictures.


def placed(checkout, page: float = 500.0):
    return layout.lay_out(rooms.read_level(checkout), lambda name: 8.0 * len(name), page)


def wide_tree() -> dict[str, str]:
    """Forty files, each importing some of those before it, in a fixed pattern."""
    return {
        f"file_{i}.py": "\n".join(f"from .file_{j} import x" for j in range(i) if i * j % 7 == 3)
        for i in range(40)
    }


def test_nothing_overlaps_and_all_is_on_the_page(tree):
    plan = placed(tree(wide_tree()))
    for row in plan.rows:
        walls = [
            (plan.middle[s] - plan.width[s] / 2, plan.middle[s] + plan.width[s] / 2) for s in row
        ]
        assert walls[0][0] >= -1e-6
        assert walls[-1][1] <= 500 + 1e-6
        assert all(left[1] < right[0] for left, right in pairwise(walls))


def test_every_arrow_is_drawn_and_leads_down(tree):
    checkout = tree(wide_tree() | {"file_0.py": "from .file_3 import x"})
    plan = placed(checkout)
    drawn = {(a.source, a.target) for s in plan.segments for a in s.arrows}
    drawn |= {(a.source, a.target) for a in plan.sideways}
    assert drawn == set(rooms.read_level(checkout).pairs)
    assert all(s.upper.row == s.lower.row + 1 for s in plan.segments)


def test_the_order_has_no_needless_crossing(tree):
    crossed = {"a.py": "from .z import x", "b.py": "from .y import x", "y.py": "", "z.py": ""}
    plan = placed(tree(crossed))
    above, _ = layout.neighbours(plan.segments)
    assert layout.crossings(plan.rows, above) == 0


def test_the_nearest_rising_numbers():
    assert layout.isotonic([1, 3, 2, 2, 5, 4]) == pytest.approx([1, 7 / 3, 7 / 3, 7 / 3, 4.5, 4.5])


def test_the_script_draws_the_same_bytes_twice(tree, tmp_path):
    tree(FILES | {"c/here.py": "from ..a import b"})
    script = [sys.executable, ROOT / "docs" / "draw_house.py", "--tree", tmp_path, "--text"]
    texts = []
    for name in ("one.svg", "two.svg"):
        command = [*map(str, script), "--out", str(tmp_path / name)]
        texts.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert texts[0] == texts[1] != ""
    picture = (tmp_path / "one.svg").read_bytes()
    assert picture == (tmp_path / "two.svg").read_bytes()
    assert b"<dc:date>" not in picture
