"""``memkern predict``: answers of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memkern.cli._common import console, named_errors, write_json


def command(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    dataset: Annotated[
        str | None, typer.Argument(help="A file with questions; answers in it are not looked at.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="One question, with --context.")] = None,
    context: Annotated[str | None, typer.Option(help="The passage, or @FILE.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: name=value; may be given again.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write {id: answer} to this file.")] = None,
) -> None:
    """Answer the questions of a file, or one question about a passage."""
    from memkern.cli._kinds import changed, handler, kind_of_model
    from memkern.data.squad import SquadExample

    out = console()
    with named_errors(OSError, ImportError):
        if (dataset is None) == (question is None) or (question is None) != (context is None):
            raise ValueError("dataset: expected a file, or --question with --context")
        source: str | list[SquadExample] = dataset or ""
        if question is not None and context is not None:
            text = Path(context[1:]).read_text() if context.startswith("@") else context
            source = [SquadExample("question", question, text)]
        module = handler(kind_of_model(model))
        if not hasattr(module, "predict"):
            raise ValueError(f"model: {model} is no model that answers questions about passages")
        answers = module.predict(model, source, changed(option or []), out)
    if json is not None:
        write_json(json, answers)
