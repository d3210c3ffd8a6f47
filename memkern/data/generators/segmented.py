"""What the segmented generators return: documents of segments, the question in each document's last one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PAD, CLS, SEP, QUERY, NEEDLE = range(5)
SPECIALS = ("<pad>", "<cls>", "<sep>", "<query>", "<needle>")


class SegmentedQuestions(NamedTuple):
    """B documents of up to T segments of L tokens. All documents end at step T - 1; a shorter one starts later.

    Segments have XLNet's layout: padding on the left, then the text, ``<sep>`` and ``<cls>`` last.
    """

    input_ids: Tensor  # (B, T, L) int64
    attention_mask: Tensor  # (B, T, L) int64, 1 on tokens
    segment_mask: Tensor  # (B, T) bool, False before a document starts
    answer_position: Tensor  # (B,) int64, the right token of the last segment
    candidates: Tensor  # (B, C) int64, the tokens of the last segment that may be the answer
    distance: Tensor  # (B,) int64, how many segments before the last one the fact stands; -1 where unknown

    @property
    def documents(self) -> int:
        return self.input_ids.shape[0]

    @property
    def segments(self) -> int:
        return self.input_ids.shape[1]

    @property
    def chance(self) -> float:
        """Accuracy of a blind guess among the candidates."""
        return 1 / self.candidates.shape[1]

    def select(self, rows: Tensor) -> SegmentedQuestions:
        """The documents at ``rows`` (R,) int64, their leading steps without any document left out."""
        picked = SegmentedQuestions(*(field[rows] for field in self))
        if not len(rows):
            return picked
        first = int(picked.segment_mask.any(0).to(torch.int64).argmax())
        return picked._replace(
            input_ids=picked.input_ids[:, first:],
            attention_mask=picked.attention_mask[:, first:],
            segment_mask=picked.segment_mask[:, first:],
        )
