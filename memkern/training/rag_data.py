"""Batches of a Self-RAG run: rows to predict, the chunks around them, and which chunk answers which row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memkern.data.generators import position_recall

Item = Mapping[str, Any]


@dataclass
class RAGBatch:
    """One micro-batch on the CPU."""

    input_ids: Tensor  # (B, T) int64, padded on the right
    attention_mask: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, -100 ignored
    chunks: list[list[list[int]]]  # each row's context
    positives: list[int]  # index into the row's chunks, -1 for none


def collate(items: Sequence[Item], pad_id: int, tokenizer: Any = None) -> RAGBatch:
    """Items ``{"input_ids", "context_chunks", "positive"?, "labels"?}`` to a batch.

    Args:
        items: ``input_ids`` a sequence of ints; ``context_chunks`` a list of token id lists, or of texts for the
            tokenizer; ``positive`` the chunk that answers, or its index, None or -1 for
            none; ``labels`` as long as
            ``input_ids``, by default the inputs themselves.

    Raises:
        ValueError: lengths or indices that do not fit, by name.
    """
    rows, labels, chunks, positives = [], [], [], []
    for item in items:
        ids = _ints(item["input_ids"])
        wanted = ids if item.get("labels") is None else _ints(item["labels"])
        if len(wanted) != len(ids):
            raise ValueError(f"labels: expected {len(ids)} as input_ids has, got {len(wanted)}")
        context = [_chunk(chunk, tokenizer) for chunk in item.get("context_chunks") or []]
        positive = _place(item.get("positive"), context, tokenizer)
        if not -1 <= positive < len(context):
            raise ValueError(f"positive: expected -1 or an index below {len(context)}, got {positive}")
        rows.append(torch.tensor(ids, dtype=torch.int64))
        labels.append(torch.tensor(wanted, dtype=torch.int64))
        chunks.append(context)
        positives.append(positive)
    pad = torch.nn.utils.rnn.pad_sequence
    return RAGBatch(
        pad(rows, True, pad_id),
        pad([torch.ones_like(row) for row in rows], True, 0),
        pad(labels, True, -100),
        chunks,
        positives,
    )


def leaks(chunk: Sequence[int], predicted: Sequence[Sequence[int]]) -> bool:
    """Whether more than half of the chunk stands, in one run, in a text that is being predicted."""
    run = len(chunk) // 2 + 1
    grams = {tuple(chunk[i : i + run]) for i in range(len(chunk) - run + 1)}
    return any(tuple(text[i : i + run]) in grams for text in predicted for i in range(len(text) - run + 1))


def leak_test(batch: RAGBatch) -> Callable[[Sequence[int]], bool]:
    """Whether a chunk gives away what the batch predicts.

    It does if it shares more than half of itself with a predicted text, in one run, or holds more than half of one. An
    answer may stand in a chunk: a row that is mostly question predicts no text in this sense.
    """
    predicted = predicted_texts(batch.labels)
    lengths = batch.attention_mask.sum(1).tolist()
    whole = [text for text, length in zip(predicted, lengths, strict=True) if 2 * len(text) > length]
    return lambda chunk: leaks(chunk, predicted) or any(leaks(text, [chunk]) for text in whole)


def predicted_texts(labels: Tensor) -> list[list[int]]:
    """The labelled tokens of each row."""
    return [[t for t in row if t != -100] for row in labels.tolist()]


def indices(count: int, seed: int, start: int) -> Iterator[int]:
    """Places in a data set of ``count`` items from the ``start``-th draw on, a fresh order each epoch."""
    epoch, place = divmod(start, count)
    while True:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        yield from order[place:]
        epoch, place = epoch + 1, 0


def recall_items(count: int, facts: int, seed: int, tokenizer: Any = None) -> list[dict[str, Any]]:
    """``count`` questions about one stream of ``facts`` facts, the positions asked in turn.

    With a tokenizer the facts are its tokens of "STORE key = value"; without one, the generator's own token ids.
    Only the value is predicted.
    """
    drawn = position_recall(1, facts, keys=max(64, facts), seed=seed)
    order = torch.randperm(facts, generator=torch.Generator().manual_seed(seed)).tolist()
    key, value = drawn.facts[0, :, 1], drawn.facts[0, :, 3]
    items = []

    def tokens(ids: Tensor) -> list[int]:
        if tokenizer is None:
            return [int(t) for t in ids]
        found: list[int] = tokenizer(drawn.text(ids), add_special_tokens=False)["input_ids"]
        return found

    context = [tokens(fact) for fact in drawn.facts[0]]
    for i in range(count):
        position = order[i % facts]
        question = tokens(torch.stack((drawn.query[0, 0], key[position], drawn.query[0, 2])))
        answer = tokens(value[position : position + 1])
        items.append(
            {
                "input_ids": question + answer,
                "labels": [-100] * len(question) + answer,
                "context_chunks": context,
                "positive": position,
            }
        )
    return items


def _place(positive: Any, context: list[list[int]], tokenizer: Any) -> int:
    """Index of the positive in the context; a chunk that is not there is put at its end."""
    if positive is None:
        return -1
    if isinstance(positive, int) or (isinstance(positive, Tensor) and positive.dim() == 0):
        return int(positive)
    chunk = _chunk(positive, tokenizer)
    if chunk not in context:
        context.append(chunk)
    return context.index(chunk)


def _chunk(chunk: Any, tokenizer: Any) -> list[int]:
    if not isinstance(chunk, str):
        return _ints(chunk)
    if tokenizer is None:
        raise ValueError("context_chunks: texts need a model with a tokenizer")
    ids: list[int] = tokenizer(chunk, add_special_tokens=False)["input_ids"]
    return ids


def _ints(values: Any) -> list[int]:
    return [int(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]
