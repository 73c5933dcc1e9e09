"""Training state on disk: written whole or not at all, damage noticed, the one before kept.

A file is what `torch.save` writes, followed by its SHA-256, so that a cut or altered file
is refused before anything of it is believed. Reading never unpickles code.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...files import written_whole

DIGEST_BYTES = 32
KEPT = 2
"""Checkpoints that stay in a folder: the newest, and one to fall back on."""


class DamagedCheckpoint(ValueError):
    """A file that is not the whole of what was written."""


def save_checkpoint(folder: str | os.PathLike[str], step: int, state: Mapping[str, Any]) -> Path:
    """Write ``state`` (tensors, numbers, strings, dicts and lists of them) after ``step``
    steps; older checkpoints but one are removed.

    Raises OSError naming the last good checkpoint where this one cannot be written.
    """
    target = Path(folder) / f"step-{step:08d}.pt"
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    payload = buffer.getbuffer()
    try:
        with written_whole(target) as temporary, open(temporary, "wb") as file:
            file.write(payload)
            file.write(hashlib.sha256(payload).digest())
    except OSError as error:
        kept = checkpoint_files(folder)
        raise OSError(
            error.errno,
            f"the checkpoint of step {step} could not be written: {error.strerror or error}; "
            f"the last good one is {kept[-1] if kept else 'none'}",
        ) from error
    for old in checkpoint_files(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return target


def checkpoint_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Checkpoints in ``folder``, oldest first, damaged ones included."""
    return sorted(Path(folder).glob("step-*.pt"))


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state in a file. Raises DamagedCheckpoint where it is not whole."""
    content = Path(path).read_bytes()
    payload, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if len(content) <= DIGEST_BYTES or hashlib.sha256(payload).digest() != digest:
        raise DamagedCheckpoint(f"checkpoint {str(path)!r} is damaged: its checksum does not fit")
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


def newest_checkpoint(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its path; damaged ones are passed over with a warning.

    Raises DamagedCheckpoint where there are checkpoints but none is whole.
    """
    files = checkpoint_files(folder)
    for path in reversed(files):
        try:
            return path, load_checkpoint(path)
        except DamagedCheckpoint as error:
            warnings.warn(f"{error}; the one before it is used", stacklevel=2)
    if files:
        raise DamagedCheckpoint(f"no checkpoint in {str(folder)!r} is whole")
    return None
