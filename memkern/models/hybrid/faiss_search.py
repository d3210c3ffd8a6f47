"""FAISS behind the external memory: approximate search for banks that are too large for an exact one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from memkern.store.faiss_index import factory_string, require_faiss, search_parameters, trained


class FaissHeads:
    """One inner-product index for each head of one layer, over unit rows keyed by slot.

    It follows the bank at the next search after a change: chunks that were appended are added; anything else, or twice
    as many chunks as it was made for, makes it anew. It lives on the host, where queries are copied to.

    Args:
        name: ``"faiss-flat"``, ``"faiss-hnsw"``, ``"faiss-ivf"`` or a FAISS factory string.

    Raises:
        ImportError: FAISS is not here; the message names the extra.
        ValueError: a name that FAISS does not understand.
    """

    def __init__(self, name: str, head_dim: int) -> None:
        faiss = require_faiss()
        self._name, self._width = name, head_dim
        try:
            faiss.index_factory(head_dim, factory_string(name, 39), faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(f"external_index: FAISS does not understand {name!r}") from error
        self._epoch = -1
        self._made_for = 0
        self._heads: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> FaissHeads:
        """Without the indexes, which the copy's bank makes when it needs them."""
        return FaissHeads(self._name, self._width)

    def search(
        self, rows: Tensor, epoch: int, queries: Tensor, count: int, live: Tensor | None, documents: Any = None
    ) -> Tensor:
        """(H, Q, count) slots, the best first, -1 where there are fewer.

        Args:
            rows: (H, N, hd) index vectors of the slots.
            epoch: of the bank; grows with every change that is no appending.
            queries: (H, Q, hd).
            live: (N,) bool slots that may be found, None for all.
            documents: (wanted (Q,), owner (N,)) int64, None for one document.
        """
        if epoch != self._epoch or rows.shape[1] > 2 * self._made_for:
            self._build(rows)
            self._epoch, self._made_for = epoch, rows.shape[1]
        elif rows.shape[1] > self._heads[0].ntotal:
            for index, fresh in zip(self._heads, _unit(rows[:, self._heads[0].ntotal :]), strict=True):
                index.add(fresh)
        found = np.full((rows.shape[0], queries.shape[1], count), -1, dtype=np.int64)
        asked = _unit(queries)
        for places, allowed in _groups(live, documents):
            for head, index in enumerate(self._heads):
                most = min(count, rows.shape[1])
                parameters = None if allowed is None else search_parameters(index, allowed)
                _, slots = index.search(asked[head][places], most, params=parameters)
                found[head][places, :most] = slots
        return torch.from_numpy(found).to(queries.device)

    def _build(self, rows: Tensor) -> None:
        self._heads = []
        for unit in _unit(rows):
            self._heads.append(trained(self._name, unit))
            self._heads[-1].add(unit)


def _unit(rows: Tensor) -> Any:
    """(H, n, hd) contiguous float32 of unit length, on the host."""
    wide = rows.detach().float().cpu()
    return np.ascontiguousarray(torch.nn.functional.normalize(wide, dim=-1).numpy())


def _groups(live: Tensor | None, documents: Any) -> list[tuple[Any, Any]]:
    """(places of queries, slots that these may find or None for all), one for each document that is asked for."""
    alive = None if live is None else live.cpu()
    if documents is None:
        return [(slice(None), None if alive is None else alive.nonzero().squeeze(1).numpy())]
    wanted, owner = (ids.cpu() for ids in documents)
    groups = []
    for document in wanted.unique().tolist():
        mine = owner == document if alive is None else (owner == document) & alive
        groups.append(((wanted == document).nonzero().squeeze(1).numpy(), mine.nonzero().squeeze(1).numpy()))
    return groups
