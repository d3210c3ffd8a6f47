"""What the length of a sequence costs a memory scan: time a step, and memory beside T link matrices of N x N.

Run as ``python -m memkern.benchmarks.systems.scan_length [--json FILE]``. Forward and backward on the CPU backend, one
thread, process CPU time; a time is taken after the scan agreed with as many single steps.
"""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from memkern.benchmarks import machine, registry
from memkern.benchmarks.providers import make_call, provider
from memkern.benchmarks.timing import cpu_times, one_thread
from memkern.ops import memory_scan, memory_step

_SHAPE = {"B": 16, "N": 256, "W": 64, "R": 4, "H": 1}


def _check(made: dict[str, Any]) -> None:
    """The scan against as many steps, forward."""
    state, interface, reads = made["state"], made["interface"], []
    for t in range(interface[0].shape[1]):
        read, state = memory_step(state, type(interface)(*(field[:, t] for field in interface)), backend="cpp")
        reads.append(read)
    scanned, last = memory_scan(made["state"], interface, backend="cpp")
    torch.testing.assert_close(scanned, torch.stack(reads, 1))
    torch.testing.assert_close(last.links, state.links)


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(steps: list[int], seconds: float) -> list[dict[str, float]]:
    """A line for each length; in rising order, for a process never forgets its peak."""
    spec, found = registry.spec("memory_scan"), []
    for count in sorted(steps):
        case = spec.case(_SHAPE | {"T": count})
        made = case.arguments(grad=False)
        with one_thread():
            _check(made)
        function = provider("cpp").function(case)
        before = _peak()
        calls = {mode: make_call(case, function, mode) for mode in ("fwd", "fwd+bwd")}
        times = cpu_times(calls, seconds=seconds, rounds=9)
        links = count * _SHAPE["B"] * _SHAPE["N"] ** 2 * 4
        found.append(
            {"steps": count, "peak_bytes": _peak() - before, "links_bytes": links}
            | {mode: times[mode].least for mode in calls}
        )
    return found


HEADER = ["steps", "forward, a step", "forward + backward, a step", "peak memory grows by", "T link matrices would be"]


def cells(line: dict[str, float]) -> list[str]:
    """A row of the table under :data:`HEADER`."""
    times = [f"{1e3 * line[mode] / line['steps']:.3f} ms" for mode in ("fwd", "fwd+bwd")]
    sizes = [f"{line[name] / 2**20:.0f} MiB" for name in ("peak_bytes", "links_bytes")]
    return [f"{line['steps']:.0f}", *times, *sizes]


def main(
    steps: Annotated[list[int] | None, typer.Option(help="Lengths; 16, 64 and 256.")] = None,
    seconds: Annotated[float, typer.Option(help="About how long each mode runs.")] = 2.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Time the scan at several lengths."""
    facts = machine.machine("cpu")
    typer.echo(machine.line(facts))
    found = measure(steps or [16, 64, 256], seconds)
    for line in found:
        typer.echo("  ".join(f"{name} {cell}" for name, cell in zip(HEADER, cells(line), strict=True)))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        content = {"schema": 1, "machine": facts, "shape": _SHAPE, "results": found}
        json_file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
