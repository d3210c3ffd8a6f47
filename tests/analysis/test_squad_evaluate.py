"""The official scores, by hand-made cases whose numbers were worked out on paper."""

from __future__ import annotations

from typing import Any

import pytest

from memkern.analysis import normalize_answer, squad_evaluate, wilson_interval


def dataset(**golds: list[str]) -> dict[str, Any]:
    questions = [
        {"id": id, "question": "?", "answers": [{"text": text, "answer_start": 0} for text in texts]}
        for id, texts in golds.items()
    ]
    return {"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": questions}]}]}


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Norman's Conquest!", "normans conquest"),
        ("an apple a day, the end", "apple day end"),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("l’Été", "l’été"),
        ("e\u0301", "e\u0301"),
        ("well-known", "wellknown"),
        ("a.m.", "am"),
        (" the ", ""),
    ],
)
def test_normalisation(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


def test_scores() -> None:
    data = dataset(a=["the red fox", "a fox"], b=["10th century"], c=[], d=[])
    predictions = {"a": "Red fox.", "b": "in the 10th", "c": "", "d": "something"}
    report = squad_evaluate(data, predictions)
    assert list(report) == [
        *("exact", "f1", "total"),
        *("HasAns_exact", "HasAns_f1", "HasAns_total"),
        *("NoAns_exact", "NoAns_f1", "NoAns_total"),
    ]
    assert report == {
        "exact": 50.0,
        "f1": 62.5,
        "total": 4,
        "HasAns_exact": 50.0,
        "HasAns_f1": 75.0,
        "HasAns_total": 2,
        "NoAns_exact": 50.0,
        "NoAns_f1": 50.0,
        "NoAns_total": 2,
    }


def test_words_count_as_often_as_they_occur() -> None:
    report = squad_evaluate(dataset(a=["x x y"]), {"a": "x z"})
    assert report["f1"] == pytest.approx(100 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert "NoAns_exact" not in report


def test_answers_that_normalise_to_nothing() -> None:
    assert squad_evaluate(dataset(a=["The"]), {"a": ""})["exact"] == 100.0
    assert squad_evaluate(dataset(a=["The"]), {"a": "an"})["HasAns_f1"] == 100.0
    assert squad_evaluate(dataset(a=["fox"]), {"a": "the"})["f1"] == 0.0


def test_probabilities_of_no_answer() -> None:
    data = dataset(a=["fox"], b=["hen"], c=[], d=[])
    predictions = {"a": "fox", "b": "hen", "c": "x", "d": "y"}
    na_probs = {"a": 0.1, "b": 0.6, "c": 0.5, "d": 0.9}
    report = squad_evaluate(data, predictions, na_probs)
    # From all unanswered (2 right): a right -> 3; c wrong -> 2; b right -> 3; d wrong -> 2. The first 3 is the best.
    assert (report["best_exact"], report["best_exact_thresh"]) == (75.0, 0.1)
    assert (report["best_f1"], report["best_f1_thresh"]) == (75.0, 0.1)
    assert report["exact"] == 50.0
    cut = squad_evaluate(data, predictions, na_probs, na_prob_thresh=0.55)
    assert (cut["exact"], cut["HasAns_exact"], cut["NoAns_exact"]) == (50.0, 50.0, 50.0)
    assert cut["best_exact"] == 75.0


def test_missing_predictions() -> None:
    with pytest.warns(UserWarning, match="1 questions without a prediction score 0, 'c'"):
        report = squad_evaluate(dataset(a=["fox"], c=[]), {"a": "fox", "unknown": "x"})
    assert (report["exact"], report["total"], report["NoAns_exact"]) == (50.0, 2, 0.0)
    with pytest.raises(ValueError, match="na_probs: expected every predicted question, 1 lack, 'a' first"):
        squad_evaluate(dataset(a=["fox"]), {"a": "fox"}, {})
    with pytest.raises(ValueError, match="dataset: expected at least one question"):
        squad_evaluate([], {})


def test_wilson_interval() -> None:
    low, high = wilson_interval(5, 10)
    assert (round(low, 4), round(high, 4)) == (0.2366, 0.7634)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"successes: expected 0 to trials \(2\), got 3"):
        wilson_interval(3, 2)
