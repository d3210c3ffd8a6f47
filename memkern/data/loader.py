"""Documents of many segments, one time step after another: row i of every step is document i."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from memkern.data.features import SquadFeature, group_documents

STRATEGIES = ("answer_centered", "first_n", "random_continuous")
_TENSORS = ("input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions", "cls_index")

TimeStep = dict[str, Any]


class SegmentSelector:
    """Picks at most n neighbouring segments of a document.

    Args:
        max_segments: n, at least 1; None takes all.
        strategy: "first_n"; "random_continuous", a run that starts anywhere; or "answer_centered", a run around the
            first segment that holds the answer (random without one). The last looks at answers, so outside training
            it is "first_n".
        seed: random runs are drawn from it, the epoch and the document's id, and from nothing else.

    Raises:
        ValueError: an unknown strategy or a size below 1.
    """

    def __init__(
        self, max_segments: int | None = None, strategy: str = "answer_centered", seed: int | None = None
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"segment_selection_strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
        if max_segments is not None and max_segments < 1:
            raise ValueError(f"max_segments: expected at least 1 or None, got {max_segments}")
        self.max_segments, self.strategy, self.seed = max_segments, strategy, seed or 0

    def select(self, document: Sequence[SquadFeature], *, training: bool = False, epoch: int = 0) -> range:
        """Which segments of ``document`` (its features in order) to take."""
        total, wanted = len(document), self.max_segments
        if wanted is None or wanted >= total:
            return range(total)
        strategy = self.strategy if training or self.strategy != "answer_centered" else "first_n"
        if strategy == "first_n":
            return range(wanted)
        if strategy == "answer_centered":
            for index, feature in enumerate(document):
                if feature["start_positions"] != feature["cls_index"]:
                    start = min(max(0, index - wanted // 2), total - wanted)
                    return range(start, start + wanted)
        draw = random.Random(f"{self.seed} {epoch} {document[0]['example_id']}")
        start = draw.randint(0, total - wanted)
        return range(start, start + wanted)


class TimeStepMajorDataLoader:
    """Batches of documents; each is a list over time steps t of dictionaries that hold segment t of every document.

    A dictionary has the tensors of the features ((B, L) and (B,) int64), ``document_mask`` (B,) bool, ``example_ids``
    and the features' other entries as lists of B. Where a document has ended its row is padding: zeros, labels at
    ``cls_index``, mask False, id "padding_<id>"; no row ever moves.

    Args:
        features: from :func:`memkern.data.squad_features`.
        batch_size: documents B; the last batch may have fewer.
        shuffle: documents in an order drawn from ``epoch_seed`` and the epoch.
        max_segments, segment_selection_strategy: see :class:`SegmentSelector`.
        epoch_seed: what the order and random runs are drawn from; the same for every process of a job.
        training: whether selection may look at answers.
    """

    def __init__(
        self,
        features: Sequence[SquadFeature],
        batch_size: int,
        shuffle: bool = False,
        max_segments: int | None = None,
        segment_selection_strategy: str = "answer_centered",
        epoch_seed: int | None = None,
        training: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.documents = list(group_documents(features).values())
        self.batch_size, self.shuffle, self.training = batch_size, shuffle, training
        self.selector = SegmentSelector(max_segments, segment_selection_strategy, epoch_seed)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next pass is the ``epoch``-th: another order and other random runs, the same at every call."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.documents) // self.batch_size)

    def __iter__(self) -> Iterator[list[TimeStep]]:
        return self.batches(range(len(self)))

    def batches(self, wanted: Sequence[int]) -> Iterator[list[TimeStep]]:
        """The batches of this epoch at the given places only: what resuming and several processes need."""
        order = list(range(len(self.documents)))
        if self.shuffle:
            random.Random(f"{self.selector.seed} {self.epoch}").shuffle(order)
        for batch in wanted:
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self._steps([self.documents[row] for row in rows])

    def _steps(self, documents: list[list[SquadFeature]]) -> list[TimeStep]:
        chosen = [
            [document[i] for i in self.selector.select(document, training=self.training, epoch=self.epoch)]
            for document in documents
        ]
        return [
            self._step([segments[t] if t < len(segments) else None for segments in chosen], chosen)
            for t in range(max(len(segments) for segments in chosen))
        ]

    @staticmethod
    def _step(rows: list[SquadFeature | None], chosen: list[list[SquadFeature]]) -> TimeStep:
        filled = [row if row is not None else _padding(own[0]) for row, own in zip(rows, chosen, strict=True)]
        step: TimeStep = {}
        for key in filled[0]:
            values = [row[key] for row in filled]
            step[key] = torch.tensor(values, dtype=torch.int64) if key in _TENSORS else values
        step["example_ids"] = step.pop("example_id")
        step["document_mask"] = torch.tensor([row is not None for row in rows])
        return step


def _padding(template: SquadFeature) -> SquadFeature:
    """A row of the template's sizes without content."""
    length = len(template["input_ids"])
    cls = template["cls_index"]
    blank: dict[type, Any] = {str: "", bool: False, int: 0, list: []}
    row = {key: blank.get(type(value)) for key, value in template.items()}
    zeros = {key: [0] * length for key in ("input_ids", "attention_mask", "token_type_ids")}
    return (
        row
        | zeros
        | {
            "offset_mapping": [(0, 0)] * length,
            "start_positions": cls,
            "end_positions": cls,
            "cls_index": cls,
            "example_id": f"padding_{template['example_id']}",
            "chosen_answer_char_span": [-1, -1],
        }
    )
