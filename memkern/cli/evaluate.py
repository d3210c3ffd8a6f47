"""``memkern evaluate``: the official scores of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memkern.cli._common import console, named_errors, write_json


def command(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    dataset: Annotated[str, typer.Argument(help="A file, or the name of a data set.")],
    option: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: name=value; may be given again.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a named data set.")] = "validation",
    limit: Annotated[int | None, typer.Option(help="Only so many questions.", min=1)] = None,
    predictions: Annotated[Path | None, typer.Option(help="Write the answers to this file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the scores to this file.")] = None,
) -> None:
    """Evaluate a model on data with answers; the family is the one that the model's config.json names."""
    from memkern.cli._kinds import changed, handler, kind_of_model

    out = console()
    with named_errors(OSError, ImportError):
        options = changed(option or []) | {"split": split, "limit": limit, "predictions": predictions}
        scores = handler(kind_of_model(model)).evaluate(model, dataset, options, out)
    if json is not None:
        write_json(json, scores)
