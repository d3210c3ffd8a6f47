"""The harder rung: bAbI's own stories in segments of two sentences, official training and test files."""

from __future__ import annotations

from pathlib import Path

import torch

from memkern.data.generators import SegmentedQuestions, babi_segments, read_babi
from memkern.training.gmm_recall.protocol import Task

_TASKS = {1: "qa1_single-supporting-fact", 2: "qa2_two-supporting-facts", 3: "qa3_three-supporting-facts"}


def babi_task(folder: str | Path, number: int, most_segments: int) -> Task:
    """A task of bAbI as documents.

    Args:
        folder: holds the English files, as qa1_single-supporting-fact_test.txt; of the training files the larger.
        number: 1, 2 or 3.
        most_segments: training leaves out stories of more segments; the test set is whole.

    Raises:
        ValueError: an unknown task. FileNotFoundError: a file is missing.
    """
    if number not in _TASKS:
        raise ValueError(f"babi_task: expected 1, 2 or 3, got {number}")
    large = Path(folder) / f"{_TASKS[number]}_train10k.txt"
    small = Path(folder) / f"{_TASKS[number]}_train.txt"
    training = read_babi(large if large.exists() else small)
    testing = read_babi(Path(folder) / f"{_TASKS[number]}_test.txt")
    places = sorted({story.answer for story in training})
    train, words = babi_segments(training, candidates=places)
    test, _ = babi_segments(testing, vocabulary=words, candidates=places, seed=1)
    lengths = train.segment_mask.sum(1)

    def draw(documents: int, segments: int, lead: int, seed: int) -> SegmentedQuestions:
        generator = torch.Generator().manual_seed(seed)
        fitting = (lengths <= min(segments, most_segments)).nonzero()[:, 0]
        if not len(fitting):
            raise ValueError(
                f"last_segments: no story has at most {segments} segments; the shortest has {lengths.min()}"
            )
        return train.select(fitting[torch.randint(len(fitting), (documents,), generator=generator)])

    return Task(
        name=f"bAbI task {number}",
        chance=1 / len(places),
        vocabulary=len(words),
        segment_length=train.input_ids.shape[2],
        draw=draw,
        test=lambda seed: test,
    )
