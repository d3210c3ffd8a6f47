"""Embeddings of token sequences, kept as long as the model's parameters stay what they were."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn


class EmbeddingCache:
    """At most ``size`` embeddings by token ids, the longest unused one goes first.

    Optimiser steps and loading change the parameters' versions and empty the cache; assigning to ``parameter.data``
    does not: call :meth:`clear` then.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.hits = self.misses = 0
        self._rows: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self._state: int | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        self._rows.clear()

    def check(self, model: nn.Module) -> None:
        """Forget everything if a parameter of ``model`` changed since the last call."""
        state = hash(tuple((id(p), p.data_ptr(), p._version) for p in model.parameters()))
        if state != self._state:
            self.clear()
            self._state = state

    def get(self, tokens: Sequence[int]) -> Tensor | None:
        row = self._rows.get(key := tuple(tokens))
        if row is None:
            self.misses += 1
            return None
        self.hits += 1
        self._rows.move_to_end(key)
        return row

    def put(self, tokens: Sequence[int], row: Tensor) -> None:
        self._rows[tuple(tokens)] = row
        while len(self._rows) > self.size:
            self._rows.popitem(last=False)
