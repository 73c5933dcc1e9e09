"""Names and import paths of the version before the folders were arranged still lead somewhere."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
import warnings
from importlib.util import resolve_name
from pathlib import Path

import pytest

from sievit.accel import presets, simulate
from sievit.models import create, trace
from sievit.moved import MODULES, NAMES, PACKAGES, TABLES
from sievit.sparsify import random_mask, synthetic_maps, threshold

ROOT = Path(__file__).resolve().parents[1]

PUBLIC = {
    "sievit.models": (
        "AttentionCall AttentionHook Complexity Handle LoadReport SaliencyDecoder complexity "
        "create create_for features find_attention fuse intercept load_weights names prefix_tokens "
        "replace_attention replace_depthwise scale trace"
    ),
    "sievit.sparsify": (
        "Fidelity GradualMask HardwareMask accuracy attach attach_int8 average_attention "
        "calibrate_int8 codesign_masks fidelity finetune head_similarity judge polarize prune "
        "random_mask recover redistribute synthetic_maps taylor_importance threshold "
        "token_features window_mask"
    ),
    "sievit.ae": (
        "CodecErrors ExplainedVariance FittedCodecs HeadLinear HeadMoments QKCodec Reconstruction "
        "attach_codec codec_errors fit_closed_form fit_codecs fold head_moments "
        "latent_heads_by_layer latent_heads_for mean_errors train_codec"
    ),
    "sievit.accel": (
        "PROFILES Area Arithmetic CodecWeights Energy EnergyProfile Exploration FunctionalResult "
        "Hardware HeadCost OpCost Point Quantized Report Timeline Traffic area arithmetic_of "
        "compare energy explore grid integer_attention load_profile presets quantize record "
        "simulate simulate_attention speedups write_trace"
    ),
    "sievit.accel.kernels": (
        "Arithmetic AttentionPlan Choice Int8Attention Int8Scales MeasuredAttention RangeWatcher "
        "SparseAttention choose_kernel deform_conv deform_core int8_attention measure_attention "
        "plan_attention plan_layers reference_attention sparse_attention"
    ),
    "sievit.workload": (
        "PUBLISHED_MIN_KEPT Attention AttentionMask Conv Deform Elementwise Gemm HeadCodec Op "
        "PolarizedMask Unknown Unused Workload polarize_head"
    ),
}
"""Package -> its public names in the version before."""

RENAMED = {
    ("sievit.accel", "Point"): "sievit.accel.DesignPoint",
    ("sievit.sparsify", "codesign_masks"): "sievit.sparsify.budgeted_masks",
    ("sievit.sparsify", "judge"): "sievit.sparsify.evaluate",
    ("sievit.workload", "PUBLISHED_MIN_KEPT"): "sievit.workload.PUBLISHED_GLOBAL_THRESHOLD",
}
"""Those that are called otherwise today."""

PATHS = [
    ("sievit.accel", "presets", "sievit.accel"),
    ("sievit.accel", "simulate", "sievit.accel"),
    ("sievit.accel.kernels", "plan_attention", "sievit.accel.kernels"),
    ("sievit.accel.kernels.attention", "SparseAttention", "sievit.accel.kernels.attention"),
    ("sievit.ae", "attach_codec", "sievit.ae"),
    ("sievit.images", "center_crops", "sievit.images"),
    ("sievit.images", "image_paths", "sievit.images"),
    ("sievit.images", "load_folder", "sievit.images"),
    ("sievit.models", "AttentionHook", "sievit.models"),
    ("sievit.models", "create", "sievit.models"),
    ("sievit.models", "features", "sievit.models"),
    ("sievit.models", "find_attention", "sievit.models"),
    ("sievit.models", "intercept", "sievit.models"),
    ("sievit.models", "load_weights", "sievit.models"),
    ("sievit.models", "prefix_tokens", "sievit.models"),
    ("sievit.models", "replace_attention", "sievit.models"),
    ("sievit.models", "trace", "sievit.models"),
    ("sievit.sparsify", "attach", "sievit.sparsify"),
    ("sievit.sparsify", "average_attention", "sievit.sparsify"),
    ("sievit.sparsify", "threshold", "sievit.sparsify"),
    ("sievit.workload", "Workload", "sievit.workload"),
    ("sievit.attachments", "Attachments", "sievit.pipeline.attachments"),
    ("sievit.masks", "AttentionMask", "sievit.workload.masks"),
    ("sievit.networks", "model_workload", "sievit.pipeline.networks"),
    ("sievit.networks", "sparse_workload", "sievit.pipeline.networks"),
    ("sievit.ops", "Gemm", "sievit.workload.ops"),
    ("sievit.sparse_model", "class_labels", "sievit.pipeline.sparse_model"),
    ("sievit.accel.dram", "replay", "sievit.accel.dram.bandwidth"),
    ("sievit.models.dcn", "DCNv3", "sievit.models.families.dcn"),
    ("sievit.models.trace", "trace", "sievit.models.costs.trace"),
    ("sievit.models.vit", "ViT", "sievit.models.families.vit"),
]
"""Import paths that users' scripts have: module, name, the module that has it today."""


