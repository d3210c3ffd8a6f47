"""The document-level loss against sums written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memkern.data import TimeStepMajorDataLoader
from memkern.training.losses import document_span_loss, stack_steps

LENGTH, CLS = 6, 5


def feature(document: str, segment: int, span: tuple[int, int] | None, passage: int = 4) -> dict[str, Any]:
    return {
        "input_ids": [7] * LENGTH,
        "attention_mask": [1] * LENGTH,
        "token_type_ids": [0] * LENGTH,
        "offset_mapping": [(i, i + 1) for i in range(passage)] + [(0, 0)] * (LENGTH - passage),
        "start_positions": span[0] if span else CLS,
        "end_positions": span[1] if span else CLS,
        "cls_index": CLS,
        "example_id": document,
        "segment_index": segment,
    }


def batch_of(*features: dict[str, Any]) -> dict[str, torch.Tensor]:
    (steps,) = TimeStepMajorDataLoader(features, batch_size=8)
    return stack_steps(steps)


def marginal(logits: torch.Tensor, allowed: list[tuple[int, int]], right: list[tuple[int, int]]) -> torch.Tensor:
    """-log of the share of the right (segment, token) pairs among the allowed."""
    mass = torch.stack([logits[pair] for pair in right]).logsumexp(0)
    return torch.stack([logits[pair] for pair in allowed]).logsumexp(0) - mass


@pytest.mark.parametrize("whole", [True, False])
def test_overlapping_windows_and_documents_without_an_answer(whole: bool) -> None:
    batch = batch_of(
        feature("a", 0, (2, 3)),
        feature("a", 1, (0, 0)),  # the answer again, a single token
        feature("a", 2, None),
        feature("b", 0, None, passage=3),
        feature("b", 1, None),
    )
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 3, LENGTH, generator=generator, dtype=torch.float64, requires_grad=True)
    end = torch.randn(2, 3, LENGTH, generator=generator, dtype=torch.float64, requires_grad=True)

    def tokens(segment: int, count: int = 4) -> list[tuple[int, int]]:
        return [(segment, i) for i in (*range(count), CLS)]

    losses = []
    if whole:
        allowed = tokens(0) + tokens(1) + tokens(2)
        losses.append((marginal(start[0], allowed, [(0, 2), (1, 0)]) + marginal(end[0], allowed, [(0, 3), (1, 0)])) / 2)
        allowed, null = tokens(0, 3) + tokens(1), [(0, CLS), (1, CLS)]
        losses.append((marginal(start[1], allowed, null) + marginal(end[1], allowed, null)) / 2)
    else:
        labels = {(0, 0): (2, 3), (0, 1): (0, 0), (0, 2): (CLS, CLS), (1, 0): (CLS, CLS), (1, 1): (CLS, CLS)}
        for (row, segment), (first, last) in labels.items():
            allowed = tokens(segment, 3 if (row, segment) == (1, 0) else 4)
            one = marginal(start[row], allowed, [(segment, first)])
            losses.append((one + marginal(end[row], allowed, [(segment, last)])) / 2)
    expected = torch.stack(losses).mean()
    loss = document_span_loss(start, end, batch, whole_documents=whole)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, (start, end))
    for grad, right in zip(grads, torch.autograd.grad(expected, (start, end)), strict=True):
        torch.testing.assert_close(grad, right)
    assert (grads[0][1, 2] == 0).all()  # the padding row of the shorter document


def test_questions_and_padding_are_no_answers() -> None:
    batch = batch_of(feature("a", 0, (1, 1)))
    start = torch.zeros(1, 1, LENGTH)
    moved = start.clone()
    moved[0, 0, 4] = 50.0
    assert document_span_loss(start, start, batch) == document_span_loss(moved, moved, batch)
