"""How the kept entries of the sparser part are written in DRAM and IdxBuf.

An encoding is two plain functions (`Encoding`): how many bits a stage's stream takes, entry by
entry, and bounds of that for the mapper. A new one is a file beside `absolute` and a line of
`ENCODINGS`.
"""

from __future__ import annotations

from .absolute import ABSOLUTE
from .relative import RELATIVE
from .stream import Encoded, Encoding, Stream, Widths

__all__ = ["ENCODINGS", "Encoded", "Encoding", "Stream", "Widths"]

ENCODINGS: dict[str, Encoding] = {"relative": RELATIVE, "absolute": ABSOLUTE}
