"""``memkern bench``: how fast is every operator here, against what users would write, and against the machine?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from memkern.cli._common import check_choices, console, named_errors, write_json

if TYPE_CHECKING:
    from memkern.benchmarks.bench import Promise, Results
    from memkern.benchmarks.registry import Case, OpSpec


def command(
    op: Annotated[list[str] | None, typer.Option(help="Operator; may be given again. Default: all.")] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="Named size, such as small; may be given again. Default: the targets' own.")
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="Named variant. Default: the targets' own, or each op's first.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16, float16. Default: the targets' own.")
    ] = None,
    mode: Annotated[list[str] | None, typer.Option(help="fwd, bwd or fwd+bwd. Default: the targets' own.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="Own dimensions over the small shape, as B=8,S=16, or a sweep, as B=1,8,64.")
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="reference, cpp, triton, cuda, eager, compile, a peer, or package.module:function."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU where there is one.")] = None,
    seconds: Annotated[float, typer.Option(help="About how long each provider runs in a mode.")] = 0.4,
    compare: Annotated[Path | None, typer.Option(help="Results of an earlier run to stand beside.")] = None,
    once: Annotated[bool, typer.Option("--once", help="One call each, nothing timed: for a profiler.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what the --json file has of these kernels.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the speed over plain PyTorch to this file.")] = None,
) -> None:
    """Time operators against plain PyTorch, torch.compile, installed peers and the limits of this machine.

    A provider is timed after it agreed with the float64 reference. Without options: what the project's targets name.
    """
    import torch

    from memkern.benchmarks import registry, report

    out = console()
    with named_errors(ImportError):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_choices("--device", [device], ["cpu", "cuda"])
        check_choices("--dtype", dtype or [], list(registry.DTYPES))
        check_choices("--mode", mode or [], registry.MODES)
        specs = [registry.spec(name) for name in op] if op else list(registry.specs().values())
        if op is None and size:
            specs = [spec for spec in specs if set(size) & set(spec.shapes)]
        cases = _cases(specs, size or [], variant or [], dtype or [], mode or [], shape, device)
        if not cases:
            raise ValueError(
                f"nothing to time on {device}: no target of these operators names it; give --size or --shape"
            )
        if once:
            _once(out, cases, provider or [])
            return
        earlier = report.load(compare) if compare else None
        results = _start(device, json if resume else None)
        promises = _run(out, results, specs, cases, provider or [], seconds, json)
        if device == "cpu" and not (op or size or shape):
            from memkern.benchmarks import overheads

            results.overheads = overheads.measure()
        _print(out, results, promises, earlier)
        if json is not None:
            write_json(json, results.as_dict(promises))
        if plot is not None:
            report.plot(results, plot)
            out.print(f"plot: {plot}")
    if not results.rows:
        raise typer.Exit(1)


def _cases(
    specs: list[OpSpec],
    sizes: list[str],
    variants: list[str],
    dtypes: list[str],
    modes: list[str],
    shape: str | None,
    device: str,
) -> list[tuple[Case, list[str]]]:
    """What to time, each with its modes: the product of what was asked for, or what the targets name."""
    from memkern.benchmarks import bench, registry

    found: list[tuple[Case, list[str]]] = []
    for spec in specs:
        if shape is None and not sizes:
            for (size, variant, dtype), named in bench.target_cases(spec, device).items():
                if (not variants or variant in variants) and (not dtypes or dtype in dtypes):
                    chosen = [mode for mode in registry.MODES if mode in (modes or named)]
                    found.append((spec.case(size, variant=variant, dtype=dtype, device=device), chosen))
            continue
        shapes: list[str | dict[str, int]] = (
            [one for one in sizes if one in spec.shapes] if len(sizes) > 1 else [*sizes]
        )
        if shape is not None:
            base = sizes[0] if sizes else "small"
            shapes = [registry.override(spec, base, changes) for changes in registry.parse_shape(shape)]
        for one in shapes:
            for name in variants or [next(iter(spec.variants))]:
                for kind in dtypes or ["float32"]:
                    case = spec.case(one, variant=name, dtype=kind, device=device)
                    found.append((case, modes or ["fwd", "fwd+bwd"]))
    return found


def _start(device: str, resumed: Path | None) -> Results:
    """Fresh results, or those of the file when the same kernels made them."""
    from memkern.benchmarks import bench, machine, report

    if resumed is not None and resumed.exists():
        earlier = report.load(resumed)
        if earlier.machine["kernels"] == machine.kernel_hash() and earlier.machine["device"] == device:
            return earlier
    return bench.start(device)


def _run(
    out: Console,
    results: Results,
    specs: list[OpSpec],
    cases: list[tuple[Case, list[str]]],
    providers: list[str],
    seconds: float,
    json: Path | None,
) -> list[Promise]:
    from rich.progress import Progress

    from memkern.benchmarks import bench
    from memkern.benchmarks.providers import default_names

    with Progress(console=out, transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases))
        for case, modes in cases:
            named = providers or list(dict.fromkeys(default_names(case) + bench.target_providers(case.spec, case)))
            for _ in bench.run(
                results, case, named, modes, seconds=seconds,
                say=lambda text: progress.update(task, description=text),
            ):  # fmt: skip
                pass
            progress.advance(task)
            if json is not None:
                write_json(json, results.as_dict())
        progress.update(task, description="judging the targets")
        return bench.judge_targets(results, specs, cases[0][0].device)


def _once(out: Console, cases: list[tuple[Case, list[str]]], providers: list[str]) -> None:
    from memkern.benchmarks.providers import default_names, make_call, provider
    from memkern.benchmarks.registry import Unsuitable

    for case, modes in cases:
        for name in providers or default_names(case)[:1]:
            for mode in modes:
                try:
                    make_call(case, provider(name).function(case), mode)()
                except Unsuitable as error:
                    out.print(f"[dim]left out: {case.label} {mode} {name}: {escape(str(error))}[/]")
                else:
                    out.print(f"ran {case.label} {mode} {name}")


def _print(out: Console, results: Results, promises: list[Promise], earlier: Results | None) -> None:
    from rich.table import Table

    from memkern.benchmarks import report

    for line in report.describe(results):
        out.print(escape(line), soft_wrap=True)
    table = Table(title="times", title_justify="left", box=None, header_style="bold", title_style="bold")
    header = report.HEADER if earlier is None else [*report.HEADER, "vs earlier"]
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < 5 else "right", no_wrap=True)
    for row, ratio in report.ratios(results.rows):
        old = None if earlier is None else earlier.find(*row.key)
        cells = [escape(cell) for cell in report.cells(row, ratio, old)]
        table.add_row(*cells, *[""] * (len(header) - len(cells)))
    out.print(table)
    for skip in results.skipped:
        out.print(f"[dim]left out: {skip['case']} {skip['provider']}: {escape(skip['reason'])}[/]", soft_wrap=True)
    timed = [promise for promise in promises if promise.measured is not None]
    if not timed:
        return
    table = Table(title="targets", title_justify="left", box=None, header_style="bold", title_style="bold")
    for number, name in enumerate(report.PROMISE_HEADER):
        table.add_column(name, justify="right" if number in (4, 5) else "left", no_wrap=True)
    for promise in timed:
        *cells, verdict = report.promise_cells(promise)
        table.add_row(*map(escape, cells), f"[{'green' if promise.met else 'red'}]{verdict}[/]")
    out.print(table)
