"""Answers to extractive questions: every window of a passage in turn with memory between them, the best span of all."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memkern.data import TimeStepMajorDataLoader, group_documents, load_squad, squad_features
from memkern.data.features import SquadFeature
from memkern.data.squad import SquadSource
from memkern.training.building import load_model, memory_tokens
from memkern.training.losses import MODEL_INPUTS, stack_steps


@dataclass(frozen=True)
class Span:
    """The best span of one document with its scores."""

    text: str
    start: int
    end: int
    segment: int
    score: float
    null_score: float
    margin: float
    """What has to exceed the threshold for there to be an answer."""


# This module's settings -> the fields of a training configuration.
_SETTINGS = {
    "max_length": "max_seq_length",
    "doc_stride": "doc_stride",
    "batch_size": "eval_batch_size",
    "max_answer_length": "max_answer_length",
    "no_answer_threshold": "no_answer_threshold",
    "use_any_positive_logic": "use_any_positive_logic",
    "max_segments": "max_n_segs",
}


class Predictions(dict[str, str]):
    """{question id: answer}, "" for none.

    Attributes:
        na_probs: {id: probability that there is no answer}.
        spans: {id: the best span, whatever the threshold says}; None where no token of the passage was left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.na_probs: dict[str, float] = {}
        self.spans: dict[str, Span | None] = {}


