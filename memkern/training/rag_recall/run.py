"""The whole experiment: seeds, arms, the run without contrast, and what is published of it."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from memkern.analysis import wilson_interval
from memkern.training.rag_recall.evaluate import ARMS, ArmCounts, curve_metrics, evaluate
from memkern.training.rag_recall.task import RecallSettings
from memkern.training.rag_recall.train import TrainingLog, train_reader, train_retriever

NO_CONTRAST = "self-rag, no contrast"
#: What the protocol asks of the pooled result.
BARS = {"every bin": 0.97, "max - min": 0.03, "below oracle": 0.02, "retrieval@k": 1.0}

Say = Callable[[str], None]


@dataclass
class SeedResult:
    """One seed: its training and every arm's counts."""

    seed: int
    log: TrainingLog
    arms: dict[str, ArmCounts]
    parameters: int
    seconds: float

    @property
    def reads(self) -> bool:
        """Whether the reader formed its lookup; a run that did not counts, and is marked as failed."""
        return self.log.lookup_accuracy >= 0.9


@dataclass
class Recall:
    """All seeds, and what follows from them."""

    settings: RecallSettings
    seeds: list[SeedResult] = field(default_factory=list)

    def pooled(self, arm: str) -> ArmCounts:
        parts = [seed.arms[arm] for seed in self.seeds if arm in seed.arms]
        columns = ([getattr(part, name) for part in parts] for name in ("right", "asked", "found"))
        return ArmCounts(*([sum(position) for position in zip(*column, strict=True)] for column in columns))

    def arms(self) -> list[str]:
        """Names in the order of the table."""
        return [arm for arm in (*ARMS, NO_CONTRAST) if any(arm in seed.arms for seed in self.seeds)]

    def row(self, counts: ArmCounts) -> dict[str, Any]:
        """Accuracy by bin with intervals, retrieval@k, and the metrics of the curve over positions."""
        bins, facts = self.settings.bins, self.settings.facts
        edges = [facts * i // bins for i in range(bins + 1)]
        right = [sum(counts.right[a:b]) for a, b in itertools.pairwise(edges)]
        asked = [sum(counts.asked[a:b]) for a, b in itertools.pairwise(edges)]
        accuracy = [r / n for r, n in zip(right, asked, strict=True)]
        positions = [r / n for r, n in zip(counts.right, counts.asked, strict=True)]
        metrics = curve_metrics(positions)
        metrics["max_minus_min"] = max(accuracy) - min(accuracy)
        return {
            "bins": accuracy,
            "intervals": [wilson_interval(r, n) for r, n in zip(right, asked, strict=True)],
            "queries_per_bin": asked,
            "positions": positions,
            "found": sum(counts.found) / sum(counts.asked),
            **metrics,
        }

    def bars(self) -> dict[str, dict[str, Any]]:
        """Each bar of the protocol: what was asked, what was measured, whether it holds."""
        own, oracle = self.row(self.pooled("self-rag")), self.row(self.pooled("oracle chunks"))
        window = self.pooled("window")
        outside = slice(0, self.settings.facts - self.settings.chunks)
        right, asked = sum(window.right[outside]), sum(window.asked[outside])
        low, _ = wilson_interval(right, asked)
        chance = 1 / self.settings.values
        gap = max(o - s for o, s in zip(oracle["bins"], own["bins"], strict=True))
        return {
            "every bin": _bar(min(own["bins"]), BARS["every bin"], min(own["bins"]) >= BARS["every bin"]),
            "max - min": _bar(own["max_minus_min"], BARS["max - min"], own["max_minus_min"] <= BARS["max - min"]),
            "below oracle": _bar(gap, BARS["below oracle"], gap <= BARS["below oracle"]),
            "retrieval@k": _bar(own["found"], BARS["retrieval@k"], round(own["found"], 3) >= BARS["retrieval@k"]),
            "window no better than chance outside itself": _bar(right / asked, chance, low <= chance),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return {
            "about": "Position recall by a tiny model trained from a random start on this task alone: "
            "a fact is asked, its position varies. Answers are generated tokens.",
            "settings": asdict(self.settings),
            "chance": 1 / self.settings.values,
            "bars": self.bars(),
            "pooled": {arm: self.row(self.pooled(arm)) for arm in self.arms()},
            "seeds": [
                {
                    "seed": seed.seed,
                    "reads": seed.reads,
                    "parameters": seed.parameters,
                    "seconds": round(seed.seconds, 1),
                    "training": asdict(seed.log),
                    "bins": {arm: self.row(counts)["bins"] for arm, counts in seed.arms.items()},
                    "counts": {arm: asdict(counts) for arm, counts in seed.arms.items()},
                }
                for seed in self.seeds
            ],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Recall:
        """What :meth:`to_dict` gave."""
        recall = cls(RecallSettings(**content["settings"]))
        for seed in content["seeds"]:
            log = TrainingLog(**{**seed["training"], "curve": [tuple(point) for point in seed["training"]["curve"]]})
            arms = {arm: ArmCounts(**counts) for arm, counts in seed["counts"].items()}
            recall.seeds.append(SeedResult(seed["seed"], log, arms, seed["parameters"], seed["seconds"]))
        return recall


def _bar(measured: float, asked: float, holds: bool) -> dict[str, Any]:
    return {"measured": measured, "asked": asked, "holds": holds}


def run_seed(
    settings: RecallSettings, seed: int, *, documents: int, contrast_arm: bool = True, say: Say = lambda text: None
) -> SeedResult:
    """Train and evaluate one seed; with ``contrast_arm`` also the same reader without the contrastive loss."""
    start = time.perf_counter()

    def progress(phase: str, step: int, accuracy: float) -> None:
        say(f"seed {seed}, {phase}, step {step}: lookup {accuracy:.2f}")

    model, log = train_reader(settings, seed, progress=progress)
    plain = copy.deepcopy(model) if contrast_arm else None
    model = train_retriever(model, log, settings, seed, progress=progress)
    say(f"seed {seed}, {documents * settings.facts} questions to each arm")
    arms = evaluate(model, settings, seed, documents)
    if plain is not None:
        without = replace(settings, contrastive_weight=0.0)
        plain.config.contrastive_weight = 0.0
        plain = train_retriever(plain, copy.deepcopy(log), without, seed, steps=log.retriever_steps, progress=progress)
        arms[NO_CONTRAST] = evaluate(plain, without, seed, documents, arms=("self-rag",))["self-rag"]
    return SeedResult(seed, log, arms, sum(p.numel() for p in model.parameters()), time.perf_counter() - start)


def run(
    settings: RecallSettings | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    previous: Recall | None = None,
    contrast_arm: bool = True,
    say: Say = lambda text: None,
    done: Callable[[Recall], None] = lambda recall: None,
) -> Recall:
    """The experiment over ``seeds``; ``done`` is called after each, with all that there is.

    Args:
        previous: seeds that ran with the same settings are not run again.
        contrast_arm: also train each reader on without the contrastive loss.
    """
    settings = settings or RecallSettings()
    # A document gives every bin facts / bins questions.
    per_seed = math.ceil(settings.queries_per_bin / len(seeds) / (settings.facts // settings.bins))
    recall = Recall(settings)
    known = {} if previous is None or previous.settings != settings else {seed.seed: seed for seed in previous.seeds}
    for seed in seeds:
        if seed in known:
            recall.seeds.append(known[seed])
            continue
        recall.seeds.append(run_seed(settings, seed, documents=per_seed, contrast_arm=contrast_arm, say=say))
        done(recall)
    return recall


def quick_settings(seconds: float = 60.0) -> RecallSettings:
    """A minute (or fewer ``seconds``) instead of several, by fewer steps and questions. Not the published protocol."""
    share = seconds / 60
    return replace(
        RecallSettings(),
        queries_per_bin=160,
        reader_steps=max(1, round(400 * share)),
        retriever_steps=max(1, round(150 * share)),
        anneal_steps=max(1, round(50 * share)),
    )
