"""A file of results that survives: one JSON line each, written at once, read again later.

A line is an object with a ``key`` that names what it is the result of, and ends in a
checksum of the text before it. A run that is killed leaves at most its last line torn; that
line is dropped when the file is opened again. Anything else that cannot be read is damage:
the file is then kept aside and a new one begins with the lines that can be read.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...files import written_whole

FIRST = b'{"key": "'
"""How every line begins; a file whose first line does not is not ours."""


def as_line(record: dict[str, Any]) -> bytes:
    """``record``, whose first entry is "key", as a line with its checksum."""
    body = json.dumps(record, allow_nan=False).encode()
    if not body.startswith(FIRST):
        raise ValueError(f"a record begins with its key, a word; got {body[:40]!r}")
    return body[:-1] + b', "check": "%08x"}\n' % zlib.crc32(body)


def from_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line (with or without its end), or None where it is not whole."""
    head, mark, check = line.rstrip(b"\n").rpartition(b', "check": "')
    body = head + b"}"
    if not mark or check != b'%08x"}' % zlib.crc32(body):
        return None
    return json.loads(body)


class Journal:
    """An open results file.

    known  record by key, of the lines that were there; of equal keys the last

    Another open journal of the same file is refused with ValueError (on systems with file
    locks), and so is a file that holds something else. Use it as a context.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._opened()
        try:
            self.known = {record["key"]: record for record in self._recovered()}
        except BaseException:
            self._file.close()
            raise

    def append(self, record: dict[str, Any]) -> None:
        """Write a line; it is in the file when this returns."""
        line = as_line(record)
        while line:
            line = line[self._file.write(line) :]
        self.known[record["key"]] = record

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._file.close()

    def _opened(self) -> Any:
        file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (closed by __exit__)
        try:
            _lock(file)
        except OSError:
            file.close()
            raise ValueError(f"{self.path} is in use by another run") from None
        return file

    def _recovered(self) -> Iterator[dict[str, Any]]:
        """Records of the file, which is made whole first."""
        self._file.seek(0)
        text = self._file.read()
        if text and not (text.startswith(FIRST) or FIRST.startswith(text)):
            raise ValueError(
                f"{self.path} holds something else than results of this kind; it is left as "
                "it is, give another file"
            )
        whole, last = text[: text.rfind(b"\n") + 1], text[text.rfind(b"\n") + 1 :]
        lines = whole.splitlines(keepends=True)
        records = [from_line(line) for line in lines]
        bad = [number for number, record in enumerate(records, 1) if record is None]
        tail = from_line(last)
        if bad or not (last.startswith(FIRST) or FIRST.startswith(last)):
            kept = [line for line, record in zip(lines, records, strict=True) if record]
            self._set_aside(kept, bad[0] if bad else len(lines) + 1)
        elif tail is not None:
            self._file.write(b"\n")
            records.append(tail)
        elif last:
            self._file.truncate(len(whole))
        return (record for record in records if record is not None)

    def _set_aside(self, kept: list[bytes], first_bad: int) -> None:
        names = (Path(f"{self.path}.damaged-{number}") for number in range(1, 10**6))
        aside = next(name for name in names if not name.exists())
        shutil.copyfile(self.path, aside)
        with written_whole(self.path) as temporary:
            temporary.write_bytes(b"".join(kept))
        self._file.close()
        self._file = self._opened()
        warnings.warn(
            f"{self.path} is damaged (line {first_bad}): it is kept as {aside.name}, its "
            f"{len(kept)} readable results go on in a new file",
            stacklevel=5,
        )


def _lock(file: Any) -> None:
    with suppress(ImportError):  # there are systems without
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
