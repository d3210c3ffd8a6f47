"""The steps of the demo, in order. Each prints what it found and leaves its plot in the folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console


@dataclass(frozen=True)
class Stage:
    """Where a step prints and writes, and how long its training runs last."""

    out: Console
    folder: Path
    seconds: float


@dataclass(frozen=True)
class Step:
    title: str
    run: Callable[[Stage], None]


def machine(stage: Stage) -> None:
    """What is here."""
    from memkern import backends
    from memkern.benchmarks import machine as facts
    from memkern.benchmarks import registry

    device = "cuda" if facts.gpus() else "cpu"
    stage.out.print(facts.line(facts.machine(device)), soft_wrap=True)
    for name in backends.NAMES:
        reasons = {op: backends.explain(op)[name] for op in registry.specs()}
        there = [op for op, reason in reasons.items() if reason is None]
        missing = dict.fromkeys(reason for reason in reasons.values() if reason is not None)
        note = "" if not missing else f" ({'; '.join(missing)})"
        stage.out.print(f"  {name}: {len(there)} of {len(reasons)} operators{note}", soft_wrap=True)


def validate(stage: Stage) -> None:
    """Every operator in float32 on the fastest backends here, forward and every gradient, against float64."""
    from rich.progress import Progress

    from memkern.benchmarks import registry
    from memkern.benchmarks import validate as engine

    specs = list(registry.specs().values())
    names = [name for name in engine.here() if name in ("cpp", "cuda")] or ["reference"]
    results = []
    with Progress(console=stage.out, transient=True) as progress:
        task = progress.add_task("validating", total=None)
        for checked in engine.validate(specs, [engine.ours(name) for name in names], ["float32"]):
            results.append(checked)
            progress.update(task, advance=1, description=f"{checked.op} {checked.implementation}")
    failed = [checked for checked in results if not checked.passed]
    tensors = sum(len(checked.comparisons) for checked in results)
    for checked in failed:
        stage.out.print(f"[red]FAIL[/] {checked.op} {checked.variant} {checked.size} {checked.implementation}")
    verdict = f"[red]{len(failed)} failed[/]" if failed else "[green]all passed[/]"
    ran = ", ".join(names)
    stage.out.print(f"{len(specs)} operators on {ran}: {len(results)} cases, {tensors} tensors compared, {verdict}")


def bench(stage: Stage) -> None:
    """Routing against plain PyTorch and torch.compile on this machine."""
    from rich.progress import Progress
    from rich.table import Table

    from memkern.benchmarks import bench as engine
    from memkern.benchmarks import machine as facts
    from memkern.benchmarks import registry, report
    from memkern.benchmarks.providers import default_names

    device = "cuda" if facts.gpus() else "cpu"
    case = registry.spec("route_experts").case("small", device=device)
    with Progress(console=stage.out, transient=True) as progress:
        task = progress.add_task("measuring the limits of this machine", total=None)
        results = engine.start(device)
        for _ in engine.run(
            results, case, default_names(case), ["fwd", "fwd+bwd"],
            say=lambda text: progress.update(task, description=text),
        ):  # fmt: skip
            pass
    table = Table(box=None, header_style="bold")
    for name in ("mode", "provider", "time", "vs eager"):
        table.add_column(name, justify="left" if name in ("mode", "provider") else "right")
    for row, ratio in report.ratios(results.rows):
        table.add_row(row.mode, row.provider, report.duration(row.time), "" if ratio is None else f"{ratio:.2f}x")
    stage.out.print(f"{case.label}, {report.describe(results)[1]}", soft_wrap=True)
    stage.out.print(table)


def routing(stage: Stage) -> None:
    """Route windows of the Python documentation with and without the load-balance loss."""
    from rich.progress import Progress

    from memkern.cli.demo import routing as job

    windows, topics = job.documentation_windows()
    stage.out.print(f"{topics} topics of the Python documentation, {len(windows)} windows of {job.WINDOW} tokens")
    runs = []
    with Progress(console=stage.out, transient=True) as progress:
        for weight in (0.0, 0.01):
            task = progress.add_task(f"load-balance weight {weight:g}", total=1.0)

            def show(fraction: float, loss: float, task: int = task, weight: float = weight) -> None:
                label = f"load-balance weight {weight:g}, loss {loss:.2f}"
                progress.update(task, completed=fraction, description=label)  # type: ignore[arg-type]

            runs.append(job.train(windows, weight, stage.seconds, progress=show))
    for run in runs:
        shares = " ".join(f"{share:.2f}" for share in run.shares)
        stage.out.print(
            f"weight {run.load_balance_weight:g}: entropy of use {run.entropy:.3f} of 1, experts' shares {shares}, "
            f"loss on held-out windows {run.loss:.3f} ({run.steps} steps)"
        )
    path = stage.folder / "routing.png"
    job.plot(runs, path)
    stage.out.print(f"plot: {path}")


def search(stage: Stage) -> None:
    """Look something up in the Python documentation."""
    from memkern.cli import search as job

    job.command(
        text=[Path("pydoc")],
        query=["how does the with statement call __exit__", "what happens when an integer is divided by zero"],
        top_k=2,
    )


def recall_gmm(stage: Stage) -> None:
    """Carry a fact over segments in a mixture of memories; without memory, or with another's, it is lost."""
    from memkern.cli.recall import gmm as job
    from memkern.training.gmm_recall import run_protocol
    from memkern.training.gmm_recall.protocol import quick_protocol

    stage.out.print(
        "a tiny XLNet points at a value that was named k segments earlier, trained for k up to 2; chance is 0.125"
    )
    protocol = quick_protocol(seconds=stage.seconds)
    path = stage.folder / "recall-gmm.json"
    path.unlink(missing_ok=True)  # every demo trains anew
    content = run_protocol(protocol, path, jobs=2)
    job.show(stage.out, protocol, content, stage.folder, "recall-gmm")


