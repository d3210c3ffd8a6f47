"""``memkern recall gmm``: facts carried across segments by the memories of the XLNet models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from memkern.cli._common import console, named_errors

if TYPE_CHECKING:
    from memkern.training.gmm_recall import Protocol


def command(
    arm: Annotated[list[str] | None, typer.Option(help="Run this arm; may be given again. Default: all.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Run this seed; may be given again. Default: 0, 1, 2.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of every run.", min=1)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, four arms, about a minute.")] = False,
    babi: Annotated[Path | None, typer.Option(help="Folder of English bAbI files: the harder rung.")] = None,
    task: Annotated[int, typer.Option(help="bAbI task.", min=1, max=3)] = 1,
    long: Annotated[bool, typer.Option("--long", help="bAbI with six times the steps, minutes a run.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes side by side, one thread each.", min=1)] = 1,
    folder: Annotated[Path, typer.Option(help="Results, table and plot go here; a second call goes on.")] = Path(
        "out/recall"
    ),
) -> None:
    """Train tiny models to point at a value that was named k segments earlier, and test them at longer distances.

    Chance is 0.125. The table has every arm with its interval and every seed; runs that failed are counted. With
    --babi the stories of Weston et al. (2015), two sentences a segment.
    """
    from memkern.training.gmm_recall import ARMS, run_protocol
    from memkern.training.gmm_recall.protocol import babi_protocol, pointer_protocol, quick_protocol

    out = console()
    if long and babi is None:
        raise typer.BadParameter("--long needs --babi")
    with named_errors(OSError):
        if quick:
            protocol = quick_protocol(steps)
        elif babi is not None:
            protocol = babi_protocol(babi, task, steps, long=long)
        else:
            protocol = pointer_protocol(steps)
        if arm:
            protocol = protocol.replaced(arms=tuple(arm))
        if seed:
            protocol = protocol.replaced(seeds=tuple(seed))
        name = protocol.file_name + ("-quick" if quick else "-long" if long else "")
        total = len(protocol.arms) * len(protocol.seeds)
        out.print(f"{total} runs to evaluate, {len(protocol.trained) * len(protocol.seeds)} to train")

        def tell(result: dict[str, Any]) -> None:
            title = f"{ARMS[result['arm']].title}, seed {result['seed']}"
            if "error" in result:
                out.print(f"[red]failed[/] {title}: {result['error'].splitlines()[-1]}")
                return
            shares = "  ".join(f"{d}: {right / count:.2f}" for d, (right, count) in result["accuracy"].items())
            out.print(f"{title}: {shares}  ({result['seconds']:.0f} s)")

        content = run_protocol(protocol, folder / f"{name}.json", jobs, tell)
    show(out, protocol, content, folder, name)


def show(out: Console, protocol: Protocol, content: dict[str, Any], folder: Path, name: str) -> None:
    """Print the table and the verdicts, and write both and the plot beside the results."""
    from memkern.analysis import VISUALIZATION_AVAILABLE
    from memkern.training.gmm_recall import markdown, plot, verdicts

    text = markdown(content)
    out.print(text, soft_wrap=True, markup=False)
    lines = []
    if content["settings"]["task"] == "cross-segment pointer":
        for verdict in verdicts(content):
            word = "met" if verdict.met else "NOT MET"
            lines.append(f"- {word}: {verdict.claim}: {verdict.measured}")
            out.print(lines[-1], markup=False)
    (folder / f"{name}.md").write_text(text + ("\n" + "\n".join(lines) + "\n" if lines else ""))
    written = [f"{name}.json", f"{name}.md"]
    if VISUALIZATION_AVAILABLE:
        plot(content, folder / f"{name}.png")
        written.append(f"{name}.png")
    out.print(f"{folder}: {', '.join(written)}")
