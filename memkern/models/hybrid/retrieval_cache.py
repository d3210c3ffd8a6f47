"""Which chunks a document retrieved last, for positions whose gate is closed. Everything stays on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_ROWS = 1024


class _Call(NamedTuple):
    documents: Tensor  # (B,) int64
    slots: Tensor  # (B, H, n) int64, -1 for none
    epoch: int  # of the bank when they were found


class RetrievalCache:
    """The slots that the last position of each document retrieved, newest call last."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []

    def __len__(self) -> int:
        return sum(call.documents.numel() for call in self._calls)

    def clear(self) -> None:
        self._calls = []

    def snapshot(self) -> list[_Call]:
        return list(self._calls)

    def restore(self, calls: list[_Call]) -> None:
        self._calls = list(calls)

    def put(self, documents: Tensor, slots: Tensor, epoch: int) -> None:
        """Keep (B, H, n) slots for (B,) documents; the same tensor of documents replaces what its last call left."""
        if self._calls and self._calls[-1].documents is documents:
            self._calls.pop()
        self._calls.append(_Call(documents, slots.detach(), epoch))
        while len(self) > MAX_ROWS and len(self._calls) > 1:
            self._calls.pop(0)

    def get(self, documents: Tensor, epoch: int) -> Tensor | None:
        """(B, H, n) slots of each document, -1 where there are none; None when nothing usable is kept at all.

        Slots found before the bank's ``epoch`` changed may belong to others by now, and count as absent.
        """
        self._calls = [
            call for call in self._calls if call.epoch == epoch and call.documents.device == documents.device
        ]
        if not self._calls:
            return None
        kept = torch.cat([call.documents for call in self._calls])
        slots = torch.cat([call.slots for call in self._calls])
        order = torch.arange(1, kept.numel() + 1, device=kept.device)
        newest = torch.where(documents[:, None] == kept, order, 0).max(1).values
        chosen = slots[(newest - 1).clamp(min=0)]
        return torch.where((newest > 0)[:, None, None], chosen, -1)
