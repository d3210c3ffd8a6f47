"""The rows of a store: a ring in the order of age, with O(1) eviction and holes where rows were deleted.

Row number ``n`` (they run on for ever) lives in slot ``n % capacity``. Live rows lie in the window [tail, head), so
that in slot order they are at most two contiguous runs, the older first: a search over the runs keeps ties to the older
row. Only growing, and a window that deletions have stretched past the capacity, move rows; a quarter of slack above the
maximum makes the second rare enough for O(1) amortised adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_FIRST_CAPACITY = 1024


class Ring:
    """Embeddings (capacity, d) with their inverse norms, ids, texts, token ids and metadata, by row number."""

    def __init__(self, width: int, max_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.max_rows = max_rows
        self.head = 0
        self.tail = 0
        self.size = 0
        self._allocate(min(max_rows, _FIRST_CAPACITY), width, dtype, device)

    def _allocate(self, capacity: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = capacity
        # Tensors of inference mode, in which a caller may be, could not be written to outside of it.
        with torch.inference_mode(False):
            self.embeddings = torch.empty(capacity, width, dtype=dtype, device=device)
            self.inverse_norms = torch.empty(capacity, dtype=torch.float32, device=device)
            self.live = torch.zeros(capacity, dtype=torch.bool, device=device)
        self.ids: list[int] = [-1] * capacity
        self.texts: list[str] = [""] * capacity
        self.token_ids: list[list[int] | None] = [None] * capacity
        self.metadata: list[dict[str, Any] | None] = [None] * capacity
        self.slot_of: dict[int, int] = {}

    def rows(self) -> Iterator[int]:
        """Slots of the live rows, oldest first."""
        for number in range(self.tail, self.head):
            slot = number % self.capacity
            if self.metadata[slot] is not None:
                yield slot

    def runs(self) -> list[slice]:
        """At most two slices of slots that hold the window, the older first."""
        if self.head == self.tail:
            return []
        start, end = self.tail % self.capacity, self.head % self.capacity
        if start < end:
            return [slice(start, end)]
        return [slice(start, self.capacity)] + ([slice(0, end)] if end else [])

    @property
    def holes(self) -> bool:
        return self.head - self.tail != self.size

    def make_room(self, count: int) -> None:
        """Make sure that ``count`` rows can be appended; the caller has evicted what exceeds ``max_rows``."""
        if self.head - self.tail + count <= self.capacity:
            return
        wanted = self.size + count
        if wanted > self.capacity:
            self._move(min(max(wanted, 2 * self.capacity), max(self.max_rows, wanted)))
        else:
            self._move(min(max(2 * wanted, self.capacity), self.max_rows + self.max_rows // 4))

    def _move(self, capacity: int) -> None:
        """Copy the live rows, oldest first, to the front of a new buffer of this capacity."""
        slots = list(self.rows())
        old = (self.embeddings, self.inverse_norms, self.ids, self.texts, self.token_ids, self.metadata)
        embeddings, norms, ids, texts, token_ids, metadata = old
        self._allocate(capacity, embeddings.shape[1], embeddings.dtype, embeddings.device)
        index = torch.tensor(slots, dtype=torch.int64, device=embeddings.device)
        count = len(slots)
        torch.index_select(embeddings, 0, index, out=self.embeddings[:count])
        torch.index_select(norms, 0, index, out=self.inverse_norms[:count])
        self.live[:count] = True
        for new, slot in enumerate(slots):
            self.ids[new], self.texts[new] = ids[slot], texts[slot]
            self.token_ids[new], self.metadata[new] = token_ids[slot], metadata[slot]
        self.slot_of = {id: slot for slot, id in enumerate(self.ids[:count])}
        self.tail, self.head = 0, count

    def adopt(self, embeddings: Tensor, inverse_norms: Tensor) -> None:
        """Make (n, d) rows the buffer of an empty ring, so that a mapped file is not copied; describe them next."""
        count = embeddings.shape[0]
        if count == 0:
            return
        self._allocate(count, 0, embeddings.dtype, embeddings.device)
        self.embeddings, self.inverse_norms = embeddings, inverse_norms
        self.live.fill_(True)
        self.head = self.size = count

    def describe(self, slot: int, id: int, text: str, token_ids: list[int] | None, metadata: dict[str, Any]) -> None:
        """Fill in what belongs to an appended row beside its embedding."""
        self.ids[slot], self.texts[slot], self.token_ids[slot], self.metadata[slot] = id, text, token_ids, metadata
        self.slot_of[id] = slot

    def append(self, embeddings: Tensor, inverse_norms: Tensor) -> list[int]:
        """Write (n, d) rows behind the head; returns their slots. :meth:`make_room` comes first."""
        slots = [number % self.capacity for number in range(self.head, self.head + embeddings.shape[0])]
        index = torch.tensor(slots, dtype=torch.int64, device=self.embeddings.device)
        self.embeddings.index_copy_(0, index, embeddings)
        self.inverse_norms.index_copy_(0, index, inverse_norms)
        self.live.index_fill_(0, index, True)
        self.head += len(slots)
        self.size += len(slots)
        return slots

    def remove(self, slot: int) -> None:
        """Turn a live row into a hole; holes at the old end leave the window."""
        self.live[slot] = False
        del self.slot_of[self.ids[slot]]
        self.ids[slot], self.texts[slot] = -1, ""
        self.token_ids[slot], self.metadata[slot] = None, None
        self.size -= 1
        while self.tail < self.head and self.metadata[self.tail % self.capacity] is None:
            self.tail += 1

    def oldest(self) -> int:
        """Slot of the oldest live row."""
        return self.tail % self.capacity
