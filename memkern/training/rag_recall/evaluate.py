"""Ask about every position through the public path, and judge the tokens that were generated, nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memkern.models.self_rag import SelfRAGModel
from memkern.training.rag_recall.task import Documents, RecallSettings, draw, with_distractors
from memkern.training.rag_recall.train import TEST_SEED, remember, shuffle

ARMS = ("self-rag", "oracle chunks", "shuffled order", "random chunks", "window", "full context")
AT_ONCE = 4  # documents whose questions are answered together


@dataclass
class ArmCounts:
    """Right answers and questions by position."""

    right: list[int]
    asked: list[int]
    found: list[int]  # the right fact was among those read

    def add(self, right: Tensor, found: Tensor) -> None:
        """(D, N) bool each: which answers were right, which questions had their fact before them."""
        for position in range(right.shape[1]):
            self.right[position] += int(right[:, position].sum())
            self.found[position] += int(found[:, position].sum())
            self.asked[position] += right.shape[0]


def evaluate(
    model: SelfRAGModel, settings: RecallSettings, seed: int, documents: int, arms: Sequence[str] = ARMS
) -> dict[str, ArmCounts]:
    """Every arm on the same ``documents`` held-out documents, each position of each asked once.

    All arms are one trained model; they differ in the facts that it reads before the question.

    Args:
        model: trained; its store is cleared and filled anew.
        seed: of the documents and of the random arms.
        arms: which.
    """
    held_out = draw(settings, documents, seed=seed + TEST_SEED)
    generator = torch.Generator().manual_seed(seed + TEST_SEED)
    facts = settings.facts
    counts = {arm: ArmCounts([0] * facts, [0] * facts, [0] * facts) for arm in arms}
    for start in range(0, documents, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        _ask(model, settings, Documents(held_out.facts[part], held_out.questions[part]), generator, counts)
    model.memory.clear()
    return counts


def _ask(
    model: SelfRAGModel,
    settings: RecallSettings,
    block: Documents,
    generator: torch.Generator,
    counts: dict[str, ArmCounts],
) -> None:
    count, facts = block.answers.shape
    total, k = count * facts, settings.chunks
    ids = remember(model, block).flatten().tolist()
    questions = block.questions.flatten(0, 1)
    groups = torch.arange(count).repeat_interleave(facts).tolist()
    wanted = torch.arange(facts).repeat(count)
    hits: Any = model.retrieve(model.embed(questions), k, groups=groups)
    shuffled = shuffle(hits, generator)
    found = torch.tensor([any(hit.id == id for hit in row) for row, id in zip(hits, ids, strict=True)])
    places = {
        "random chunks": torch.rand(total, facts, generator=generator).topk(k, 1).indices,
        "oracle chunks": with_distractors(facts, wanted, k, generator),
        "window": torch.arange(facts - k, facts).expand(total, -1),
        "full context": torch.arange(facts).expand(total, -1),
    }
    read: dict[str, Any] = {"self-rag": None, "shuffled order": shuffled}  # None: the model searches itself
    inside = {"self-rag": found, "shuffled order": found}
    for arm, chosen in places.items():
        read[arm] = [block.facts[d, row].tolist() for d, row in zip(groups, chosen, strict=True)]
        inside[arm] = (chosen == wanted[:, None]).any(1)
    for arm in counts:
        out = model.generate(questions, retrieved=read[arm], memory_groups=groups, max_new_tokens=1, do_sample=False)
        counts[arm].add((out[:, -1] == block.answers.flatten()).view(count, facts), inside[arm].view(count, facts))


def curve_metrics(accuracy: list[float]) -> dict[str, float]:
    """Primacy and recency (first and last tenth of the positions), middle, mean, max - min, slope, flatness.

    flatness = 1 - standard deviation (n - 1) / mean, 0 for a mean of 0.
    """
    n = len(accuracy)
    edge = max(1, n // 10)
    mean = sum(accuracy) / n
    middle = accuracy[edge : n - edge] or accuracy
    deviation = math.sqrt(sum((a - mean) ** 2 for a in accuracy) / (n - 1)) if n > 1 else 0.0
    centre = (n - 1) / 2
    spread = sum((i - centre) ** 2 for i in range(n))
    return {
        "primacy": sum(accuracy[:edge]) / edge,
        "recency": sum(accuracy[n - edge :]) / edge,
        "middle": sum(middle) / len(middle),
        "mean": mean,
        "max_minus_min": max(accuracy) - min(accuracy),
        "slope": sum((i - centre) * a for i, a in enumerate(accuracy)) / spread if spread else 0.0,
        "flatness": 1 - deviation / mean if mean else 0.0,
    }
