"""What the protocol found: a table of every arm and distance with intervals, the verdicts, and the curve as a plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memkern.analysis import wilson_interval
from memkern.analysis.figures import new_figure, save_figure
from memkern.training.gmm_recall.arms import ARMS


@dataclass(frozen=True)
class Row:
    """An arm over its seeds: right answers and trials by distance."""

    arm: str
    seeds: tuple[int, ...]
    failed: int
    right: Mapping[int, int]
    trials: Mapping[int, int]
    by_seed: Mapping[int, Mapping[int, float]]
    """distance -> seed -> accuracy."""
    seconds: float
    memory_parameters: int
    utilisation_entropy: float | None

    def accuracy(self, distance: int) -> float:
        """Pooled over seeds."""
        return self.right[distance] / self.trials[distance]

    def mean(self, *distances: int) -> float:
        """Over several distances."""
        return sum(self.right[d] for d in distances) / sum(self.trials[d] for d in distances)

    def interval(self, *distances: int) -> tuple[float, float]:
        """Wilson's, of the pooled answers."""
        return wilson_interval(sum(self.right[d] for d in distances), sum(self.trials[d] for d in distances))


def rows(content: Mapping[str, Any]) -> list[Row]:
    """One row for each arm that ran, in the order of :data:`ARMS`."""
    found = []
    for arm in ARMS:
        runs = [run for run in content["runs"] if run["arm"] == arm]
        good = [run for run in runs if "error" not in run]
        if not runs:
            continue
        right: dict[int, int] = defaultdict(int)
        trials: dict[int, int] = defaultdict(int)
        by_seed: dict[int, dict[int, float]] = defaultdict(dict)
        for run in good:
            for distance, (hits, count) in run["accuracy"].items():
                right[int(distance)] += hits
                trials[int(distance)] += count
                by_seed[int(distance)][run["seed"]] = hits / count
        entropies = [run["utilisation_entropy"] for run in good if run.get("utilisation_entropy") is not None]
        found.append(
            Row(
                arm=arm,
                seeds=tuple(sorted(run["seed"] for run in runs)),
                failed=len(runs) - len(good),
                right=dict(right),
                trials=dict(trials),
                by_seed={d: dict(values) for d, values in by_seed.items()},
                seconds=sum(run["seconds"] for run in good) / max(len(good), 1),
                memory_parameters=good[0]["memory_parameters"] if good else 0,
                utilisation_entropy=sum(entropies) / len(entropies) if entropies else None,
            )
        )
    return found


def distances(content: Mapping[str, Any]) -> list[int]:
    """Every distance that was tested."""
    return sorted({int(d) for run in content["runs"] for d in run.get("accuracy", {})})


@dataclass(frozen=True)
class Verdict:
    """A bar of the protocol, with what was measured."""

    claim: str
    measured: str
    met: bool


def verdicts(content: Mapping[str, Any]) -> list[Verdict]:
    """The bars that the arms that ran allow to judge, for the cross-segment pointer."""
    table = {row.arm: row for row in rows(content) if row.trials}
    chance = content["settings"]["chance"]
    trained = content["settings"]["curriculum"]["last_segments"]
    every = distances(content)
    near, far = [d for d in every if d < trained], [d for d in every if d >= trained]
    found = []
    if "gmm" in table:
        for name, group in (("trained", near), ("unseen", far)):
            if group:
                lowest = min(table["gmm"].accuracy(d) for d in group)
                claim = f"GMM >= 0.95 at the {name} distances {group[0]} to {group[-1]}"
                found.append(Verdict(claim, f"lowest {lowest:.3f}", lowest >= 0.95))
    beyond = [d for d in every if d >= 1]
    for arm in ("none", "gmm-reset", "gmm-swapped"):
        if arm in table and beyond:
            low, high = table[arm].interval(*beyond)
            measured = f"{table[arm].mean(*beyond):.3f} [{low:.3f}, {high:.3f}]"
            claim = f"{ARMS[arm].title}: chance ({chance:.3f}) at distances >= 1"
            found.append(Verdict(claim, measured, low <= chance <= high))
    if "gmm" in table and "gmm-no-balance" in table:
        on, off = table["gmm"], table["gmm-no-balance"]
        if on.utilisation_entropy is not None and off.utilisation_entropy is not None:
            loss = off.mean(*every) - on.mean(*every)
            found.append(
                Verdict(
                    "load-balance loss: utilisation entropy rises, accuracy not lower by more than 0.02",
                    f"entropy {off.utilisation_entropy:.3f} -> {on.utilisation_entropy:.3f}, "
                    f"accuracy {off.mean(*every):.3f} -> {on.mean(*every):.3f}",
                    on.utilisation_entropy > off.utilisation_entropy and loss <= 0.02,
                )
            )
    return found


def markdown(content: Mapping[str, Any]) -> str:
    """The table in Markdown: pooled accuracy, interval, and every seed."""
    every = distances(content)
    trained = content["settings"]["curriculum"]["last_segments"]
    pointer = content["settings"]["task"] == "cross-segment pointer"
    heads = [f"{d}{' (unseen)' if pointer and d >= trained else ''}" for d in every]
    lines = [
        f"Accuracy by distance in segments, {content['settings']['task']}, chance {content['settings']['chance']:.3f}; "
        "pooled over seeds [95% interval] (each seed).",
        "",
        "| arm | seeds | " + " | ".join(heads) + " | memory parameters | CPU s a run |",
        "|---|---|" + "---|" * len(every) + "---|---|",
    ]
    for row in rows(content):
        cells = []
        for d in every:
            if d not in row.trials:
                cells.append("-")
                continue
            low, high = row.interval(d)
            seeds = ", ".join(f"{row.by_seed[d][seed]:.2f}" for seed in sorted(row.by_seed[d]))
            cells.append(f"{row.accuracy(d):.3f} [{low:.3f}, {high:.3f}] ({seeds})")
        count = f"{len(row.seeds)}" + (f", {row.failed} failed" if row.failed else "")
        title = ARMS[row.arm].title
        lines.append(
            f"| {title} | {count} | " + " | ".join(cells) + f" | {row.memory_parameters} | {row.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(content: Mapping[str, Any], path: str | Path) -> Path:
    """Accuracy over distance, a line an arm with its interval, chance dashed."""
    figure = new_figure((9, 5.5))
    axes = figure.add_subplot()
    for row in rows(content):
        places = sorted(row.trials)
        values = [row.accuracy(d) for d in places]
        bounds = [row.interval(d) for d in places]
        below = [value - low for value, (low, _) in zip(values, bounds, strict=True)]
        above = [high - value for value, (_, high) in zip(values, bounds, strict=True)]
        axes.errorbar(places, values, yerr=[below, above], marker="o", capsize=3, label=ARMS[row.arm].title)
    axes.axhline(content["settings"]["chance"], color="grey", linestyle="--", label="chance")
    if content["settings"]["task"] == "cross-segment pointer":
        axes.axvline(content["settings"]["curriculum"]["last_segments"] - 0.5, color="grey", linestyle=":")
        axes.text(content["settings"]["curriculum"]["last_segments"] - 0.45, 0.02, "not trained on", color="grey")
    axes.set(
        xlabel="segments between the fact and the question",
        ylabel="accuracy",
        ylim=(0, 1.03),
        xticks=distances(content),
        title=f"{content['settings']['task']}: tiny models from a random start, intervals 95%",
    )
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return save_figure(figure, path)
