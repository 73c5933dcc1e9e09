"""The command ``sievit``: arguments in, `pipeline` and `result` do the work, tables out.

Results go to standard output, progress and errors to standard error. Every error is one
line that names the value and what is allowed; the exit status is then 1 (2 for usage).
"""

from __future__ import annotations

import typer

from .codesign import codesign
from .explore import explore
from .machines import compare, simulate
from .masks import masks
from .train import train
from .zoo import zoo

COMMANDS = (codesign, masks, train, simulate, compare, explore, zoo)

app = typer.Typer(
    help="Co-design sparse vision transformers and the hardware that runs them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Entry point of the command."""
    app()
