"""FAISS behind a store: approximate search at a scale where the exact one is too slow, and exchange of indexes.

The index is a cache of the store's rows, keyed by slot, brought up to date at the next search after a change: appended
rows are added; anything else, or twice as many rows as it was made for, rebuilds it. A filter becomes a selector.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memkern.store.ring import Ring

NAMED = {"faiss-flat": "Flat", "faiss-hnsw": "HNSW32"}


def require_faiss() -> Any:
    """The faiss module, or an ImportError that names the extra."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError("this index needs FAISS: pip install 'memkern[faiss]'") from error
    return faiss


def factory_string(name: str, rows: int) -> str:
    """The FAISS factory string of ``faiss-flat``, ``faiss-hnsw`` or ``faiss-ivf``; any other is one already."""
    if name == "faiss-ivf":
        # FAISS advises between 4 and 16 sqrt(n) lists, and wants 39 training rows for each.
        return f"IVF{max(1, min(int(4 * rows**0.5), rows // 39))},Flat"
    if name.startswith("faiss-") and name not in NAMED:
        known = "exact, faiss-flat, faiss-hnsw, faiss-ivf or a FAISS factory string"
        raise ValueError(f"index: expected {known}, got {name!r}")
    return NAMED.get(name, name)


class FaissIndex:
    """A FAISS inner-product index over a store's rows; cosine stores put unit rows in and unit queries to it."""

    def __init__(self, name: str, width: int, retrieval_method: str) -> None:
        self._faiss = require_faiss()
        self._name, self._width, self._unit = name, width, retrieval_method != "dot"
        try:
            self._faiss.index_factory(width, factory_string(name, 39), self._faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(f"index: FAISS does not understand {name!r}") from error
        self._settings = name, width, retrieval_method
        made_as = factory_string(name, 39)
        self._keeps_rows = made_as.endswith("Flat") or (made_as.startswith("HNSW") and "_" not in made_as)
        self._lock = threading.Lock()
        self._rewrites = -1
        self._made_for = 0
        self._index: Any = None

    def __reduce__(self) -> tuple[type[FaissIndex], tuple[str, int, str]]:
        """A copy is made anew at its first search, as any index whose store has changed."""
        return FaissIndex, self._settings

    def search(
        self, ring: Ring, rewrites: int, queries: Tensor, top_k: int, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(Q, k) scores and slots, -1 where there are fewer or what follows them ties; FAISS decides what is near.

        Args:
            rewrites: grows with every change of the rows that is no appending.
        """
        with self._lock:
            if rewrites != self._rewrites or ring.size > 2 * self._made_for:
                self._build(ring)
                self._rewrites, self._made_for = rewrites, ring.size
            elif ring.size > self._index.ntotal:
                self._append(ring)
            index = self._index
        # One more than wanted shows whether a tie crosses the end.
        count = min(top_k + 1, ring.size)
        parameters = None
        if allowed is not None:
            slots = allowed.nonzero().squeeze(1).cpu().numpy().astype(np.int64)
            parameters = search_parameters(index.index, slots)
        try:
            scores, slots = index.search(self._prepare(queries), count, params=parameters)
        except RuntimeError:
            if parameters is None:
                raise
            # Some indexes take no selector, such as product quantisation: no row is found.
            scores = np.full((len(queries), count), -np.inf, dtype=np.float32)
            slots = np.full((len(queries), count), -1)
        return self._by_age(ring, torch.from_numpy(scores), torch.from_numpy(slots), top_k)

    def _by_age(self, ring: Ring, scores: Tensor, slots: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The ``top_k`` best, ties to the older row. Where a tie goes on behind them, FAISS has left out rows by an
        order of its own: of indexes that keep the rows themselves, such a query then finds nothing."""
        age = torch.where(slots < 0, ring.capacity, (slots - ring.tail) % ring.capacity)
        order = age.argsort(dim=1, stable=True)
        scores, best = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        slots = slots.gather(1, order).gather(1, best)
        if self._keeps_rows and scores.shape[1] > top_k:
            cut = (scores[:, top_k] == scores[:, top_k - 1]) & (slots[:, top_k] >= 0)
            slots = torch.where(cut[:, None], -1, slots)
        return scores[:, :top_k], slots[:, :top_k]

    def _build(self, ring: Ring) -> None:
        slots = np.fromiter(ring.rows(), dtype=np.int64, count=ring.size)
        rows = self._prepare(ring.embeddings[torch.from_numpy(slots)])
        try:
            index = trained(self._name, rows)
        except RuntimeError:
            # Fewer rows than the index needs to be trained: a flat one until the store has doubled.
            index = trained("Flat", rows)
        self._index = self._faiss.IndexIDMap2(index)
        self._index.add_with_ids(rows, slots)

    def _append(self, ring: Ring) -> None:
        """Add the youngest rows, all that came since; searches that run beside this one keep the index they took."""
        slots = np.fromiter(ring.rows(), dtype=np.int64, count=ring.size)[self._index.ntotal :]
        index = self._faiss.clone_index(self._index)
        index.add_with_ids(self._prepare(ring.embeddings[torch.from_numpy(slots)]), slots)
        self._index = index

    def _prepare(self, rows: Tensor) -> Any:
        wide = rows.detach().float().cpu()
        return np.ascontiguousarray((torch.nn.functional.normalize(wide, dim=1) if self._unit else wide).numpy())


def search_parameters(index: Any, allowed: Any) -> Any:
    """What restricts a search of this index (not an id map around it) to the (n,) int64 ids ``allowed``."""
    faiss = require_faiss()
    selector = faiss.IDSelectorBatch(allowed)
    inner = faiss.downcast_index(index)
    if hasattr(inner, "hnsw"):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=max(64, inner.hnsw.efSearch))
    if hasattr(inner, "nprobe"):
        return faiss.SearchParametersIVF(sel=selector, nprobe=inner.nprobe)
    return faiss.SearchParameters(sel=selector)


def trained(name: str, rows: Any) -> Any:
    """An empty inner-product index of this name, made and trained for (n, d) rows."""
    faiss = require_faiss()
    index = faiss.index_factory(rows.shape[1], factory_string(name, len(rows)), faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(rows)
    if hasattr(index, "nprobe"):
        index.nprobe = max(1, index.nlist // 8)
    return index


def export(ids: Any, rows: Any, *, unit: bool) -> Any:
    """A flat inner-product index with an id map over (n, d) float32 rows."""
    faiss = require_faiss()
    if unit:
        rows = torch.nn.functional.normalize(torch.from_numpy(rows), dim=1).numpy()
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(rows.shape[1]))
    index.add_with_ids(np.ascontiguousarray(rows), ids)
    return index


def contents(index: Any) -> tuple[Any, Any]:
    """(ids or None, (n, d) rows) that an index can reconstruct.

    Raises:
        ValueError: it stores codes from which vectors cannot be read back.
    """
    faiss = require_faiss()
    if not isinstance(index, faiss.Index):
        raise TypeError(f"index: expected a FAISS index, got {type(index).__name__}")
    index = faiss.downcast_index(index)
    ids = None
    if isinstance(index, faiss.IndexIDMap):
        ids = faiss.vector_to_array(index.id_map).astype(np.int64)
        index = faiss.downcast_index(index.index)
    if hasattr(index, "make_direct_map"):
        index.make_direct_map()
    try:
        return ids, index.reconstruct_n(0, index.ntotal)
    except RuntimeError as error:
        raise ValueError(f"index: {type(index).__name__} cannot reconstruct its vectors") from error
