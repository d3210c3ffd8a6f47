"""Results as tables and plots: what `memkern bench` prints, and what the README shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from . import machine
from .bench import Promise, Results, Row


def load(path: Path) -> Results:
    """The results in a file that `memkern bench --json` wrote.

    Raises:
        ValueError: not such a file.
    """
    try:
        content = json.loads(path.read_text())
        if content["schema"] != 1:
            raise ValueError(f"{path}: written by a newer memkern (schema {content['schema']})")
        return Results.from_dict(content)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a file of benchmark results ({type(error).__name__}: {error})") from error


def duration(seconds: float) -> str:
    """``0.0000123`` -> ``12.3 us``."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1.0 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def ratios(rows: Sequence[Row]) -> list[tuple[Row, float | None]]:
    """Each row with how many times as fast as plain PyTorch it is; None where that was not timed."""
    eager = {row.key[:-1]: row.time for row in rows if row.provider == "eager"}
    return [(row, eager[row.key[:-1]] / row.time if row.key[:-1] in eager else None) for row in rows]


def cells(row: Row, ratio: float | None, old: Row | None = None) -> list[str]:
    """One line of the table; ``old``: the same line of an earlier run."""
    found = [
        " ".join(part for part in (row.op, row.variant) if part),
        row.size,
        row.dtype,
        row.mode,
        row.provider,
        duration(row.time),
        f"{duration(row.p20)} / {duration(row.p50)} / {duration(row.p80)}",
        f"{row.gbps:.1f}",
        f"{row.tflops:.3f}",
        "" if row.share is None else f"{row.share:.0%}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
        "" if ratio is None else f"{ratio:.2f}x",
    ]
    return found if old is None else [*found, f"{old.time / row.time:.2f}x"]


HEADER = [
    "op", "size", "dtype", "mode", "provider", "time", "p20 / p50 / p80", "GB/s", "TFLOP/s", "of roof", "peak MiB",
    "vs eager",
]  # fmt: skip


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table for a README."""
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(rows + ["| " + " | ".join(line) + " |" for line in lines])


def promise_cells(promise: Promise) -> list[str]:
    """Operator, case, mode, against, target, measured, verdict."""
    target = promise.target
    unit = "" if target.over in ("read", "write", "copy", "peak", "gemm") else "x"

    def number(value: float) -> str:
        return f"{value:.2f}x" if unit else f"{value:.0%}"

    verdict = {True: "met", False: "missed", None: f"open: {promise.note}"}[promise.met]
    where = " ".join(part for part in (target.size, target.variant, target.dtype) if part)
    measured = "" if promise.measured is None else number(promise.measured)
    return [promise.op, where, target.mode, target.over, f">= {number(target.at_least)}", measured, verdict]


PROMISE_HEADER = ["op", "case", "mode", "against", "target", "measured", "verdict"]


def describe(results: Results) -> list[str]:
    """The machine and its limits, in two lines; a third for what costs beside the kernels, where that was measured."""
    units = {name: "TFLOP/s" if name == "peak" or name.startswith("gemm") else "GB/s" for name in results.limits}
    limits = ", ".join(
        f"{name} {value / (1e12 if units[name] == 'TFLOP/s' else 1e9):.3g} {units[name]}"
        for name, value in results.limits.items()
    )
    how = "device time" if results.machine["device"] == "cuda" else "process CPU time at one thread"
    lines = [machine.line(results.machine), f"limits of this run: {limits}; {how}"]
    if results.overheads:
        lines.append("beside the kernels: " + overheads(results.overheads))
    return lines


def overheads(seconds: Mapping[str, float]) -> str:
    """``import memkern above torch 47 ms, ...``."""
    return ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())


def plot(results: Results, path: Path) -> None:
    """Draw each operator's speed over plain PyTorch, a group of bars per case.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'memkern[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [(row, ratio) for row, ratio in ratios(results.rows) if ratio is not None]
    cases = list(dict.fromkeys(_case(row) for row, _ in shown))
    providers = list(dict.fromkeys(row.provider for row, _ in shown))
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.22 * len(cases) * max(1, len(providers))), layout="constrained")
    height = 0.8 / max(1, len(providers))
    for i, provider in enumerate(providers):
        found = {_case(row): ratio for row, ratio in shown if row.provider == provider}
        places = [j + (i - (len(providers) - 1) / 2) * height for j, case in enumerate(cases) if case in found]
        bars = axes.barh(places, list(found.values()), height, label=provider)
        axes.bar_label(bars, fmt="%.2gx", padding=2, fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set(yticks=range(len(cases)), yticklabels=cases, xscale="log", xlabel="times as fast as plain PyTorch")
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_title(machine.line(results.machine).split(", memkern")[0], fontsize=8)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _case(row: Row) -> str:
    return " ".join(part for part in (row.op, row.variant, row.size, row.dtype, row.mode) if part)
