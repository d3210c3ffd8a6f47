"""``memkern info``: what is installed here, what can run, and why the rest cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from memkern.cli._common import console

if TYPE_CHECKING:
    from memkern.native import Library

_OPTIONAL = {
    "triton": "the Triton kernels",
    "transformers": "memkern.models (extra: models)",
    "faiss-cpu": "approximate search (extra: faiss)",
    "matplotlib": "plots (extra: plot)",
    "datasets": "training data (extra: train)",
    "tensorboard": "training logs (extra: train)",
    "sentence-transformers": "embedders (extra: search)",
    "bm25s": "keyword search (extra: search)",
    "pytest-benchmark": "pytest benchmarks (extra: bench)",
}


def command(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Show versions, the build, devices, the backends and why one is missing."""
    facts = gather()
    if json:
        import json as encoder

        typer.echo(encoder.dumps(facts, indent=1))
    else:
        _print(console(), facts)


def gather() -> dict[str, Any]:
    """Everything that ``memkern info`` shows."""
    import os
    import platform

    import torch

    import memkern
    from memkern import backends, native
    from memkern.benchmarks import machine, registry

    module = machine.compiled_module()
    return {
        "versions": {
            "memkern": memkern.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "driver": machine.driver(),
        },
        "commit": machine.commit(),
        "kernels": machine.kernel_hash(),
        "optional": {name: machine.version_of(name) for name in _OPTIONAL},
        "libraries": {name: _about(library) for name, library in native.LIBRARIES.items()},
        "module": module.build_info() if module else None,
        "cpu": machine.processor()
        | {
            "threads": torch.get_num_threads(),
            "isa": module.cpu_isa() if module else None,
            "isas": list(module.cpu_isas()) if module else [],
            "features": [name for name, there in module.cpu_features().items() if there] if module else [],
            "torch": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": machine.gpus(),
        "backends": backends.available(),
        "operators": {name: backends.explain(name) for name in registry.specs()},
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if machine.ENVIRONMENT.fullmatch(name)
        },
    }


def _about(library: Library) -> dict[str, Any]:
    return {
        "loaded": library.loaded,
        "path": str(library.path),
        "reason": library.reason,
        "build": library.build,
    }


def _print(out: Console, facts: dict[str, Any]) -> None:
    from rich.table import Table

    def section(title: str, rows: dict[str, Any]) -> None:
        table = Table(title=title, title_justify="left", box=None, show_header=False, title_style="bold")
        table.add_column(no_wrap=True, style="cyan")
        table.add_column()
        for name, value in rows.items():
            table.add_row(name, escape(str(value)))
        out.print(table)
        out.print()

    section("versions", {name: value or "none" for name, value in facts["versions"].items()})
    section(
        "optional packages",
        {name: version or f"not installed: {_OPTIONAL[name]}" for name, version in facts["optional"].items()},
    )
    section("build", {f"_ops_{name}.so": _library(about) for name, about in facts["libraries"].items()} | _build(facts))
    cpu = facts["cpu"]
    caches = "".join(f", {level} {cpu[level]}" for level in ("L1", "L2", "L3") if level in cpu)
    isa = f"{cpu['isa']} of {', '.join(cpu['isas'])}" if cpu["isa"] else "unknown: memkern._C is not built"
    devices = {
        "CPU": f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads in torch{caches}",
        "instruction set": isa,
        "features": " ".join(cpu["features"]) or f"torch says {cpu['torch']}",
    }
    for number, gpu in enumerate(facts["gpus"]):
        devices[f"cuda:{number}"] = (
            f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory_gib']} GiB, "
            f"{gpu['multiprocessors']} multiprocessors, L2 {gpu['l2_mib']} MiB"
        )
    section("devices", devices if facts["gpus"] else devices | {"cuda": "no GPU"})
    _print_backends(out, facts)
    section("environment", facts["environment"] or {"none": "no variable that memkern or its compilers read is set"})


def _library(about: dict[str, Any]) -> str:
    if not about["loaded"]:
        return str(about["reason"])
    return "loaded; " + _metadata(about["build"])


def _metadata(build: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in build.items() if value)


def _build(facts: dict[str, Any]) -> dict[str, str]:
    return {
        "_C": _metadata(facts["module"]) if facts["module"] else "not built",
        "kernel sources": f"{facts['kernels']} (commit {facts['commit'] or 'unknown: no checkout'})",
    }


def _print_backends(out: Console, facts: dict[str, Any]) -> None:
    """Which backend has which operator; each reason once, below."""
    from rich.table import Table

    from memkern import backends

    table = Table(title="backends", title_justify="left", box=None, title_style="bold", header_style="bold")
    table.add_column("operator", no_wrap=True, style="cyan")
    for name in backends.NAMES:
        table.add_column(name, justify="center")
    notes: dict[str, int] = {}
    for operator, reasons in facts["operators"].items():
        cells = []
        for reason in reasons.values():
            if reason is None:
                cells.append("[green]yes[/]")
            elif "has no" in reason:
                cells.append("[dim]-[/]")
            else:
                cells.append(f"[yellow]no ({notes.setdefault(reason, len(notes) + 1)})[/]")
        table.add_row(operator, *cells)
    out.print(table)
    for reason, number in notes.items():
        out.print(f"[yellow]({number})[/] {escape(reason)}")
    out.print()
