"""Results as tables and plots: what `memkern bench` prints, and what the README shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from memkern import backends

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
    """Draw each provider's speed over plain PyTorch: a line of dots per case, a panel per operator.

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
    providers = list(dict.fromkeys(row.provider for row, _ in shown if row.provider != "eager"))
    colours = dict(zip(providers, pyplot.rcParams["axes.prop_cycle"].by_key()["color"] * 2, strict=False))
    panels: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for row, ratio in shown:
        found = panels.setdefault(row.op, {}).setdefault(_case(row).removeprefix(row.op + " "), [])
        found.append((row.provider, ratio))
    heights = [len(cases) + 1 for cases in panels.values()] or [1]
    figure, grid = pyplot.subplots(
        len(heights),
        figsize=(9, 1.2 + 0.21 * sum(heights)),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (op, cases) in zip(grid[:, 0], panels.items(), strict=False):
        for place, found in enumerate(cases.values()):
            for provider, ratio in found:
                if provider != "eager":
                    style = (
                        {"s": 44, "zorder": 3} if provider in backends.NAMES else {"s": 26, "marker": "D", "alpha": 0.8}
                    )
                    axes.scatter(ratio, place, color=colours[provider], **style)
        axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        axes.set(yticks=range(len(cases)), yticklabels=cases, xscale="log", ylim=(len(cases) - 0.5, -0.5))
        axes.set_title(op, fontsize=9, loc="left", pad=2)
        axes.tick_params(labelsize=7)
        axes.grid(axis="both", alpha=0.3)
    last = grid[-1, 0]
    last.set_xlabel("times as fast as plain PyTorch", fontsize=8)
    last.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    figure.suptitle(machine.line(results.machine).split(", memkern")[0], fontsize=8)
    for provider in providers:
        last.scatter([], [], color=colours[provider], marker="o" if provider in backends.NAMES else "D", label=provider)
    figure.legend(*last.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _case(row: Row) -> str:
    return " ".join(part for part in (row.op, row.variant, row.size, row.dtype, row.mode) if part)
