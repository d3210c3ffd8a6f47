"""What a store gives back: chunks by id, hits by score; and which ids were ever used."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Chunk:
    """A stored chunk; unpacks as ``text, embedding``. ``embedding`` is (d_model,), a copy, in the store's dtype."""

    id: int
    text: str
    token_ids: list[int] | None
    embedding: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Chunk):
            return NotImplemented
        mine, others = ((c.id, c.text, c.token_ids, c.metadata) for c in (self, other))
        return mine == others and torch.equal(self.embedding, other.embedding)

    def __hash__(self) -> int:
        return hash((self.id, self.text))

    def __iter__(self) -> Iterator[str | Tensor]:
        return iter((self.text, self.embedding))


@dataclass(frozen=True)
class Hit:
    """A chunk that a search found; unpacks as ``text, score``."""

    id: int
    text: str
    token_ids: list[int] | None = field(hash=False)
    score: float
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)

    def __iter__(self) -> Iterator[str | float]:
        return iter((self.text, self.score))


class UsedIds:
    """Every id that was ever given out, as disjoint intervals [start, end): running ids cost one interval."""

    def __init__(self, intervals: list[tuple[int, int]] | None = None) -> None:
        self._starts = [start for start, _ in intervals or []]
        self._ends = [end for _, end in intervals or []]

    @property
    def intervals(self) -> list[tuple[int, int]]:
        return list(zip(self._starts, self._ends, strict=True))

    @property
    def next(self) -> int:
        """The smallest id above all that were used."""
        return self._ends[-1] if self._ends else 0

    def __contains__(self, id: int) -> bool:
        at = bisect.bisect_right(self._starts, id) - 1
        return at >= 0 and id < self._ends[at]

    def add(self, id: int) -> None:
        """Mark an unused id as used."""
        at = bisect.bisect_right(self._starts, id)
        joins_left = at > 0 and self._ends[at - 1] == id
        joins_right = at < len(self._starts) and self._starts[at] == id + 1
        if joins_left and joins_right:
            self._ends[at - 1] = self._ends.pop(at)
            self._starts.pop(at)
        elif joins_left:
            self._ends[at - 1] = id + 1
        elif joins_right:
            self._starts[at] = id
        else:
            self._starts.insert(at, id)
            self._ends.insert(at, id + 1)