def taken(module: str, name: str) -> tuple[object, list[str]]:
    """What ``from module import name`` gives, and the warnings about the name."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = getattr(importlib.import_module(module), name)
    texts = [str(one.message) for one in seen if one.category is DeprecationWarning]
    return found, [text for text in texts if text.startswith("sievit.")]


@pytest.mark.parametrize("old", MODULES)
def test_a_moved_module_imports_and_has_the_names_of_its_new_place(old):
    if old.endswith("_gpu"):
        pytest.importorskip("triton", reason="triton is the extra 'gpu'")
    new = importlib.import_module(MODULES[old])
    own = [n for n, v in vars(new).items() if getattr(v, "__module__", None) == new.__name__]
    names = [n for n in own if not n.startswith("_")] or [n for n in vars(new) if n.isupper()]
    assert names
    for name in names:
        found, texts = taken(old, name)
        assert found is getattr(new, name)
        assert len(texts) == 1
        assert f"{old}.{name} has moved to {new.__name__}.{name}" in texts[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_forwards_the_names_of_the_module_that_had_its_name(package):
    new = importlib.import_module(PACKAGES[package])
    own = [n for n, v in vars(new).items() if getattr(v, "__module__", None) == new.__name__]
    for name in (n for n in own if not n.startswith("_")):
        assert taken(package, name)[0] is getattr(new, name)


RENAMES = [
    (place, old, module, new)
    for module, names in NAMES.items()
    for old, new in names.items()
    for place in ([m for m in MODULES if MODULES[m] == module] or [module])
]
"""Where it was, old name, where it is, new name."""


@pytest.mark.parametrize(("place", "old", "module", "new"), RENAMES)
def test_a_renamed_name_warns_with_the_new_one(place, old, module, new):
    found, texts = taken(place, old)
    path = new if "." in new else f"{module}.{new}"
    holder, _, last = path.rpartition(".")
    assert found is getattr(pkgutil.resolve_name(holder), last)
    assert len(texts) == 1
    assert f"{place}.{old} has moved to {path};" in texts[0]


OLD_NAMES = {
    "sievit.accel.mapping": "codec_side_bytes",
    "sievit.accel.simulators": "SIMULATORS simulate_sanger simulate_vitcod simulate_systolic",
    "sievit.accel.simulators.released": "simulate_released",
    "sievit.accel.simulators.sanger": "MASK_BITS_PER_CYCLE simulate_sanger pack kept_by_row",
    "sievit.accel.simulators.spatten": "simulate_spatten cascade",
    "sievit.accel.simulators.systolic": "simulate_input_stationary attention_cost",
    "sievit.accel.simulators.vitcod": "WITHOUT simulate_dense simulate_plain",
    "sievit.cli.front_tables": "front_table",
    "sievit.cli.machine_tables": "WORDS machine_tables",
    "sievit.cli.machines": "Simulators",
    "sievit.cli.options": "MinKept count_or_share load_network normalization_named",
    "sievit.cli.tables": "codesign_tables fidelity_table mask_table",
    "sievit.models.feeding": "moved images_for repeated",
    "sievit.sparsify.fidelity": "judge fidelity",
    "sievit.sparsify.threshold": "WARN_OFF_BY mass_before checked_maps information quota ratio",
}
"""Of modules of the version before that lost names: those names, and some that they kept."""


@pytest.mark.parametrize(
    ("module", "name"), [(m, name) for m, names in OLD_NAMES.items() for name in names.split()]
)
def test_names_that_left_a_module_are_still_imported_from_it(module, name):
    assert taken(module, name)[0] is not None


def test_old_functions_compute_what_they_computed():
    old = {name: taken("sievit.accel.simulators", f"simulate_{name}")[0]
           for name in ("sanger", "spatten", "vitcod", "no_codec", "input_stationary")}  # fmt: skip
    today = {"no_codec": "vitcod_no_codec", "input_stationary": "systolic_is"}
    workload, hardware = trace(create("deit_tiny"), 64), presets["vitcod"]
    mask = random_mask([(3, 17, 17)] * 12, sparsity=0.5, seed=0)
    workload = workload.with_attention(mask)
    for name, function in old.items():
        assert function(workload, hardware, 2) == simulate(
            workload, hardware, today.get(name, name), 2
        )
    maps = synthetic_maps([(2, 17, 17)], 1, 0)
    rules = {name: taken("sievit.sparsify.threshold", name)[0]
             for name in ("information", "quota", "ratio")}  # fmt: skip
    assert rules["information"](maps, [0.7], 1).digest == threshold(maps, theta=0.7).digest
    assert rules["ratio"](maps, 0.6, 1).digest == threshold(maps, "ratio", sparsity=0.6).digest
    quota = threshold(maps, "quota", sparsity=[[0.5, 0.6]])
    assert rules["quota"](maps, [[0.5, 0.6]], 1).digest == quota.digest


def test_old_tables_are_made_of_the_registry():
    without, texts = taken("sievit.accel.simulators.vitcod", "WITHOUT")
    assert without["vitcod_plain"] == {"codec": False, "reorder": False}
    assert without["vitcod"] == {}
    assert "registry.SIMULATORS" in texts[0]
    words = taken("sievit.cli.machine_tables", "WORDS")[0]
    assert words["systolic"] == "dense, nothing pruned, each product in the schedule's dataflow"
    assert {name for names in TABLES.values() for name in names} == {"WITHOUT", "WORDS"}


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("sievit.masks", {"AttentionMask", "PolarizedMask", "PUBLISHED_MIN_KEPT"}),
        ("sievit.accel.stepped", {"Stepped", "step"}),
        ("sievit.accel.simulators.vitcod", {"WITHOUT", "simulate_vitcod", "attention_cost"}),
    ],
)
def test_a_star_takes_the_public_names_of_a_moved_module(module, names):
    taken_names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(f"from {module} import *", taken_names)
    assert names <= set(taken_names)
    assert not any(name.startswith("_") for name in taken_names if not name.endswith("__"))


@pytest.mark.parametrize(
    ("package", "name"), [(p, name) for p, names in PUBLIC.items() for name in names.split()]
)
def test_every_public_name_is_where_it_was(package, name):
    _, texts = taken(package, name)
    if (package, name) in RENAMED:
        assert f"has moved to {RENAMED[package, name]};" in texts[0]
    else:
        assert texts == []


@pytest.mark.parametrize(("module", "name", "new"), PATHS)
def test_paths_that_scripts_import_from(module, name, new):
    found, texts = taken(module, name)
    assert found is getattr(importlib.import_module(new), name)
    assert [f"{module}.{name} has moved to {new}.{name}" in text for text in texts] == (
        [] if module == new else [True]
    )


@pytest.mark.parametrize("name", ["Nothing", "__wrapped__"])
@pytest.mark.parametrize("module", ["sievit.masks", "sievit.accel", "sievit.accel.report"])
def test_a_name_that_never_was_is_an_attribute_error(module, name):
    with pytest.raises(AttributeError, match=name):
        getattr(importlib.import_module(module), name)


def answer(code: str, *options: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_importing_sievit_loads_nothing_heavy():
    heavy = ("torch", "numpy", "numba", "matplotlib")
    assert answer(f"import sys, sievit; print([m for m in {heavy} if m in sys.modules])") == "[]"


@pytest.mark.parametrize(
    ("package", "name", "module_first"),
    [
        ("sievit.models", "trace", True),
        ("sievit.models", "trace", False),
        ("sievit.models", "complexity", True),
        ("sievit.accel", "energy", True),
        ("sievit.accel", "energy", False),
    ],
)
def test_an_old_module_does_not_take_the_place_of_a_function(package, name, module_first):
    lines = [f"from {package}.{name} import {name} as taken", f"from {package} import {name}"]
    code = "\n".join([*(lines if module_first else lines[::-1]), f"import {package} as p"])
    same = f"p.{name} is taken is {name}, type(taken).__name__"
    assert answer(f"{code}\nprint({same})", "-W", "ignore") == "True function"


def library() -> list[Path]:
    left_out = {"tests", "examples", "docs", "build", "dist", "out"}
    files = [file.relative_to(ROOT) for file in ROOT.rglob("*.py")]
    return [f for f in files if f.parts[0] not in left_out and not f.parts[0].startswith(".")]


def test_no_import_of_the_library_warns():
    modules = [".".join(("sievit", *f.with_suffix("").parts)) for f in library()]
    wanted = [m for m in modules if not m.endswith(("__init__", "__main__", "_gpu"))]
    assert len(wanted) > 100
    code = f"import importlib\nfor name in {wanted}: importlib.import_module(name)"
    assert answer(code, "-W", "error:sievit.:DeprecationWarning") == ""


def imported(file: Path) -> set[str]:
    """Every module, and every name of a module, that a file of the library imports anywhere."""
    package = ".".join(("sievit", *file.parts[:-1]))
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def test_nothing_in_the_library_imports_by_an_old_name():
    functions = {f"{package}.{name}" for package in PUBLIC for name in PUBLIC[package].split()}
    old = set(MODULES) - functions
    old |= {f"{module}.{name}" for module in NAMES for name in NAMES[module]}
    assert {str(file): both for file in library() if (both := imported(file) & old)} == {}
