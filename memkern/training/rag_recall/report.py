"""What the experiment found: a table of every arm and bin with intervals, the bars, and the curves as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

TITLES = {
    "self-rag": "Self-RAG",
    "oracle chunks": "oracle chunks",
    "shuffled order": "Self-RAG, shuffled order",
    "random chunks": "random chunks",
    "window": "window of the last facts",
    "full context": "full context (reads at most 8 in training)",
    "self-rag, no contrast": "Self-RAG trained without contrast",
}


def markdown(content: Mapping[str, Any]) -> str:
    """The table, in Markdown: one row an arm, pooled over the seeds, then every seed of Self-RAG."""
    settings, pooled = content["settings"], content["pooled"]
    bins = settings["bins"]
    seeds = ", ".join(str(seed["seed"]) for seed in content["seeds"])
    first = next(iter(pooled.values()))
    lines = [
        f"Position recall, {settings['facts']} facts, {bins} bins of positions, {min(first['queries_per_bin'])} "
        f"questions a bin pooled over seeds {seeds}; chance {content['chance']:.4f}. A tiny model from a random start "
        f"({content['seeds'][0]['parameters']} parameters). Every arm but the full context reads "
        f"{settings['chunks']} facts, in as many tokens.",
        "",
        "| arm | "
        + " | ".join(str(i + 1) for i in range(bins))
        + " | max - min | primacy | middle | recency | flatness "
        f"| fact among those read (retrieval@{settings['chunks']}) |",
        "|---|" + "---|" * (bins + 6),
    ]
    for arm, row in pooled.items():
        cells = [
            f"{a:.3f} [{low:.3f}, {high:.3f}]" for a, (low, high) in zip(row["bins"], row["intervals"], strict=True)
        ]
        metrics = [row["max_minus_min"], row["primacy"], row["middle"], row["recency"], row["flatness"], row["found"]]
        lines.append(f"| {TITLES.get(arm, arm)} | " + " | ".join([*cells, *(f"{m:.3f}" for m in metrics)]) + " |")
    lines += ["", "| seed | arm | " + " | ".join(str(i + 1) for i in range(bins)) + " | lookup | steps | seconds |"]
    lines.append("|---|---|" + "---|" * (bins + 3))
    for seed in content["seeds"]:
        training = seed["training"]
        steps = f"{training['reader_steps']} + {training['retriever_steps']}"
        state = "" if seed["reads"] else " (failed)"
        for arm, accuracy in seed["bins"].items():
            cells = [f"{a:.3f}" for a in accuracy]
            tail = [f"{training['lookup_accuracy']:.3f}{state}", steps, f"{seed['seconds']:.0f}"]
            lines.append(f"| {seed['seed']} | {TITLES.get(arm, arm)} | " + " | ".join([*cells, *tail]) + " |")
    return "\n".join(lines)


def verdicts(content: Mapping[str, Any]) -> list[str]:
    """One line a bar: met or not, what was asked and what was measured."""
    return [
        f"- {'met' if bar['holds'] else 'NOT MET'}: {name}: {bar['measured']:.4f} (bar {bar['asked']:.4g})"
        for name, bar in content["bars"].items()
    ]


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Accuracy over positions, pooled over the seeds, with 95% intervals of the bins."""
    from memkern.analysis.figures import new_figure, save_figure

    settings = content["settings"]
    width = settings["facts"] / settings["bins"]
    figure = new_figure((9, 5))
    axes = figure.add_subplot()
    for arm, row in content["pooled"].items():
        middles = [(i + 0.5) * width for i in range(settings["bins"])]
        low = [a - interval[0] for a, interval in zip(row["bins"], row["intervals"], strict=True)]
        high = [interval[1] - a for a, interval in zip(row["bins"], row["intervals"], strict=True)]
        axes.errorbar(middles, row["bins"], yerr=[low, high], marker="o", capsize=2, label=TITLES.get(arm, arm))
    axes.axhline(content["chance"], color="black", linewidth=0.8, linestyle="--", label="chance")
    axes.set(xlabel="position of the fact that is asked", ylabel="right answers", ylim=(-0.02, 1.05))
    axes.set_title("Position recall (tiny models from a random start)")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)
