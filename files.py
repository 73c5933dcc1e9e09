"""Writing files whole or not at all: a temporary name beside the target, then a rename."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` if the block succeeds.

    The temporary file keeps the suffix of ``path``, because numpy, matplotlib and others
    choose a format by it. On any exception it is removed and ``path`` stays as it was.
    Missing parent folders are made. Raises ``OSError`` where the folder cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(data: Any, path: str | os.PathLike[str]) -> None:
    """Write ``data`` as JSON, whole or not at all; NaN is an error."""
    text = json_text(data)
    with written_whole(path) as temporary:
        temporary.write_text(text + "\n")


def json_text(data: Any) -> str:
    """``data`` as JSON. Raises ValueError for NaN."""
    return json.dumps(data, indent=1, allow_nan=False)


def _umask() -> int:
    """The process's umask; it can only be read by setting it."""
    current = os.umask(0)
    os.umask(current)
    return current
