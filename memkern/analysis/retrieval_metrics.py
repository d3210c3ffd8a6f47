"""Recall@k, mean reciprocal rank and nDCG of ranked ids against the relevant ones, means over the queries."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Sequence

Ranked = Sequence[Sequence[Hashable]]
Relevant = Sequence[Collection[Hashable]]


def recall_at_k(ranked: Ranked, relevant: Relevant, k: int) -> float:
    """Mean share of the relevant ids among the first k; queries without any relevant id do not count."""
    shares = [len(set(ids[:k]) & set(wanted)) / len(set(wanted)) for ids, wanted in _pairs(ranked, relevant)]
    return sum(shares) / len(shares) if shares else 0.0


def mean_reciprocal_rank(ranked: Ranked, relevant: Relevant) -> float:
    """Mean of 1 / rank of the first relevant id, 0 where there is none."""
    values = []
    for ids, wanted in _pairs(ranked, relevant):
        first = next((rank for rank, id in enumerate(ids, 1) if id in wanted), None)
        values.append(0.0 if first is None else 1.0 / first)
    return sum(values) / len(values) if values else 0.0


def ndcg_at_k(ranked: Ranked, relevant: Relevant, k: int) -> float:
    """Mean normalised discounted cumulative gain with gain 1 for a relevant id (Järvelin and Kekäläinen 2002)."""
    values = []
    for ids, wanted in _pairs(ranked, relevant):
        gain = sum(1 / math.log2(rank + 1) for rank, id in enumerate(ids[:k], 1) if id in wanted)
        best = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(set(wanted))) + 1))
        values.append(gain / best)
    return sum(values) / len(values) if values else 0.0


def retrieval_report(ranked: Ranked, relevant: Relevant, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall and nDCG at each k, and MRR, by name."""
    report = {f"recall@{k}": recall_at_k(ranked, relevant, k) for k in ks}
    report |= {f"ndcg@{k}": ndcg_at_k(ranked, relevant, k) for k in ks}
    return report | {"mrr": mean_reciprocal_rank(ranked, relevant)}


def _pairs(ranked: Ranked, relevant: Relevant) -> list[tuple[Sequence[Hashable], Collection[Hashable]]]:
    if len(ranked) != len(relevant):
        raise ValueError(f"relevant: expected {len(ranked)} entries, one for each query, got {len(relevant)}")
    return [(ids, wanted) for ids, wanted in zip(ranked, relevant, strict=True) if wanted]
