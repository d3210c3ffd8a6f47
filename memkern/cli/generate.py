"""``memkern generate``: continue prompts with a trained Self-RAG or hybrid model, its memory included."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from memkern.cli._common import console, named_errors, write_json


def command(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    prompt: Annotated[list[str], typer.Option(help="Text to go on from; may be given again.")],
    memory: Annotated[
        list[Path] | None,
        typer.Option(help="A text file, a folder of .txt files, or pydoc, for the memory; may be given again."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.", min=1)] = 50,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest of this mass.", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    use_memory: Annotated[bool, typer.Option("--memory-on/--memory-off", help="Retrieve, or not.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write prompts and continuations to this file.")] = None,
) -> None:
    """Continue each prompt. Self-RAG retrieves for it once and shows what it found; a hybrid model at every token."""
    from memkern.cli._kinds import handler, kind_of_model

    out = console()
    with named_errors(FileNotFoundError, ImportError):
        kind = kind_of_model(model)
        if kind == "xlnet":
            raise ValueError(f"model: {model} answers questions and generates nothing; use memkern predict")
        import torch

        torch.manual_seed(seed)
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "use_memory": use_memory,
            "do_sample": temperature > 0,
        }
        if temperature > 0:
            options |= {"temperature": temperature, "top_p": top_p}
        texts = handler(kind).generate(model, prompt, memory or [], options, out)
    if json is not None:
        found = [{"prompt": given, "text": text} for given, text in zip(prompt, texts, strict=True)]
        write_json(json, found)
