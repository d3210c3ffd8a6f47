"""Put retrieved chunks before an input: ``[MEM] c1 [MEM] c2 [SEP] input``, row by row, labels and masks with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100


class Augmented(NamedTuple):
    """Inputs with their retrieved prefix, padded to one length."""

    input_ids: Tensor  # (B, T') int64
    attention_mask: Tensor  # (B, T') int64, 0 on padding
    labels: Tensor | None  # (B, T') int64, -100 on prefix and padding


def prefix_length(prefix: int, length: int, limit: int) -> int:
    """How many tokens of a prefix (its separator included) stand before an input of ``length`` tokens.

    The prefix gives way first, down to a quarter of the limit, so that a long input still meets its best chunk; then
    the input keeps its last tokens, never fewer than half the limit.
    """
    return min(prefix, max(limit - length, limit // 4, 1))


def augment_rows(
    input_ids: Tensor,
    chunks: Sequence[Sequence[Sequence[int]]],
    attention_mask: Tensor | None,
    labels: Tensor | None,
    *,
    memory_id: int,
    separator_id: int,
    pad_id: int,
    limit: int,
    padding_side: str = "right",
) -> Augmented:
    """(B, T) inputs and each row's chunks of token ids to the augmented batch.

    Padding of the inputs is dropped, on whichever side it stands; what comes out is padded on ``padding_side``. A row
    without chunks gets no prefix and no separator.

    Args:
        input_ids: (B, T) int64.
        chunks: B lists of token id lists, best first.
        attention_mask: (B, T) bool or 0/1, None for no padding.
        labels: (B, T) int64 aligned with ``input_ids``, or None.
        limit: length that no row passes.
    """
    rows, marks, targets = [], [], []
    for i, found in enumerate(chunks):
        kept = slice(None) if attention_mask is None else attention_mask[i].bool()
        tokens = input_ids[i][kept]
        prefix = [token for chunk in found for token in (memory_id, *chunk)]
        if prefix:
            room = prefix_length(len(prefix) + 1, tokens.numel(), limit)
            prefix = [*_whole_marks(prefix[: room - 1], memory_id), separator_id]
        tokens = tokens[max(0, tokens.numel() + len(prefix) - limit) :]
        head = torch.tensor(prefix, dtype=torch.int64, device=input_ids.device)
        rows.append(torch.cat((head, tokens)))
        marks.append(torch.ones_like(rows[-1]))
        if labels is not None:
            wanted = labels[i][kept]
            wanted = wanted[wanted.numel() - tokens.numel() :]
            targets.append(torch.cat((torch.full_like(head, IGNORED), wanted)))
    return Augmented(
        _padded(rows, pad_id, padding_side, input_ids),
        _padded(marks, 0, padding_side, input_ids),
        None if labels is None else _padded(targets, IGNORED, padding_side, labels),
    )


def last_tokens(input_ids: Tensor, attention_mask: Tensor | None, limit: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """(B, T) inputs and mask to each row's last ``limit`` tokens, padded on the right."""
    none: list[list[list[int]]] = [[] for _ in range(input_ids.shape[0])]
    cut = augment_rows(input_ids, none, attention_mask, None, memory_id=0, separator_id=0, pad_id=pad_id, limit=limit)
    return cut.input_ids, cut.attention_mask


def _whole_marks(prefix: list[int], memory_id: int) -> list[int]:
    """Without a last mark that no token follows."""
    return prefix[:-1] if prefix and prefix[-1] == memory_id else prefix


def _padded(rows: list[Tensor], value: int, side: str, like: Tensor) -> Tensor:
    if not rows:
        return like.new_zeros(0, like.shape[1])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
