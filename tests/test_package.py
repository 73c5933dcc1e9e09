"""The repository is the package: it installs, imports from anywhere, and ships what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

import sievit
from sievit.files import write_json
from sievit.provenance import versions

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = {"tests", "examples"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_listed_packages_are_the_folders():
    parts = [p for p in ROOT.iterdir() if p.is_dir() and p.name[0] != "." and p.name != "build"]
    files = [ROOT / "__init__.py", *(f for part in parts for f in part.rglob("__init__.py"))]
    found = {".".join(("sievit", *f.parent.relative_to(ROOT).parts)) for f in files}
    assert found == set(project()["tool"]["setuptools"]["packages"])
    assert not {name.split(".")[1] for name in found if "." in name} & NOT_SHIPPED


def test_importing_sievit_loads_neither_torch_nor_matplotlib():
    code = "import sys, sievit; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    assert run([sys.executable, "-c", code]).strip() == "[]"


def test_the_simulator_needs_no_torch():
    code = "import sys, sievit.accel, sievit.workload; print('torch' in sys.modules)"
    assert run([sys.executable, "-c", code]).strip() == "False"


@pytest.mark.parametrize("module", ["sievit.result", "sievit.pipeline.result"])
@pytest.mark.parametrize("name", ["versions", "write_json"])
def test_names_that_moved_to_another_module_still_import_with_a_warning(module, name):
    with pytest.warns(DeprecationWarning, match=f"has moved to sievit.*{name}"):
        found = getattr(importlib.import_module(module), name)
    assert found is {"versions": versions, "write_json": write_json}[name]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("any name") / "clone"
    listed = run(["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"])
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q"]
    run([*pip, "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)])
    return next(folder.glob("sievit-*.whl"))


def test_the_wheel_imports_from_another_folder(wheel, tmp_path):
    venv.create(tmp_path / "venv", system_site_packages=True, with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    # The new environment's base is the interpreter's own; hand it this one's packages.
    here = [p for p in sys.path if p.endswith("site-packages")]
    Path(site, "outer.pth").write_text("\n".join(here))
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    run([*install, "--no-deps", "--no-index", "--target", site, str(wheel)])
    code = (
        "import sievit, sievit.models, sievit.sparsify, sievit.ae, sievit.accel, sievit.pipeline;"
        "from sievit.workload import AttentionMask; print(sievit.__file__, sievit.__version__)"
    )
    where, version = run([python, "-I", "-c", code], cwd=tmp_path).split()
    assert Path(where).is_relative_to(tmp_path)
    assert version == sievit.__version__


def run(command: list, cwd: Path | None = None) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules() -> list[str]:
    return [
        m.name
        for m in pkgutil.walk_packages(sievit.__path__, "sievit.")
        if m.name.split(".")[1] not in NOT_SHIPPED
    ]


@pytest.mark.parametrize("name", modules())
def test_doctests(name):
    if name.endswith("_gpu"):
        pytest.importorskip("triton", reason="triton is the extra 'gpu'")
    assert doctest.testmod(importlib.import_module(name)).failed == 0
