"""Answers of a model over documents of segments, with memory carried, reset or swapped; accuracy by distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memkern.data.generators import SegmentedQuestions
from memkern.training.gmm_recall.arms import State


@dataclass(frozen=True)
class Accuracy:
    """Right answers out of ``trials`` at one distance."""

    distance: int
    right: int
    trials: int


def last_logits(
    model: Any, questions: SegmentedQuestions, state: State = "carried", lead: int = 0
) -> tuple[Any, Tensor, Tensor]:
    """Run every segment and answer in the last.

    Args:
        model: one of ours.
        questions: B documents of T segments that end together.
        state: "carried" from segment to segment; "mems", XLNet's own instead of a memory; "reset" before every
            segment; "swapped": before every segment each document takes over its neighbour's. See :func:`apart`.
        lead: "carried": no gradient flows through so many segments at the start.

    Returns:
        The model's output of all segments ("carried") or of the last, and (B, L) start and end logits of the last.
    """
    if state == "carried":
        before: Any = None
        # Without memory nothing of the earlier segments can reach the last.
        first = questions.segments - 1 if model.memory_type == "standard" else lead
        if first and model.memory_type != "standard":
            with torch.no_grad():
                before = _run(model, questions, 0, first, None).new_memory_state
        output = _run(model, questions, first, questions.segments, before)
        return output, output.start_logits[:, -1], output.end_logits[:, -1]
    carried: Any = None
    output = None
    for step in range(questions.segments):
        mask = questions.segment_mask[:, step]
        inputs = {"attention_mask": questions.attention_mask[:, step].float(), "cls_index": _cls(questions)[:, 0]}
        if state == "mems":
            output = model(questions.input_ids[:, step], **inputs, mems=carried, use_mems=True)
            carried = output.mems
            continue
        output = model(questions.input_ids[:, step], **inputs, memory_state=carried, document_mask=mask)
        carried = output.new_memory_state if state != "reset" else None
        if state == "swapped":
            carried = model.select_rows(carried, torch.arange(questions.documents).roll(1))
    assert output is not None
    return output, output.start_logits, output.end_logits


def _run(model: Any, questions: SegmentedQuestions, first: int, end: int, state: Any) -> Any:
    """Some segments of every document, with the memory carried."""
    return model(
        questions.input_ids[:, first:end],
        attention_mask=questions.attention_mask[:, first:end].float(),
        document_mask=questions.segment_mask[:, first:end],
        cls_index=_cls(questions).expand(-1, end - first),
        memory_state=state,
    )


def right_answers(questions: SegmentedQuestions, start: Tensor, end: Tensor) -> Tensor:
    """(B,) bool: the best candidate is the right one."""
    scores = (start + end).gather(1, questions.candidates)
    best = questions.candidates.gather(1, scores.argmax(1, keepdim=True))[:, 0]
    return best == questions.answer_position


def apart(documents: int) -> Tensor:
    """(documents,) int64: an order in which neighbours stood far from each other.

    Questions that stand side by side may be of one story, and a neighbour's memory then holds the answer.
    """
    step = max(1, math.isqrt(documents))
    return torch.cat([torch.arange(first, documents, step) for first in range(step)])


@torch.no_grad()
def evaluate(
    model: Any, questions: SegmentedQuestions, state: State = "carried", batch_size: int = 250
) -> list[Accuracy]:
    """Accuracy at every distance that occurs."""
    was_training = model.training
    model.eval()
    order = apart(questions.documents)
    right = torch.empty(questions.documents, dtype=torch.bool)
    for rows in order.split(batch_size):
        part = questions.select(rows)
        right[rows] = right_answers(part, *last_logits(model, part, state)[1:])
    model.train(was_training)
    return [
        Accuracy(int(d), int(right[questions.distance == d].sum()), int((questions.distance == d).sum()))
        for d in questions.distance.unique()
    ]


def _cls(questions: SegmentedQuestions) -> Tensor:
    """(B, 1): the CLS token stands last in every segment."""
    return torch.full((questions.documents, 1), questions.input_ids.shape[2] - 1)


@torch.no_grad()
def routing_use(model: Any, questions: SegmentedQuestions, documents: int = 500) -> tuple[float, float]:
    """How a GMM model routes: entropy of the experts' mean probability, and the rows' mean entropy (natural log)."""
    was_training = model.training
    model.eval()
    rows = torch.arange(questions.documents)[:: max(1, questions.documents // documents)]
    part = questions.select(rows)
    state, seen = None, []
    for step in range(part.segments):
        mask = part.segment_mask[:, step]
        output = model(
            part.input_ids[:, step],
            attention_mask=part.attention_mask[:, step].float(),
            document_mask=mask,
            memory_state=state,
            return_routing_info=True,
        )
        state = output.new_memory_state
        seen.append(output.routing_info["routing_probs"][mask].double())
    model.train(was_training)
    probs = torch.cat(seen)
    mean = probs.mean(0)
    return (
        float(-torch.special.xlogy(mean, mean).sum()),
        float(-torch.special.xlogy(probs, probs).sum(1).mean()),
    )
