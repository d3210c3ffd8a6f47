"""``memkern recall self-rag``: is recall flat over the position of a fact? Every arm of one trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from memkern.cli._common import console, named_errors, write_json


def command(
    seed: Annotated[list[int] | None, typer.Option(help="Run this seed; may be given again. Default: 0, 1, 2.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, fewer questions, about a minute.")] = False,
    text: Annotated[
        bool,
        typer.Option("--text", help="The real text run instead: the Python documentation, beside BM25."),
    ] = False,
    contrast: Annotated[bool, typer.Option(help="Also train without the contrastive loss.")] = True,
    folder: Annotated[Path, typer.Option(help="Results, table and plot go here; a second call goes on.")] = Path(
        "out/recall"
    ),
) -> None:
    """Train a tiny model to read facts and to retrieve them, and ask for facts at every position.

    Self-RAG against a window of as many tokens, the full context, random chunks, shuffled order and oracle chunks; and
    against itself trained without the contrastive loss. Answers are judged on generated tokens alone.
    """
    out = console()
    if text:
        from memkern.training.rag_text import run_text

        with named_errors(ImportError):
            write_json(folder / "self-rag-text.json", run_text(say=out.print))
        out.print(f"{folder}: self-rag-text.json")
        return
    from memkern.training.rag_recall import Recall, RecallSettings, quick_settings, run

    name = "self-rag-recall-quick" if quick else "self-rag-recall"
    path = folder / f"{name}.json"
    seeds = seed or ([0] if quick else [0, 1, 2])
    previous = Recall.from_dict(json.loads(path.read_text())) if path.is_file() else None
    with out.status("training") as status:
        recall = run(
            quick_settings() if quick else RecallSettings(),
            seeds,
            previous=previous,
            contrast_arm=contrast,
            say=status.update,
            done=lambda found: write_json(path, found.to_dict()),
        )
    show(out, recall.to_dict(), folder, name)


def show(out: Console, content: dict[str, Any], folder: Path, name: str) -> None:
    """Print the table and the bars, and write both, the results and the plot."""
    from memkern.analysis import VISUALIZATION_AVAILABLE
    from memkern.training.rag_recall import markdown, plot, verdicts

    write_json(folder / f"{name}.json", content)
    lines = [markdown(content), "", *verdicts(content)]
    out.print("\n".join(lines), soft_wrap=True, markup=False)
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    written = [f"{name}.json", f"{name}.md"]
    if VISUALIZATION_AVAILABLE:
        plot(content, folder / f"{name}.png")
        written.append(f"{name}.png")
    out.print(f"{folder}: {', '.join(written)}")
