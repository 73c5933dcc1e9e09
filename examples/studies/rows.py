"""Rows of a study in a file, each kept as soon as it is there."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sievit.files import write_json
from sievit.provenance import versions


class Rows:
    """What ``path`` holds is read; each row added is written at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict] = {}
        if path.exists():
            self.rows = json.loads(path.read_text())["rows"]

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, row: dict) -> None:
        self.rows[key] = row
        print(key, row, flush=True)
        about = {"versions": versions(), "threads": torch.get_num_threads(), "seed": 0}
        write_json({"rows": self.rows, **about}, self.path)
