"""What the commands share: a console that keeps its width in a pipe, and errors that name the option."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

PIPE_WIDTH = 160


def console() -> Console:
    """Standard output; a pipe or a file gets lines long enough for the tables."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


@contextlib.contextmanager
def named_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Errors in what the user gave, ValueError among them, end the command with their message and exit code 2."""
    caught: tuple[type[Exception], ...] = (ValueError, *kinds)
    try:
        yield
    except caught as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error


def check_choices(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Every given value is a known one.

    Raises:
        ValueError: one is not; the message names the option and the known values.
    """
    for value in given:
        if value not in known:
            raise ValueError(f"{option}: unknown value {value!r}; the known ones are {', '.join(known)}")


def write_json(path: Path, content: Any) -> None:
    """Write JSON with a final newline, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
