"""Training of one arm: a curriculum over the number of segments, one optimiser, no early stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from memkern.data.generators import SegmentedQuestions
from memkern.training.gmm_recall.arms import ARMS
from memkern.training.gmm_recall.evaluate import last_logits, right_answers
from memkern.training.groups import param_groups

Draw = Callable[[int, int, int, int], SegmentedQuestions]
"""(documents, segments, lead, seed) -> questions whose fact stands in one of the last ``segments``."""


@dataclass(frozen=True)
class Curriculum:
    """Documents grow by a segment whenever the running accuracy at their longest distance passes ``promote_at``.

    At their full length up to ``lead_segments`` more stand before, without a fact: a memory that was only ever asked
    while it was young would not show what it holds when it is older. No gradient flows through those.
    """

    steps: int = 500
    batch_size: int = 48
    first_segments: int = 1
    last_segments: int = 3
    lead_segments: int = 2
    longest_share: float = 0.5
    """So many documents have the longest distance so far, the others any up to it."""
    promote_at: float = 0.9
    learning_rate: float = 2e-3
    clip: float = 1.0
    warmup: int = 50


@dataclass
class TrainedRun:
    """What a run left behind."""

    arm: str
    seed: int
    parameters: int
    memory_parameters: int
    steps: int
    seconds: float
    """Processor time."""
    reached_segments: int
    """Segments of the documents that training ended with."""
    history: list[dict[str, float]] = field(default_factory=list)
    utilisation_entropy: float | None = None
    """GMM: entropy of the experts' mean probability on the test documents, at most ln k."""
    routing_entropy: float | None = None
    """GMM: mean entropy of a row's routing there."""


def train(
    arm: str,
    model: Any,
    draw: Draw,
    seed: int,
    curriculum: Curriculum = Curriculum(),
    progress: Callable[[int, float], None] | None = None,
    seconds: float | None = None,
) -> TrainedRun:
    """Train a model on freshly drawn documents.

    Args:
        arm: one of :data:`memkern.training.gmm_recall.ARMS`.
        model: what :func:`memkern.training.gmm_recall.build` made for it.
        draw: makes the documents of a step.
        seed: step i draws with ``seed`` * 1,000,003 + i.
        curriculum: steps, sizes and rates.
        progress: called with the step and the running accuracy.
        seconds: ends earlier after so many; the rate still falls over all ``steps``.
    """
    state = "mems" if ARMS[arm].state == "mems" else "carried"
    optimizer = torch.optim.AdamW(param_groups(model, lr=curriculum.learning_rate, weight_decay=0.0))
    last = curriculum.steps

    def rate(step: int) -> float:
        # Constant for half of the run, so that the length of the documents can grow, then down to nothing.
        return min(1.0, (step + 1) / curriculum.warmup) * min(1.0, 2 * (1 - step / last))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    segments, running = curriculum.first_segments, 0.0
    history = []
    model.train()
    start, busy, step = time.perf_counter(), time.process_time(), 0
    for step in range(curriculum.steps):
        if seconds is not None and time.perf_counter() - start > seconds:
            break
        drawn = seed * 1_000_003 + step
        lead = drawn % (curriculum.lead_segments + 1) if segments == curriculum.last_segments else 0
        questions = draw(curriculum.batch_size, segments, lead, drawn)
        output, start_logits, end_logits = last_logits(model, questions, state, lead)  # type: ignore[arg-type]
        answer = questions.answer_position
        loss = (cross_entropy(start_logits, answer) + cross_entropy(end_logits, answer)) / 2
        loss = loss + model.auxiliary_loss(output)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), curriculum.clip)
        optimizer.step()
        schedule.step()
        right = right_answers(questions, start_logits.detach(), end_logits.detach())
        far = right[questions.distance == questions.distance.max()].float().mean()
        running = 0.9 * running + 0.1 * float(far)
        if step % 50 == 0:
            history.append({"step": step, "segments": segments, "loss": loss.item(), "accuracy": running})
        if progress is not None:
            progress(step, running)
        if running > curriculum.promote_at and segments < curriculum.last_segments:
            segments, running = segments + 1, 0.0
    memory = sum(p.numel() for name, p in model.named_parameters() if model.is_memory_parameter(name))
    return TrainedRun(
        arm=arm,
        seed=seed,
        parameters=sum(p.numel() for p in model.parameters()),
        memory_parameters=memory,
        steps=step + 1,
        seconds=time.process_time() - busy,
        reached_segments=segments,
        history=history,
    )
