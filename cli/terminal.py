"""How the command talks: progress and errors on standard error, results on standard output."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from ..progress import silent

if TYPE_CHECKING:
    from ..progress import Progress

OUT = Console(soft_wrap=False)
ERR = Console(stderr=True)
FIRST = os.environ.get("RANK", "0") == "0"
"""Of processes that `torchrun` started, the first alone speaks of what all find."""


@contextlib.contextmanager
def one_line_errors(quiet: bool = False) -> Iterator[None]:
    """Errors of use end in one line on standard error; warnings are shown as one line, and
    so, unless ``quiet``, is what the library logs (that the engine is being compiled)."""
    with warnings.catch_warnings(), _logged(quiet):
        warnings.simplefilter("default")
        warnings.showwarning = _show_warning
        try:
            yield
        except (ValueError, OSError, FloatingPointError, ImportError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            ERR.print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            ERR.print("interrupted; nothing half-written is left", style="red")
            raise typer.Exit(130) from None


@contextlib.contextmanager
def _logged(quiet: bool) -> Iterator[None]:
    logger, handler = logging.getLogger("sievit"), _Notes()
    if FIRST and not quiet:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Notes(logging.Handler):
    """One line a record on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        ERR.print(f"note: {record.getMessage()}", markup=False, highlight=False, soft_wrap=True)


def _show_warning(message: Warning | str, *_details: Any, **_more: Any) -> None:
    warn(message)


def warn(message: Warning | str) -> None:
    """One line on standard error."""
    if FIRST:
        ERR.print(
            f"warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True
        )


def check_writable(folder: Path) -> None:
    """Fail now rather than after minutes of work."""
    from ..files import written_whole

    try:
        with contextlib.suppress(_Probe), written_whole(folder / "probe"):
            raise _Probe
    except OSError as error:
        raise ValueError(f"cannot write into {str(folder)!r}: {error.strerror or error}") from None


def check_targets(*files: Path | None, folder: Path | None) -> None:
    """As `check_writable`, for the files and the folder that are to be written; None: is not."""
    for path in files:
        if path is not None:
            check_writable(path.parent)
            if path.is_dir():
                raise ValueError(f"{str(path)!r} is a folder, a file was expected")
    if folder is not None:
        check_writable(folder)


class _Probe(Exception):
    """Leaves `written_whole` without keeping the file."""


@contextlib.contextmanager
def progress_bars(quiet: bool) -> Iterator[Progress]:
    """A bar a stage with the time left, on standard error."""
    if quiet:
        yield silent
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<30}"),
        BarColumn(30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=ERR) as bars:
        tasks: dict[str, Any] = {}

        def tell(stage: str, share: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0)
            bars.update(tasks[stage], completed=share)

        yield tell
