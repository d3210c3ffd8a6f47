"""Questions in SQuAD's form over passages of several windows, small enough to train on in seconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memkern.data.squad import SquadExample

NAMES = ("Ada", "Byron", "Clara", "David", "Edith", "Franz")
PLACES = ("London", "Paris", "Rome", "Vienna", "Madrid", "Prague")


@pytest.fixture(scope="session")
def questions() -> list[SquadExample]:
    """14 questions, 3 of them without an answer; passages of one to three windows of 40 tokens."""
    draw = random.Random(0)
    made = []
    for number in range(14):
        people = draw.sample(NAMES, 1 + number % 4)
        places = draw.sample(PLACES, len(people))
        context = " ".join(
            f"{name} lived in the old town of {place} for many years."
            for name, place in zip(people, places, strict=True)
        )
        asked = number % len(people)
        answer = () if number % 5 == 4 else (places[asked],)
        name = "Nobody" if not answer else people[asked]
        made.append(
            SquadExample(
                id=f"q{number}",
                question=f"Where did {name} live?",
                context=context,
                answers=answer,
                answer_starts=tuple(context.index(text) for text in answer),
            )
        )
    return made


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Fields of a tiny configuration; keywords change them."""

    def fields(**changes: Any) -> dict[str, Any]:
        return {
            "base_config": {
                "d_model": 16,
                "n_layer": 1,
                "n_head": 2,
                "d_inner": 32,
                "dropout": 0.1,
                "initializer_range": 0.1,
            },
            "tokenizer_vocab_size": 120,
            "output_dir": str(tmp_path / "run"),
            "num_epochs": 2,
            "max_seq_length": 40,
            "doc_stride": 8,
            "train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_steps": 2,
            "eval_steps": 1000,
            "warmup_freeze_base_epochs": 0,
            "warmup_disable_global_softmax_epochs": 0,
            "memory_num_tokens": 2,
            "progress_bar": False,
            "tensorboard": False,
            "fp16": False,
            "device": "cpu",
        } | changes

    return fields
