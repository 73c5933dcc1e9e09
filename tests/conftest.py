"""Shared fixtures: golden data beside the project, where it is present."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

# A suite started in the background may ignore interrupts; tests that send them to a child
# need the child to hear them.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
GOLDEN_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """A function: path inside the golden data -> Path, or skip the test where it is absent."""

    def find(name: str) -> Path:
        path = GOLDEN_DATA / name
        if not path.exists():
            pytest.skip(f"golden data {name} is not at {GOLDEN_DATA}")
        return path

    return find


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