def recall_self_rag(stage: Stage) -> None:
    """Ask for facts at every position of a document; retrieved ones are found wherever they stood."""
    from memkern.cli.recall import self_rag as job
    from memkern.training.rag_recall import quick_settings, run

    stage.out.print(
        "a tiny transformer learns to read facts, then to retrieve them by its own embeddings; chance is 0.0625"
    )
    with stage.out.status("training") as status:
        recall = run(quick_settings(stage.seconds), (0,), contrast_arm=False, say=status.update)
    job.show(stage.out, recall.to_dict(), stage.folder, "recall-self-rag")


def memory(stage: Stage) -> None:
    """A Differentiable Neural Computer learns to recall by association; the same steps in plain PyTorch, timed."""
    from rich.progress import Progress

    from memkern.cli.demo import memory as job

    stage.out.print("pairs of a key and a value are shown, then a key: its value has to come out")
    with Progress(console=stage.out, transient=True) as progress:
        task = progress.add_task("recall", total=None)
        run = job.train(
            "recall",
            seconds=stage.seconds,
            progress=lambda step, error: progress.update(task, description=f"step {step}, {error:.1%} wrong"),
        )
    plain = job.train("recall", seconds=stage.seconds / 4, most_steps=10, plain=True)
    stage.out.print(
        f"{run.errors[-1] if run.errors else 0.5:.1%} of the bits wrong after {len(run.losses)} steps and "
        f"{run.seconds:.0f} s (0.5 is chance); a step of plain PyTorch takes "
        f"{plain.seconds_per_step / run.seconds_per_step:.1f} times as long"
    )


STEPS: dict[str, Step] = {
    "machine": Step("what this machine has", machine),
    "validate": Step("are the operators right here?", validate),
    "bench": Step("routing against plain PyTorch and torch.compile", bench),
    "routing": Step("routing real text: the Python documentation", routing),
    "memory": Step("a memory that learns to recall", memory),
    "search": Step("exact search in the Python documentation", search),
    "recall-gmm": Step("facts carried across segments by memory", recall_gmm),
    "recall-self-rag": Step("facts retrieved from every position", recall_self_rag),
}
