"""A training's steps on disk as they go: CSV, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

COLUMNS = ("step", "rate", "loss")


class TrainingLog:
    """Appends a row a step to ``log.csv`` in ``folder``: step, rate, loss and its terms.

    A training that is taken up again at an earlier step replaces the rows after it. Call
    it as a listener of `sievit.models.training.loop.train`; `close` (or a ``with``) ends it.
    """

    def __init__(self, folder: str | os.PathLike[str], tensorboard: bool = True) -> None:
        self.path = Path(folder) / "log.csv"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO | None = None
        self._board = None
        if tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder))

    def __call__(self, step: int, rate: float, terms: Mapping[str, float], share: float) -> None:
        if self._file is None:
            self._file = self._begun(step, terms)
        row = [step, f"{rate:.6g}", f"{sum(terms.values()):.8g}"]
        csv.writer(self._file).writerow([*row, *(f"{value:.8g}" for value in terms.values())])
        self._file.flush()
        if self._board is not None:
            for name, value in {"rate": rate, **terms}.items():
                self._board.add_scalar(name, value, step)

    def _begun(self, step: int, terms: Mapping[str, float]) -> TextIO:
        """The file with the rows before ``step``, without the others and a torn last line."""
        header = [*COLUMNS, *terms]
        kept: list[list[str]] = []
        if self.path.exists():
            with open(self.path, newline="") as file:
                rows = list(csv.reader(file))
            if rows and rows[0] == header:
                whole = [row for row in rows[1:] if len(row) == len(header) and row[0].isdigit()]
                kept = [row for row in whole if int(row[0]) < step]
        begun = open(self.path, "w", newline="")  # noqa: SIM115
        csv.writer(begun).writerows([header, *kept])
        return begun

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
