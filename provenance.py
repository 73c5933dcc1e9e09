"""What a figure was made with: versions of the packages, the platform, the processors."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "numpy", "scipy", "numba", "safetensors", "pillow", "onnx", "scikit-image")


def versions() -> dict[str, str | int]:
    """Python, the platform, the processors and the packages that figures depend on."""
    import torch

    found: dict[str, str | int] = {
        "python": platform.python_version(),
        "platform": sys.platform,
        "processor": device_name(torch.device("cpu")),
        "cores": os.cpu_count() or 1,
    }
    if torch.cuda.is_available():
        found["gpu"] = device_name(torch.device("cuda"))
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """The processor's name as the system gives it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1] for line in file if line.startswith("model name")]
        return names[0].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
