"""The command ``sievit``: arguments in, `pipeline` and `studies` do the work, tables out.

Results go to standard output, progress and errors to standard error. Every error is one
line that names the value and what is allowed; the exit status is then 1 (2 for usage).
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from ..moved import FLAGS
from .codesign import codesign
from .explore import explore
from .hardware import hardware
from .machines import compare, simulate
from .masks import masks
from .settings import SettingsCommand
from .terminal import warn
from .train import train
from .zoo import zoo

COMMANDS = (codesign, masks, train, simulate, compare, explore, hardware, zoo)


class _Commands(TyperGroup):
    """Takes options of earlier versions under their new name, with a warning."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_today(word) for word in args])


def _today(word: str) -> str:
    flag, equals, value = word.partition("=")
    if flag not in FLAGS:
        return word
    warn(f"{flag} is called {FLAGS[flag]}; the old name goes with the next version")
    return FLAGS[flag] + equals + value


app = typer.Typer(
    cls=_Commands,
    help="Co-design sparse vision transformers and the hardware that runs them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command(cls=SettingsCommand)(command)


def main() -> None:
    """Entry point of the command."""
    app()
