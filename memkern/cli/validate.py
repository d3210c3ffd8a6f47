"""``memkern validate``: is every operator right on this machine?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from memkern.cli._common import check_choices, console, named_errors, write_json

if TYPE_CHECKING:
    from memkern.benchmarks.registry import OpSpec
    from memkern.benchmarks.validate import Checked, Implementation
    from memkern.testing.compare import Comparison


def command(
    op: Annotated[list[str] | None, typer.Option(help="Operator; may be given again. Default: all.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="reference, cpp, triton or cuda; may be given again. Default: all here.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16, float64. Default: all.")] = None,
    shape: Annotated[str | None, typer.Option(help="Own dimensions over the tiny shape, as B=8,S=16.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Check package.module:function instead of our backends; needs --op.")
    ] = None,
    loose: Annotated[bool, typer.Option("--loose", help="Hold --against to half the digits of the dtype.")] = False,
    grad: Annotated[bool, typer.Option("--grad/--no-grad", help="Check the gradients of --against too.")] = True,
    golden: Annotated[bool, typer.Option("--golden", help="Only the golden numbers.")] = False,
    inputs: Annotated[Path | None, typer.Option(help="Inputs that an earlier failure saved.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU where the backend takes it.")] = None,
    save: Annotated[Path, typer.Option(help="Folder for the inputs of failures.")] = Path("memkern-failures"),
    json: Annotated[Path | None, typer.Option(help="Write every tensor's error and bound to this file.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line for every tensor.")] = False,
) -> None:
    """Check operators, forward and every gradient, against the float64 reference.

    A result passes when its largest error is at most twice that of the reference in the same dtype, plus 4 ulp. The
    exit code is 1 when one fails; its inputs are saved with the line that runs it again.
    """
    from rich.progress import Progress

    from memkern.backends import BackendUnavailable
    from memkern.benchmarks import registry
    from memkern.benchmarks import validate as engine

    out = console()
    with named_errors(BackendUnavailable):
        check_choices("--dtype", dtype or [], list(registry.DTYPES))
        specs = _chosen(op or [], against)
        if against:
            there = [engine.theirs(against, device or "cpu", rounder=loose, grad=grad)]
        else:
            there = [engine.ours(name, device) for name in engine.here(backend or [])]
        dtypes = dtype or list(registry.DTYPES)
        changes = registry.parse_shape(shape) if shape else [None]
        results: list[Checked] = []
        with Progress(console=out, transient=True) as progress:
            task = progress.add_task("validating", total=None)
            numbers = golden or not (shape or loose)
            for checked in _results(specs, there, dtypes, changes, inputs, golden, numbers, save):
                results.append(checked)
                progress.update(task, advance=1, description=f"{checked.op} {checked.dtype} {checked.implementation}")
    _print(out, results, verbose)
    if json is not None:
        write_json(json, {"schema": 1, "results": [checked.as_dict() for checked in results]})
    if not any(checked.comparisons for checked in results):
        typer.secho("error: nothing was checked", fg=typer.colors.RED, err=True)
        raise typer.Exit(2)
    if not all(checked.passed for checked in results):
        raise typer.Exit(1)


def _chosen(names: list[str], against: str | None) -> list[OpSpec]:
    """The operators to check; a user's function is one, and may tell by its own name which."""
    from memkern.benchmarks import registry

    if against:
        own = against.rpartition(":")[2].rpartition(".")[2]
        if not names and own in registry.specs():
            names = [own]
        if len(names) != 1:
            raise ValueError("--against: which operator does it compute? Give one --op NAME")
    return [registry.spec(name) for name in names] if names else list(registry.specs().values())


def _results(
    specs: list[OpSpec],
    there: list[Implementation],
    dtypes: list[str],
    changes: Sequence[dict[str, int] | None],
    inputs: Path | None,
    only_golden: bool,
    golden: bool,
    save: Path,
) -> Iterator[Checked]:
    from memkern.benchmarks import validate as engine

    if inputs is not None:
        yield from engine.validate_saved(inputs, there)
        return
    if not only_golden:
        for change in changes:
            known = specs if change is None else [spec for spec in specs if set(change) <= set(spec.shapes["tiny"])]
            if not known:
                letters = {spec.name: ", ".join(spec.shapes["tiny"]) for spec in specs}
                raise ValueError(f"--shape: no operator has all the dimensions of {change}; they have {letters}")
            yield from engine.validate(known, there, dtypes, shape=change, save_to=save)
    if golden:
        yield from engine.validate_golden(there, dtypes, [spec.name for spec in specs])


def _print(out: Console, results: list[Checked], verbose: bool) -> None:
    """One row per operator, variant, implementation and dtype with its worst tensor; every tensor that failed."""
    from rich.table import Table

    from memkern.benchmarks.checking import closeness

    table = Table(title="against the float64 reference", title_justify="left", box=None, header_style="bold")
    for name in ("op", "variant", "backend", "dtype", "tensor"):
        table.add_column(name, no_wrap=name != "tensor")
    for name in ("max error", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    groups: dict[tuple[str, ...], list[tuple[Checked, Comparison]]] = {}
    declined: dict[tuple[str, ...], str] = {}
    for checked in results:
        if checked.declined:
            declined[checked.op, checked.implementation, checked.dtype] = checked.declined
        group = (checked.op, checked.variant, checked.implementation, checked.dtype)
        for comparison in checked.comparisons:
            groups.setdefault(group, []).append((checked, comparison))
    for key, pairs in groups.items():
        pairs.sort(key=lambda pair: closeness(pair[1]), reverse=True)
        failed = [pair for pair in pairs if not pair[1].passed]
        for checked, comparison in pairs if verbose else failed or pairs[:1]:
            where = f"{comparison.name} ({checked.size})"
            if not verbose and not failed:
                where += f", worst of {len(pairs)}"
            verdict = "[green]pass[/]" if comparison.passed else f"[red]FAIL[/] {escape(comparison.note)}"
            table.add_row(*key, where, f"{comparison.error:.2e}", f"{comparison.bound:.2e}", verdict)
    out.print(table)
    for (op, implementation, dtype), reason in declined.items():
        out.print(f"[dim]not checked: {op} {implementation} {dtype}: {escape(reason)}[/]")
    failures = [checked for checked in results if not checked.passed]
    for checked in failures:
        if checked.saved:
            flag = "--against" if ":" in checked.implementation else "--backend"
            out.print(
                f"rerun: memkern validate {flag} {checked.implementation} --op {checked.op} --inputs {checked.saved}",
                soft_wrap=True,
            )
    tensors = sum(len(checked.comparisons) for checked in results)
    good = len(results) - len(failures) - sum(bool(checked.declined) for checked in results)
    colour = "red" if failures else "green"
    out.print(f"[{colour}]{good} cases passed, {len(failures)} failed[/] ({tensors} tensors compared)")
