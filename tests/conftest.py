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
