"""``semantic_search`` with the answers of sentence-transformers' function of that name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from memkern.store._arguments import numbers
from memkern.store.memory_store import MemoryStore


def semantic_search(queries: Tensor | Sequence[Any], store: MemoryStore, top_k: int = 10) -> list[list[dict[str, Any]]]:
    """For each (n, d_model) query the best chunks as ``{"corpus_id": id, "score": score}``, best first.

    Args:
        queries: (n, d_model) or (d_model,) float: a tensor, an array or a list of tensors.
        store: what to search.
        top_k: at most so many for each query.
    """
    rows = numbers("queries", queries)
    rows = rows[None] if rows.dim() == 1 else rows
    found = store.search_batched(rows, top_k)
    return [[{"corpus_id": hit.id, "score": hit.score} for hit in hits] for hits in found]
