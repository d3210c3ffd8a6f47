"""The loader: row i stays document i, selection reads no answers at evaluation, order comes from the seed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from memkern.data import SegmentSelector, TimeStepMajorDataLoader

LENGTH = 6


def document(name: str, segments: int, answer: int | None = None) -> list[dict[str, Any]]:
    return [
        {
            "input_ids": [segment + 1] * LENGTH,
            "attention_mask": [1] * LENGTH,
            "token_type_ids": [0] * LENGTH,
            "offset_mapping": [(0, 1)] * LENGTH,
            "start_positions": 2 if segment == answer else LENGTH - 1,
            "end_positions": 3 if segment == answer else LENGTH - 1,
            "cls_index": LENGTH - 1,
            "example_id": name,
            "segment_index": segment,
            "context": "text",
            "has_answer": answer is not None,
            "chosen_answer_char_span": [0, 1],
        }
        for segment in range(segments)
    ]


def test_rows_never_move() -> None:
    features = [*document("a", 1), *document("b", 6), *document("c", 3)]
    random.Random(0).shuffle(features)
    features.sort(key=lambda feature: feature["example_id"])
    (batch,) = list(TimeStepMajorDataLoader(features, batch_size=3))
    assert len(batch) == 6
    for t, step in enumerate(batch):
        assert step["input_ids"].shape == (3, LENGTH)
        assert step["document_mask"].tolist() == [t < 1, t < 6, t < 3]
        assert step["example_ids"] == [
            name if t < length else f"padding_{name}" for name, length in (("a", 1), ("b", 6), ("c", 3))
        ]
        for row, active in enumerate(step["document_mask"].tolist()):
            assert step["input_ids"][row].eq(t + 1 if active else 0).all()
            assert step["start_positions"][row] == LENGTH - 1
            assert step["context"][row] == ("text" if active else "")
    assert batch[0]["document_mask"].dtype is torch.bool


def test_every_document_comes_once_an_epoch() -> None:
    features = [feature for i in range(7) for feature in document(f"d{i}", 1 + i % 3)]
    loader = TimeStepMajorDataLoader(features, batch_size=3, shuffle=True, epoch_seed=5)
    assert len(loader) == 3

    def order(epoch: int) -> list[str]:
        loader.set_epoch(epoch)
        return [name for batch in loader for name in batch[0]["example_ids"]]

    assert sorted(order(0)) == [f"d{i}" for i in range(7)]
    assert order(0) == order(0)
    assert order(0) != order(1)
    random.seed(3)
    state = random.getstate()
    order(2)
    assert random.getstate() == state
    (middle,) = loader.batches([1])
    assert middle[0]["example_ids"] == order(2)[3:6]


@pytest.mark.parametrize(("answer", "start"), [(15, 13), (0, 0), (33, 30), (1, 0)])
def test_answer_centred_runs(answer: int, start: int) -> None:
    selector = SegmentSelector(4, "answer_centered")
    assert selector.select(document("d", 34, answer), training=True) == range(start, start + 4)


def test_selection_reads_no_answer_outside_training() -> None:
    with_answer, without = document("d", 34, 15), document("d", 34)
    for strategy in ("answer_centered", "first_n", "random_continuous"):
        selector = SegmentSelector(4, strategy, seed=1)
        assert selector.select(with_answer) == selector.select(without)
    assert SegmentSelector(4).select(with_answer) == range(4)
    assert SegmentSelector(None).select(with_answer) == range(34)
    assert SegmentSelector(40).select(with_answer) == range(34)


def test_random_runs_differ_by_document_and_epoch() -> None:
    selector = SegmentSelector(2, "random_continuous", seed=1)
    runs = {(name, epoch): selector.select(document(name, 50), epoch=epoch) for name in "abcd" for epoch in range(4)}
    assert len({run.start for run in runs.values()}) > 8
    assert all(len(run) == 2 and run.stop <= 50 for run in runs.values())
    assert selector.select(document("a", 50), epoch=2) == runs["a", 2]


def test_limits_and_errors() -> None:
    loader = TimeStepMajorDataLoader(document("a", 9, 7), 1, max_segments=2, training=True)
    (batch,) = loader
    assert [step["input_ids"][0, 0].item() for step in batch] == [7, 8]
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        TimeStepMajorDataLoader([], 0)
    with pytest.raises(ValueError, match="segment_selection_strategy: expected one of answer_centered"):
        TimeStepMajorDataLoader([], 1, segment_selection_strategy="last")
    with pytest.raises(ValueError, match="max_segments: expected at least 1 or None, got 0"):
        TimeStepMajorDataLoader([], 1, max_segments=0)
    assert list(TimeStepMajorDataLoader([], 2)) == []
