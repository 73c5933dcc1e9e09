"""Shared fixtures: the data of the published systems, a small mask, timm."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from golden_data import SHIPPED, WHOLE, locate

# A suite started in the background may ignore interrupts; tests that send them to a child
# need the child to hear them.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


class TheCheckoutIsNoTestPackage:
    """The root's `__init__.py` is the library's: collected as a package of tests it would be
    imported once more, under the name of the folder, which need not be a name of Python."""

    @staticmethod
    def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Dir | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(TheCheckoutIsNoTestPackage)


@pytest.fixture(scope="session")
def golden(tmp_path_factory) -> Callable[[str], Path]:
    """A function: name inside the golden data -> Path of the whole file or of its shipped part;
    skips the test where there is neither."""

    def find(name: str) -> Path:
        path = locate(name)
        if path is None and name.endswith(".npy"):
            path = unpacked(name, tmp_path_factory)
        if path is None:
            pytest.skip(f"{name} is not shipped and not at {WHOLE}")
        return path

    return find


def unpacked(name: str, tmp_path_factory) -> Path | None:
    """A published mask, True = pruned, out of the bits that are shipped of it."""
    import numpy as np

    from sievit.workload import AttentionMask

    packed = (SHIPPED / name).with_suffix(".npz")
    if not packed.exists():
        return None
    path = tmp_path_factory.mktemp("masks") / packed.with_suffix(".npy").name
    np.save(path, ~np.stack(AttentionMask.load(packed).keep))
    return path


@pytest.fixture(scope="session")
def timm():
    """timm, where it is installed; beside a CPU build of torch its import of torchvision needs
    the two operators declared."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield pytest.importorskip("timm")
    del library


@pytest.fixture(scope="session")
def core_cases(golden) -> dict[str, tuple]:
    """Name -> (arrays, keyword arguments) of the released deformable core."""
    import numpy as np
    import torch

    cases = {}
    with np.load(golden("golden/dcn_core.npz")) as data:
        names = dict.fromkeys(key.split("/")[0] for key in data)
        for name in names:
            arrays = {k.split("/")[1]: torch.tensor(data[k]) for k in data if k.startswith(name)}
            kernel, stride, padding, dilation, groups, _, removed = arrays["params"].tolist()
            given = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
            given |= {"groups": groups, "remove_center": bool(removed)}
            cases[name] = arrays, given | {"offset_scale": arrays["offset_scale"].item()}
    return cases


@pytest.fixture(scope="session")
def mask_file(tmp_path_factory) -> Path:
    """A sparse mask for DeiT-Tiny at 64 px."""
    import numpy as np

    from sievit.workload import AttentionMask

    keep = np.random.default_rng(0).random((12, 3, 17, 17)) < 0.15
    keep[:, :, 0] = keep[:, :, :, :3] = True
    path = tmp_path_factory.mktemp("mask") / "mask.npz"
    AttentionMask(tuple(keep)).save(path)
    return path
