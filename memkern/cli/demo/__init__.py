"""``memkern demo``: the main job on real input, in a few minutes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from memkern.cli._common import check_choices, console, named_errors


def command(
    only: Annotated[list[str] | None, typer.Option(help="Run this step alone; may be given again.")] = None,
    folder: Annotated[Path, typer.Option(help="Where plots and results go.")] = Path("out/demo"),
    seconds: Annotated[float, typer.Option(help="About how long each training run of a step lasts.")] = 25.0,
) -> None:
    """Show what this machine has, that the operators are right and fast, and what they do with real text."""
    from memkern.cli.demo._steps import STEPS, Stage

    out = console()
    with named_errors():
        check_choices("--only", only or [], list(STEPS))
        if not seconds > 0:
            raise ValueError(f"--seconds: expected a number > 0, got {seconds}")
    chosen = {name: step for name, step in STEPS.items() if not only or name in only}
    begun = time.perf_counter()
    left_out = []
    for number, (name, step) in enumerate(chosen.items(), 1):
        out.rule(f"[bold]{number} of {len(chosen)}: {step.title}[/]", align="left")
        start = time.perf_counter()
        try:
            step.run(Stage(out, folder, seconds))
        except ImportError as error:
            left_out.append(name)
            out.print(f"[yellow]left out: {error}[/]")
        out.print(f"[dim]{name}: {time.perf_counter() - start:.0f} s[/]\n")
    out.print(f"done in {time.perf_counter() - begun:.0f} s; plots and results are in {folder}")
    if left_out and only:
        raise typer.Exit(1)
