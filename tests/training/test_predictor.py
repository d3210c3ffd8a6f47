"""The predictor on a stand-in whose logits are known."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memkern.data import squad_features, train_xlnet_tokenizer
from memkern.data.squad import SquadExample
from memkern.training import QAPredictor


class StandIn(torch.nn.Module):
    """Logits drawn from the tokens of each window alone, so that order and batches cannot matter."""

    def __init__(self, sharp: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.sharp = sharp

    def forward(self, input_ids: Any, document_mask: Any, **inputs: Any) -> Any:
        assert not self.training
        places = torch.arange(input_ids.shape[-1])
        start = torch.sin(input_ids.double() * 3 + places) * self.sharp
        end = torch.cos(input_ids.double() * 5 + places * 2) * self.sharp
        return SimpleNamespace(start_logits=start, end_logits=end)


@pytest.fixture(scope="module")
def tokenizer(questions: list[SquadExample]) -> Any:
    pytest.importorskip("transformers")
    return train_xlnet_tokenizer([question.context for question in questions], vocab_size=120)


def test_best_spans_equal_a_search_over_all(questions: list[SquadExample], tokenizer: Any) -> None:
    model = StandIn().train()
    options = {"max_length": 40, "doc_stride": 8, "max_answer_length": 3}
    answers = QAPredictor(model, tokenizer, **options, no_answer_threshold=float("-inf")).predict(questions)
    assert model.training
    assert list(answers) == [question.id for question in questions]
    model.eval()
    by_id: dict[str, list[tuple[float, str]]] = {}
    for feature in squad_features(questions, tokenizer, max_length=40, doc_stride=8):
        output = model(torch.tensor(feature["input_ids"]), None)
        spans = feature["offset_mapping"]
        passage = [i for i, (a, b) in enumerate(spans) if b > a]
        for i, j in itertools.product(passage, passage):
            if i <= j < i + 3:
                score = float(output.start_logits[i].float() + output.end_logits[j].float())
                text = feature["context"][spans[i][0] : spans[j][1]].strip()
                by_id.setdefault(feature["example_id"], []).append((score, text))
    for id, found in by_id.items():
        best = max(found)
        span = answers.spans[id]
        assert span is not None
        assert span.score == pytest.approx(best[0], abs=1e-5)
        assert answers[id] == span.text == best[1]


@pytest.mark.parametrize("any_positive", [True, False])
def test_batches_and_thresholds(questions: list[SquadExample], tokenizer: Any, any_positive: bool) -> None:
    options = {"max_length": 40, "doc_stride": 8, "use_any_positive_logic": any_positive}
    predictors = [QAPredictor(StandIn(), tokenizer, **options, batch_size=size) for size in (1, 5)]
    one, five = (predictor.predict(questions) for predictor in predictors)
    assert one == five
    assert one.na_probs == five.na_probs == predictors[1].na_probs
    margins = {id: span.margin for id, span in one.spans.items() if span is not None}
    for id, margin in margins.items():
        assert (one[id] != "") == (margin > 0)
        assert one.na_probs[id] == pytest.approx(1 / (1 + torch.tensor(margin).exp().item()), rel=1e-4)
    cut = sorted(margins.values())[len(margins) // 2]
    stricter = QAPredictor(StandIn(), tokenizer, **options, no_answer_threshold=cut).predict(questions)
    assert sum(bool(text) for text in stricter.values()) == sum(margin > cut for margin in margins.values())


def test_answers_of_the_data_set_are_not_looked_at(questions: list[SquadExample], tokenizer: Any) -> None:
    broken = [SquadExample(q.id, q.question, q.context, ("Atlantis",), (0,)) for q in questions]
    predictor = QAPredictor(StandIn(), tokenizer, max_length=40, doc_stride=8)
    assert predictor.predict(broken) == predictor.predict(questions)
    assert predictor.predict([SquadExample("empty", "Who?", "")]) == {"empty": ""}
    first = QAPredictor(StandIn(), tokenizer, max_length=40, doc_stride=8, max_segments=1).predict(questions)
    assert all(span is None or span.segment == 0 for span in first.spans.values())
