"""``semantic_search`` with the answers of sentence-transformers' function of that name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memkern.store.memory_store import MemoryStore


def semantic_search(queries: Tensor, store: MemoryStore, top_k: int = 10) -> list[list[dict[str, Any]]]:
    """For each (n, d_model) query the best chunks as ``{"corpus_id": id, "score": score}``, best first.

    Args:
        queries: (n, d_model) or (d_model,) float.
        store: what to search.
        top_k: at most so many for each query.
    """
    rows = queries[None] if queries.dim() == 1 else queries
    found = store.search_batched(rows, top_k)
    return [[{"corpus_id": hit.id, "score": hit.score} for hit in hits] for hits in found]