class QAPredictor:
    """Predicts with a model of ours.

    A document is answered when its margin exceeds ``no_answer_threshold``: with ``use_any_positive_logic`` the best
    over the segments of (span score - the segment's own CLS score), else the best span score minus the joint CLS score
    of all segments, which is what the document-level loss trains.

    Args:
        model: takes documents (B, N, T); its memory starts from what was set, else from the learned memory.
        tokenizer: the model's.
        max_length, doc_stride: of the windows.
        batch_size: documents side by side; no result depends on it.
        max_answer_length: tokens of an answer.
        no_answer_threshold: higher answers less; -inf answers always.
        use_any_positive_logic: see above.
        max_segments: reads so many windows of a passage only.
        memory_tokens: what :func:`memkern.data.configure_memory_tokens` gave, where the text carries them.
        autocast: makes the context that the model runs in.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int = 384,
        doc_stride: int = 128,
        batch_size: int = 8,
        max_answer_length: int = 30,
        no_answer_threshold: float = 0.0,
        use_any_positive_logic: bool = True,
        max_segments: int | None = None,
        memory_tokens: dict[str, list[int]] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.doc_stride, self.batch_size = max_length, doc_stride, batch_size
        self.max_answer_length, self.no_answer_threshold = max_answer_length, no_answer_threshold
        self.use_any_positive_logic, self.max_segments = use_any_positive_logic, max_segments
        self.memory_tokens = memory_tokens
        self.autocast = autocast
        self.na_probs: dict[str, float] = {}

    @classmethod
    def from_folder(cls, folder: str | Path, **options: Any) -> QAPredictor:
        """A predictor with a saved model, its tokenizer, and the settings that it was trained with.

        Args:
            folder: what a trainer or ``save_pretrained`` wrote.
            options: this class's arguments, over the folder's ``training_config.json``; ``device`` too.

        Raises:
            ValueError: an unknown option. OSError: no model there.
        """
        from transformers import AutoTokenizer

        folder = Path(folder)
        settings: dict[str, Any] = {}
        if (folder / "training_config.json").is_file():
            saved = json.loads((folder / "training_config.json").read_text())
            settings = {ours: saved[theirs] for ours, theirs in _SETTINGS.items() if theirs in saved}
        device = options.pop("device", None)
        known = inspect.signature(cls).parameters.keys() - {"model", "tokenizer"}
        unknown = options.keys() - known
        if unknown:
            raise ValueError(f"options: unknown {', '.join(sorted(unknown))}; the known ones are {', '.join(known)}")
        model = load_model(folder)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        settings["memory_tokens"] = memory_tokens(model)
        return cls(model, AutoTokenizer.from_pretrained(folder), **(settings | options))

    def predict(self, dataset: SquadSource) -> Predictions:
        """Answer every question of a data set (see :func:`memkern.data.load_squad`); its answers are not looked at."""
        questions = [replace(example, answers=(), answer_starts=()) for example in load_squad(dataset)]
        features = squad_features(
            questions,
            self.tokenizer,
            max_length=self.max_length,
            doc_stride=self.doc_stride,
            memory_tokens=self.memory_tokens,
        )
        return self.predict_features(features)

    @torch.no_grad()
    def predict_features(self, features: Sequence[SquadFeature]) -> Predictions:
        """Answer questions that are featurised already; the answers come in the order of the questions."""
        documents = group_documents(features)
        # Documents of like length side by side: less padding, the same answers.
        order = sorted(documents, key=lambda id: len(documents[id]))
        loader = TimeStepMajorDataLoader(
            [feature for id in order for feature in documents[id]], self.batch_size, max_segments=self.max_segments
        )
        was_training = self.model.training
        self.model.eval()
        spans: dict[str, Span | None] = {}
        device = next(self.model.parameters()).device
        try:
            for steps in loader:
                batch = stack_steps(steps, device)
                inputs = {name: batch[name] for name in MODEL_INPUTS}
                with self.autocast():
                    output = self.model(**inputs, document_mask=batch["document_mask"])
                best = self._best_spans(output.start_logits.float(), output.end_logits.float(), batch)
                for row, id in enumerate(steps[0]["example_ids"]):
                    spans[id] = self._span(documents[id], *(values[row] for values in best))
        finally:
            self.model.train(was_training)
        answers = Predictions()
        for id in documents:
            span = answers.spans[id] = spans[id]
            margin = float("-inf") if span is None else span.margin
            answers[id] = span.text if span is not None and margin > self.no_answer_threshold else ""
            answers.na_probs[id] = float(torch.sigmoid(torch.tensor(-margin, dtype=torch.float64)))
        self.na_probs = answers.na_probs
        return answers

    def _best_spans(self, start: Tensor, end: Tensor, batch: dict[str, Tensor]) -> tuple[list[Any], ...]:
        """For each row and segment the best span's score, start and end, and the CLS scores."""
        rows, segments, length = start.shape
        cls = batch["cls_index"][..., None]
        passage = batch["answerable"].scatter(2, cls, False)
        start_cls, end_cls = start.gather(2, cls)[..., 0], end.gather(2, cls)[..., 0]
        start = start.masked_fill(~passage, float("-inf")).reshape(rows * segments, length)
        end = end.masked_fill(~passage, float("-inf")).reshape(rows * segments, length)
        # For a start i the best end lies in [i, i + max_answer_length): a window of the padded ends.
        padded = torch.nn.functional.pad(end, (0, self.max_answer_length - 1), value=float("-inf"))
        best_end, offset = padded.unfold(1, self.max_answer_length, 1).max(-1)
        score, first = (start + best_end).max(-1)
        last = first + offset.gather(1, first[:, None])[:, 0]
        active = batch["document_mask"]
        shape = (rows, segments)
        null_start = start_cls.masked_fill(~active, float("-inf"))
        null_end = end_cls.masked_fill(~active, float("-inf"))
        joint = null_start.logsumexp(1) + null_end.logsumexp(1)
        values = (score.view(shape), first.view(shape), last.view(shape), null_start + null_end)
        return (*(value.tolist() for value in values), joint.tolist())

    def _span(
        self,
        document: list[SquadFeature],
        scores: list[float],
        starts: list[int],
        ends: list[int],
        nulls: list[float],
        joint: float,
    ) -> Span | None:
        found = [segment for segment, score in enumerate(scores) if score > float("-inf")]
        if not found:
            return None
        if self.use_any_positive_logic:
            margin = max(scores[segment] - nulls[segment] for segment in found)
            positive = [s for s in found if scores[s] - nulls[s] > self.no_answer_threshold]
            segment = max(positive or found, key=lambda s: scores[s])
            null = nulls[segment]
        else:
            segment, null = max(found, key=lambda s: scores[s]), joint
            margin = scores[segment] - joint
        feature = document[segment]
        begin = feature["offset_mapping"][starts[segment]][0]
        finish = feature["offset_mapping"][ends[segment]][1]
        text = feature["context"][begin:finish]
        return Span(text.strip(), begin, finish, segment, scores[segment], null, margin)
