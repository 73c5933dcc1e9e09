"""`sievit zoo`: the registered models."""

from __future__ import annotations

from typing import Annotated

import typer

from ..terminal import OUT, one_line_errors


def zoo(pattern: Annotated[str, typer.Argument(help="Shell wildcards.")] = "*") -> None:
    """List the registered models."""
    with one_line_errors():
        from ..models import names

        found = names(pattern)
        if not found:
            raise ValueError(f"no registered model matches {pattern!r}; `sievit zoo` lists all")
        OUT.print("\n".join(found), highlight=False)
