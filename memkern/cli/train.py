"""``memkern train``: a model from a configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memkern.cli._common import console, named_errors


def command(
    config: Annotated[str, typer.Argument(help="A YAML or JSON file, or the name of a preset (see --list).")] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field: name=value; may be given again.")
    ] = None,
    train_file: Annotated[Path | None, typer.Option(help="Data to train on, in place of the configuration's.")] = None,
    eval_file: Annotated[Path | None, typer.Option(help="Data to evaluate on.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Where checkpoints and the model go.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --output-dir.")] = False,
    resume_from: Annotated[Path | None, typer.Option(help="Go on from this checkpoint folder.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the presets and leave.")] = False,
) -> None:
    """Train a model. The configuration's [bold]kind[/] says which family; xlnet where it says nothing."""
    from memkern.cli._kinds import handler, presets, read_config

    out = console()
    if show_list:
        out.print("\n".join(presets()))
        return
    with named_errors(OSError, ImportError):
        if not config:
            raise ValueError("config: expected a file or a preset; --list shows the presets")
        kind, fields = read_config(config, set_ or [])
        for name, value in (("train_file", train_file), ("eval_file", eval_file), ("output_dir", output_dir)):
            if value is not None:
                fields[name] = str(value)
        handler(kind).train(fields, resume_from or (True if resume else None), out)
