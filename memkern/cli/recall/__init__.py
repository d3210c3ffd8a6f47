"""``memkern recall``: does memory carry what it should? One protocol a command, each with all its arms."""

from __future__ import annotations

from typing import ClassVar

import typer

from memkern.cli import CommandFolder


class _Protocols(CommandFolder):
    package: ClassVar[str] = __name__


group = typer.Typer(
    cls=_Protocols,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Recall protocols: every arm, every seed, a table, JSON and a plot.",
)


@group.callback()
def _group() -> None:
    """Recall protocols: every arm, every seed, a table, JSON and a plot."""
