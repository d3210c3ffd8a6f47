"""A tokenizer trained in place and a few questions in SQuAD's form."""

from __future__ import annotations

from typing import Any

import pytest

PASSAGE = (
    "The Normans were the people who in the 10th and 11th centuries gave their name to Normandy, a region in France. "
    "They were descended from Norse raiders and pirates from Denmark, Iceland and Norway who, under their leader "
    "Rollo, agreed to swear fealty to King Charles III of West Francia. Through generations of assimilation and "
    "mixing with the native Frankish and Roman-Gaulish populations, their descendants would gradually merge with the "
    "Carolingian-based cultures of West Francia. The distinct cultural and ethnic identity of the Normans emerged "
    "initially in the first half of the 10th century, and it continued to evolve over the succeeding centuries."
)
SECOND = "The Rhine begins in the Swiss canton of Graubünden and flows to the North Sea; it is 1,230 km long."


def _question(id: str, context: str, question: str, *answers: str) -> dict[str, Any]:
    found = [{"text": text, "answer_start": context.index(text)} for text in answers]
    return {"id": id, "question": question, "answers": found, "is_impossible": not answers}


@pytest.fixture
def squad() -> dict[str, Any]:
    """Two articles in the official form."""
    first = [
        _question("n1", PASSAGE, "In what country is Normandy located?", "France"),
        _question("n2", PASSAGE, " When did the identity emerge?", "first half of the 10th century", "10th century"),
        _question("n3", PASSAGE, "Who ruled the moon?"),
        _question("n4", PASSAGE, "Who was the Norse leader?", "Rollo"),
    ]
    second = [_question("r1", SECOND, "Where does the Rhine begin?", "Swiss canton of Graubünden")]
    return {
        "version": "v2.0",
        "data": [
            {"title": "Normans", "paragraphs": [{"context": PASSAGE, "qas": first}]},
            {"title": "Rhine", "paragraphs": [{"context": SECOND, "qas": second}]},
        ],
    }


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    pytest.importorskip("transformers")
    from memkern.data import train_xlnet_tokenizer

    return train_xlnet_tokenizer([PASSAGE, SECOND, "Who was in what country?"], vocab_size=300)
